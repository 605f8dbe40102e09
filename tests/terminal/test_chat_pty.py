"""`fastvlm chat` in a pseudo-terminal: answers as they come, stopping them, and every way out."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fastvlm_mlx as fv
from tests.cli.command import copy_of_demo
from tests.terminal.chat_models import PICTURES, scripted_model
from tests.terminal.screen import Chat

pytestmark = pytest.mark.slow
Start = Callable[..., Chat]

NUMBER_42 = PICTURES / "number_42.png"


def assert_counts(lines: list[str], *, least: int = 1) -> None:
    """The lines hold the counting model's words, none lost and none twice."""
    assert all(re.fullmatch(r"(n\d{3} ?)*", line) for line in lines), lines
    numbers = [int(word[1:]) for line in lines for word in line.split()]
    assert numbers == [number % 300 for number in range(len(numbers))]
    assert len(numbers) >= least


def between(chat: Chat, question: str) -> list[str]:
    """The lines after a question, up to the answer's numbers."""
    lines = chat.lines
    start = max(i for i, line in enumerate(lines) if line.endswith(f"> {question}"))
    after = lines[start + 1 :]
    end = next((i for i, line in enumerate(after) if "to first token" in line), len(after))
    return after[:end]


@pytest.fixture
def held_back(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A model that is loading until the function is called.

    The file is one that Python reads: tokenizers would wait for its own without letting go of the
    interpreter, and no other thread could do anything.
    """
    folder = copy_of_demo(tmp_path / "held")
    file = folder / "config.json"
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    yield folder, lambda: file.write_bytes(content) and None


def test_turns_are_answered_as_a_session_answers_them(chat: Start) -> None:
    terminal = chat(NUMBER_42)
    terminal.wait_for_prompt()
    questions = ["What number is this?", "Describe the image.", "What colour is it?"]
    session = fv.load("demo").chat()
    pictures = [NUMBER_42]
    for question in questions:
        assert terminal.ask(question)[0] == session.ask(question, pictures).text
        pictures = []
    terminal.quit()


def test_an_answer_is_seen_before_it_is_whole_and_ctrl_c_ends_it(
    chat: Start, counting: Path
) -> None:
    terminal = chat("--max-tokens", 8000, model=counting)
    terminal.wait_for_prompt()
    terminal.enter("Count.")
    terminal.wait_for("020 ")
    assert not terminal.at_prompt
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    assert "stopped" in terminal.text
    assert_counts(between(terminal, "Count."), least=21)
    terminal.quit()


def test_a_long_answer_leaves_the_scrollback_whole(chat: Start, counting: Path) -> None:
    terminal = chat("--max-tokens", 900, model=counting, columns=50, rows=10)
    terminal.wait_for_prompt()
    terminal.ask("Count.")
    assert_counts(between(terminal, "Count."), least=900)
    terminal.quit()


def test_markdown_is_settled_at_the_end(chat: Start, tmp_path: Path) -> None:
    pieces = [
        *("# A ti", "tle\n\n", "Some **bo", "ld** words,\n", "in `code`.\n\n", "- one\n", "- two"),
        *("\n\n```py\nx =", " 1\n``", "`\n\n| a | b |\n", "|---|---|\n| 1 ", "| 22 |\n"),
    ]
    terminal = chat(model=scripted_model(tmp_path / "markdown", pieces))
    terminal.wait_for_prompt()
    answer = terminal.ask("Show me.")
    text = "\n".join(answer)
    assert not re.search(r"\*\*|`|^#|\|", text, re.MULTILINE), text
    for line in ("Some bold words, in code.", "x = 1"):
        assert line in [row.strip() for row in answer]
    assert re.search(r"• one\n.*• two", text)
    assert re.search(r"1\s+22", text)
    bold = bold_text(terminal)
    assert "A title" in bold and "bold" in bold and "words" not in bold
    terminal.quit()


def bold_text(chat: Chat) -> str:
    cells = (chat.screen.buffer[y][x] for y in range(chat.screen.lines) for x in range(80))
    return "".join(cell.data if cell.bold else "\0" for cell in cells)


def test_wide_and_combining_characters_stay_whole(chat: Start, tmp_path: Path) -> None:
    pieces = [f"漢字{n:02d}é e\u0301 👍🏽 " for n in range(20)]
    terminal = chat(model=scripted_model(tmp_path / "wide", pieces), columns=33)
    terminal.wait_for_prompt()
    terminal.enter("Write.")
    terminal.wait_for_prompt()
    words = " ".join(between(terminal, "Write.")).split()
    accented = [word.replace("e\u0301", "é") for word in words]
    expected = "".join(pieces).replace("e\u0301", "é").split()
    assert accented == expected
    assert not any(line[:4].isdigit() for line in terminal.screen.wrapped)
    terminal.quit()


def test_escape_sequences_of_an_answer_never_reach_the_terminal(
    chat: Start, tmp_path: Path
) -> None:
    pieces = ["before ", "\x1b]0;evil\x07", "\x1b[2Jgone", "\x9b31m", "\x1b[", "5A\x08\r", " after"]
    terminal = chat(model=scripted_model(tmp_path / "evil", pieces))
    terminal.wait_for_prompt()
    terminal.enter("Write.")
    terminal.wait_for_prompt()
    for sequence in (b"\x1b]0;", b"\x1b[2J", b"\x1b[5A", "\x9b".encode(), b"\x9b31m"):
        assert sequence not in terminal.raw
    [line] = [line for line in terminal.lines if "before" in line]
    assert "evil" in line and "gone" in line and "after" in line
    terminal.quit()


def test_ctrl_c_while_the_prompt_is_read_leaves_no_trace(chat: Start, slow: Path) -> None:
    """Other ports leave half of the cancelled prompt in the cache: the next answer is wrong."""
    terminal = chat(NUMBER_42, model=slow)
    terminal.wait_for("positions")
    long = "word " * 800
    terminal.paste(long)
    terminal.wait_for(lambda: terminal.text.count("word") > 100, "the pasted text")
    terminal.press("enter")
    terminal.wait_for("…")
    terminal.press("ctrl-c")
    terminal.wait_for("stopped")
    assert "to first token" not in terminal.text
    terminal.wait_for(lambda: terminal.typed.rstrip().endswith("word"), "the question again")
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    session = fv.load("demo").chat()
    assert (
        terminal.ask("What number is this?")[0]
        == session.ask("What number is this?", [NUMBER_42]).text
    )
    assert terminal.ask("Describe the image.")[0] == session.ask("Describe the image.").text
    terminal.quit()


def test_ctrl_c_in_an_answer_keeps_what_there_is_and_goes_on(
    chat: Start, tireless: Path, tmp_path: Path
) -> None:
    terminal = chat(NUMBER_42, "--session", tmp_path / "kept.chat", model=tireless)
    terminal.wait_for_prompt()
    terminal.enter("What number is this?")
    terminal.wait_for("colours")
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    seen = " ".join(between(terminal, "What number is this?"))
    terminal.ask("/set max_tokens 30")
    second = " ".join(terminal.ask("Describe the image.")[:-2])
    terminal.quit()

    engine = fv.load(tireless)
    past = engine.resume(tmp_path / "kept.chat")
    partial = "".join(map(str, past.messages[2].content))
    assert seen.split() == partial.split()
    past.rewind()
    answer = past.ask("Describe the image.", max_tokens=30).text
    assert second.split() == answer.split()


def test_after_a_stopped_answer_is_taken_back_all_is_as_new(chat: Start, tireless: Path) -> None:
    terminal = chat(NUMBER_42, model=tireless)
    terminal.wait_for_prompt()
    terminal.enter("What number is this?")
    terminal.wait_for("colours")
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    terminal.ask("/undo")
    terminal.ask("/set max_tokens 30")
    answer = " ".join(terminal.ask("Hello")[:-2])
    fresh = fv.load(tireless).chat().ask("Hello", max_tokens=30)
    assert answer.split() == fresh.text.split()
    terminal.quit()


def test_ctrl_c_at_the_prompt_clears_the_line_and_leaves_at_the_second_on_an_empty_one(
    chat: Start,
) -> None:
    terminal = chat()
    terminal.wait_for_prompt()
    terminal.type("never asked")
    terminal.wait_for("never asked")
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    assert "again" not in terminal.text  # there was text: this one does not count
    terminal.press("ctrl-c")
    terminal.wait_for("Ctrl-C again to leave")
    terminal.wait_for_prompt()
    terminal.ask("What number is this?")  # something in between: the count begins anew
    terminal.press("ctrl-c")
    terminal.wait_for(lambda: terminal.text.count("Ctrl-C again to leave") == 2, "the hint")
    terminal.wait_for_prompt()
    terminal.press("ctrl-c")
    assert terminal.wait_for_end() == 130
    terminal.assert_restored()


def test_ctrl_d_on_an_empty_line_leaves(chat: Start) -> None:
    terminal = chat()
    terminal.wait_for_prompt()
    terminal.press("ctrl-d")
    assert terminal.wait_for_end() == 0
    terminal.assert_restored()


def test_what_is_typed_while_an_answer_is_written_is_the_next_question(
    chat: Start, counting: Path
) -> None:
    terminal = chat("--max-tokens", 200, model=counting, rows=40)
    terminal.wait_for_prompt()
    terminal.enter("Count.")
    terminal.wait_for("010 ")
    terminal.type("And again?\r")
    terminal.wait_for(lambda: terminal.text.count("to first token") == 2, "two answers")
    terminal.wait_for_prompt()
    assert_counts(between(terminal, "Count."), least=200)  # no echo in the midst of it
    assert_counts(between(terminal, "And again?"), least=200)
    terminal.quit()


def test_a_question_asked_while_the_model_loads_is_answered(
    chat: Start, held_back: tuple[Path, Callable[[], None]]
) -> None:
    folder, go_on = held_back
    terminal = chat(NUMBER_42, model=folder)
    terminal.wait_for_prompt()
    terminal.wait_for(lambda: terminal.status.startswith("loading "), "the status line")
    terminal.enter("What number is this?")
    terminal.wait_for("Ctrl-C: not now")
    go_on()
    terminal.wait_for_prompt()
    assert between(terminal, "What number is this?") == ["42."]
    terminal.wait_for(lambda: "positions" in terminal.status, "facts in the status line")
    terminal.quit()


def test_a_model_that_cannot_be_loaded_ends_in_one_line_and_says_what_was_typed(
    chat: Start, held_back: tuple[Path, Callable[[], None]]
) -> None:
    folder, _ = held_back
    terminal = chat(model=folder)
    terminal.wait_for_prompt()
    terminal.enter("What number is this?")
    terminal.wait_for("Ctrl-C: not now")
    (folder / "config.json").write_text("{")
    assert terminal.wait_for_end() == 2
    assert "not asked: What number is this?" in terminal.text
    assert terminal.text.count("fastvlm: error: ") == 1 and "Traceback" not in terminal.text
    terminal.assert_restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
@pytest.mark.parametrize("moment", ["prompt", "answer", "loading"])
def test_a_signal_that_ends_the_chat_leaves_the_terminal_as_it_was(
    chat: Start,
    counting: Path,
    held_back: tuple[Path, Callable[[], None]],
    moment: str,
    number: signal.Signals,
) -> None:
    model = held_back[0] if moment == "loading" else counting
    terminal = chat("--max-tokens", 8000, model=model)
    terminal.wait_for_prompt()
    if moment != "prompt":
        terminal.enter("Count.")
        terminal.wait_for("010 " if moment == "answer" else "not now")
    terminal.signal(number)
    assert terminal.wait_for_end() in (128 + number, -number)
    terminal.assert_restored()
    assert "Traceback" not in terminal.text
