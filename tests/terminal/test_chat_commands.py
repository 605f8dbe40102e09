"""`fastvlm chat` in a pseudo-terminal: what each command shows, and session files between runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastvlm_mlx as fv
from tests.cli.command import copy_of_demo
from tests.terminal.chat_models import PICTURES
from tests.terminal.screen import Chat

pytestmark = pytest.mark.slow
Start = Callable[..., Chat]

NUMBER_42 = PICTURES / "number_42.png"
RED_CIRCLE = PICTURES / "red_circle.png"
NUMBERS = re.compile(r"first token · .* · (\d+) of (\d+) positions reused")


def numbers(lines: list[str]) -> tuple[int, int]:
    """Positions reused and positions of the prompt, as said after an answer."""
    match = NUMBERS.search(" ".join(lines))
    assert match is not None, lines
    return int(match[1]), int(match[2])


def test_every_command_shows_what_it_did(chat: Start, tmp_path: Path) -> None:
    terminal = chat("--no-preview", columns=110, rows=50, cwd=tmp_path)
    terminal.wait_for_prompt()
    terminal.wait_for(lambda: "positions" in terminal.status, "the model")
    assert "next question" not in "".join(terminal.ask("/images"))
    assert any("/retry" in line for line in terminal.ask("/help"))

    terminal.enter(f"/image {NUMBER_42}")
    terminal.wait_for(lambda: terminal.typed == "[1 picture] >", "the picture")
    terminal.wait_for(lambda: "1 picture to send" in terminal.status, "it in the status line")
    assert "[1] number_42.png 256x256, 16 positions" in terminal.text
    first = terminal.ask("What number is this?")
    assert first[0] == "42."
    numbers(first)
    terminal.wait_for(lambda: "TTFT" in terminal.status, "its numbers in the status line")
    assert "picture to send" not in terminal.status
    assert terminal.ask("/images") == ["[1] number_42.png, 16 positions"]

    assert terminal.ask("Describe the image.")[0] == "The number 42 in blue."
    again = terminal.ask("/retry")
    assert again[0] == "The number 42 in blue."
    reused, length = numbers(again)
    assert reused == length - 1  # the whole prompt, but for the position the answer starts at
    assert "42" in terminal.ask("/retry temperature=0.5 seed=1")[0]

    terminal.enter("/edit")
    terminal.wait_for(lambda: terminal.typed == "> /edit Describe the image.", "the question")
    terminal.press(*["backspace"] * len("Describe the image."))
    terminal.enter("What colour is the number?")
    terminal.wait_for("Blue.")
    terminal.wait_for_prompt()
    stats = "\n".join(terminal.ask("/stats"))
    assert re.search(r"^turns +2$", stats, re.MULTILINE), stats
    assert "time to first token" in stats and "KV cache" in stats

    terminal.ask("/undo")
    stats = "\n".join(terminal.ask("/stats"))
    assert re.search(r"^turns +1$", stats, re.MULTILINE), stats

    assert terminal.ask("/set max_tokens 2") == ["max_tokens 2"]
    assert re.search(r"^max_tokens +2 ", "\n".join(terminal.ask("/set")), re.MULTILINE)
    cut = terminal.ask("Describe the image.")
    assert cut[0] == "The number" and "cut at 2 tokens" in cut[-1]
    terminal.ask("/set max_tokens default")

    terminal.ask("/system Be brief.")
    assert terminal.ask("/system") == ["Be brief."]
    terminal.ask("/save kept.chat")
    assert (tmp_path / "kept.chat").is_file()
    assert "number_42.png" in "".join(terminal.ask("/drop 1"))
    assert "number_42.png" not in "".join(terminal.ask("/images"))
    terminal.enter("/clear")
    terminal.wait_for("the same /clear again gives it up")
    terminal.wait_for(lambda: terminal.typed == "> /clear", "it again")
    terminal.press("enter")
    terminal.wait_for_prompt()
    assert re.search(r"^turns +0$", "\n".join(terminal.ask("/stats")), re.MULTILINE)
    assert "2 turns" in "".join(terminal.ask("/load kept.chat"))
    assert terminal.ask("/images") == ["[1] number_42.png, 16 positions"]
    assert terminal.ask("/system") == ["Be brief."]
    terminal.quit()


def test_a_wrong_command_is_one_line_and_can_be_put_right(chat: Start) -> None:
    terminal = chat(columns=110, rows=50)
    terminal.wait_for_prompt()
    for typed, words in (
        ("/imagse", "did you mean /image"),
        ("/set temperature hot", "a number from 0"),
        ("/drop 3", "no picture 3"),
        ("/undo 5", "nothing was asked"),
        ("/retry", "nothing was asked"),
        ("/load nowhere.chat", "no such file"),
        ("/quit now", "takes nothing"),
    ):
        errors = terminal.text.count("error: ")
        terminal.enter(typed)
        terminal.wait_for(lambda n=errors: terminal.text.count("error: ") == n + 1, typed)
        terminal.wait_for_prompt()  # empty: what is typed next does not come behind it
        line = [line for line in terminal.lines if line.startswith("error: ")][-1]
        assert words in line
    assert terminal.ask("//slash")[-1:] != [] and "error" not in terminal.typed
    terminal.quit()


def test_a_session_is_taken_up_where_it_was_left(chat: Start, tmp_path: Path) -> None:
    file = tmp_path / "trip.chat"
    first = chat(NUMBER_42, "--session", file)
    first.wait_for_prompt()
    first.ask("What number is this?")
    first.quit()
    second = chat("--session", file)
    second.wait_for_prompt()
    second.wait_for(lambda: "positions" in second.status, "the model")
    answer = second.ask("Describe the image.")
    expected = fv.load("demo").chat()
    expected.ask("What number is this?", [NUMBER_42])
    assert answer[0] == expected.ask("Describe the image.").text
    reused, length = numbers(answer)
    # All of the first turn but its answer's last token, which nothing had read yet, at most.
    assert length - reused < 20 < reused
    second.quit()


def test_a_session_of_another_model_is_computed_anew_and_that_is_said(
    chat: Start, tmp_path: Path
) -> None:
    file = tmp_path / "trip.chat"
    first = chat(NUMBER_42, "--session", file)
    first.wait_for_prompt()
    first.ask("What number is this?")
    first.quit()
    other = copy_of_demo(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "model.language_model.layers.1.self_attn.v_proj.bias"
    weights[name] = weights[name] + np.float16(0.001)
    save_file(weights, other / "model.safetensors")
    second = chat("--session", file, model=other, columns=200)
    second.wait_for("another model")
    second.wait_for_prompt()
    answer = second.ask("Describe the image.")
    expected = fv.load(other).chat()
    expected.ask("What number is this?", [NUMBER_42])
    assert answer[0] == expected.ask("Describe the image.").text
    second.quit()


@pytest.mark.parametrize("damage", ["newer", "no session", "empty"])
def test_a_file_that_cannot_be_used_is_one_line_and_stays_as_it_is(
    chat: Start, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "trip.chat"
    first = chat("--session", file)
    first.wait_for_prompt()
    first.ask("Hello")
    first.quit()
    whole = file.read_bytes()
    content = {
        "newer": re.sub(rb'("?version\\?"?: *\\?"?)\d+', rb"\g<1>9", whole, count=1),
        "no session": b"no session at all\n" * 100,
        "empty": b"",
    }[damage]
    assert content != whole
    file.write_bytes(content)
    second = chat("--session", file, columns=200)
    assert second.wait_for_end() == 2
    assert second.text.count("fastvlm: error: ") == 1 and "Traceback" not in second.text
    assert file.name in second.text
    second.assert_restored()
    assert file.read_bytes() == content
    assert [path for path in tmp_path.iterdir() if path.name != "home"] == [file]


def test_of_a_session_cut_short_the_turns_are_kept_and_that_is_said(
    chat: Start, tmp_path: Path
) -> None:
    file = tmp_path / "trip.chat"
    first = chat(NUMBER_42, "--session", file)
    first.wait_for_prompt()
    first.ask("What number is this?")
    first.quit()
    cut = file.read_bytes()[:-5000]
    file.write_bytes(cut)
    second = chat("--session", file, columns=200)
    second.wait_for("damaged")
    second.wait_for_prompt()
    assert re.search(r"^turns +1$", "\n".join(second.ask("/stats")), re.MULTILINE)
    assert second.ask("Describe the image.")[0]
    second.quit()
    # The file as it was stays beside the new one.
    assert [path.read_bytes() for path in tmp_path.glob("trip.chat.*")] == [cut]
