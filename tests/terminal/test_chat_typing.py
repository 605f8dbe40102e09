"""`fastvlm chat` in a pseudo-terminal: history, what is pasted and dragged, the window's size."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

import fastvlm_mlx as fv
from tests.terminal.chat_models import PICTURES
from tests.terminal.screen import Chat

pytestmark = pytest.mark.slow
Start = Callable[..., Chat]

NUMBER_42 = PICTURES / "number_42.png"


def questions(file: Path) -> list[str]:
    """The questions in a session file, as they were asked."""
    messages = fv.load("demo").resume(file).messages
    return [
        "".join(part for part in message.content if isinstance(part, str))
        for message in messages
        if message.role == "user"
    ]


def test_history_reaches_over_two_runs(chat: Start, home: Path) -> None:
    first = chat()
    first.wait_for_prompt()
    first.ask("What number is this?")
    first.ask("Describe the image.")
    first.quit()
    second = chat()
    second.wait_for_prompt()
    for expected in ("/quit", "Describe the image.", "What number is this?"):
        second.press("up")
        second.wait_for(lambda text=expected: second.typed == f"> {text}", expected)
    second.press("ctrl-c")
    second.wait_for_prompt()
    second.press("ctrl-r")
    second.type("numb")
    second.wait_for(lambda: "What number is this?" in second.text.split("> ")[-1], "what is found")
    second.press("enter")
    second.wait_for(lambda: second.typed.endswith("> What number is this?"), "it in the prompt")
    second.press("enter")
    second.wait_for("to first token")
    second.wait_for_prompt()
    second.quit()
    [file] = [path for path in home.rglob("history*") if path.is_file()]
    assert file.stat().st_mode & 0o777 == 0o600


def test_pasted_lines_are_one_question(chat: Start, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    terminal = chat("--session", file)
    terminal.wait_for_prompt()
    terminal.paste("What number\nis this?\n/quit\n")
    terminal.wait_for("/quit")
    assert terminal.process.poll() is None
    terminal.press("enter")
    terminal.wait_for("to first token")
    terminal.wait_for_prompt()
    terminal.quit()
    [question] = questions(file)
    assert question.rstrip() == "What number\nis this?\n/quit"


def test_a_line_is_continued_by_alt_enter_ctrl_j_and_a_backslash(
    chat: Start, tmp_path: Path
) -> None:
    file = tmp_path / "a.chat"
    terminal = chat("--session", file)
    terminal.wait_for_prompt()
    terminal.type("one\x1b\rtwo\nthree\\\rfour")
    terminal.wait_for("four")
    terminal.press("enter")
    terminal.wait_for("to first token")
    terminal.wait_for_prompt()
    terminal.quit()
    assert questions(file) == ["one\ntwo\nthree\nfour"]


def picture(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.open(NUMBER_42).save(path)
    return path


def escaped(path: Path) -> str:
    return re.sub(r"([ '()&])", r"\\\1", str(path))


def test_dragged_paths_are_pictures_however_the_terminal_writes_them(
    chat: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "Fotos & Bilder"
    names = ["mit Leerzeichen.png", "Größe 漢字 (1).png", "it's.png", "e\u0301te\u0301.png"]
    paths = [picture(folder / name) for name in names]
    terminal = chat("--no-preview", rows=50)
    terminal.wait_for_prompt()
    written = [
        escaped(paths[0]),
        shlex.quote(str(paths[1])) + " ",
        f'"{paths[2]}"',
        f"file://{quote(str(paths[3]))}",
        " ".join([shlex.quote(str(paths[0])), escaped(paths[1])]) + " ",
    ]
    count = 0
    for text in written:
        terminal.paste(text)
        terminal.wait_for(lambda: not terminal.at_prompt, "the path")
        terminal.press("enter")
        count += 2 if text is written[-1] else 1
        terminal.wait_for(lambda n=count: terminal.typed == f"[{n} picture{'s'[: n > 1]}] >", text)
    listed = "\n".join(terminal.ask("/images"))
    for name in ["mit Leerzeichen.png", "Größe 漢字 (1).png", "it's.png", "été.png"]:
        assert name in listed
    assert "error" not in terminal.text
    terminal.quit()


def test_a_path_and_a_question_on_one_line(chat: Start, tmp_path: Path) -> None:
    path = picture(tmp_path / "Fotos" / "eine Zahl.png")
    file = tmp_path / "a.chat"
    terminal = chat("--session", file)
    terminal.wait_for_prompt()
    terminal.paste(f"{escaped(path)} What number is this?")
    terminal.wait_for("this?")
    terminal.press("enter")
    terminal.wait_for("42.")
    terminal.wait_for_prompt()
    terminal.quit()
    assert [question.strip() for question in questions(file)] == ["What number is this?"]


def unreadable_pictures(folder: Path) -> dict[str, str]:
    """Files that are no pictures, and a word of what has to be said of each."""
    folder.mkdir()
    (folder / "text.jpg").write_text("no picture")
    (folder / "cut.png").write_bytes(NUMBER_42.read_bytes()[:200])
    (folder / "empty.png").touch()
    expected = {"gone.png": "no such file", "text.jpg": "", "cut.png": "", "empty.png": "empty"}
    if os.geteuid():
        picture(folder / "secret.png").chmod(0)
        expected["secret.png"] = "ermission"
    return expected


def test_a_picture_that_cannot_be_read_is_one_line_and_the_question_stays(
    chat: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    terminal = chat(columns=200, rows=60)
    terminal.wait_for_prompt()
    for name, words in unreadable_pictures(folder).items():
        typed = f"{folder / name} What is this?"
        terminal.enter(typed)
        terminal.wait_for(lambda name=name: f"error: {folder / name}" in terminal.text, name)
        # What was typed is there again, to be put right.
        terminal.wait_for(lambda text=typed: terminal.is_typed(text), "the question again")
        [line] = [line for line in terminal.lines if line.startswith(f"error: {folder / name}")]
        assert words in line
        terminal.press("ctrl-c")
        terminal.wait_for_prompt()
    assert "Traceback" not in terminal.text and "to first token" not in terminal.text
    terminal.quit()


def test_a_resize_while_typing_loses_nothing(chat: Start, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    terminal = chat("--session", file, columns=100)
    terminal.wait_for_prompt()
    words = [f"word{number}" for number in range(30)]
    terminal.type(" ".join(words[:10]))
    terminal.wait_for("word9")
    for columns, rows, first in ((44, 20, 10), (90, 12, 20), (60, 40, 30)):
        terminal.resize(columns, rows)
        terminal.type("".join(f" {word}" for word in words[first : first + 10]))
        shown = " ".join(words[: first + 10])
        terminal.wait_for(lambda text=shown: terminal.is_typed(text), "what was typed")
        terminal.wait_for(lambda: "positions" in terminal.status, "the status line")
        assert max(map(len, terminal.rows)) <= columns
    terminal.press("enter")
    terminal.wait_for("to first token")
    terminal.wait_for_prompt()
    terminal.quit()
    assert questions(file) == [" ".join(words)]


def test_a_resize_in_the_middle_of_an_answer_loses_and_doubles_nothing(
    chat: Start, counting: Path
) -> None:
    terminal = chat("--max-tokens", 8000, model=counting, columns=60)
    terminal.wait_for_prompt()
    terminal.enter("Count.")
    for columns, rows, word in ((80, 24, "n010"), (80, 12, "n040"), (100, 30, "n080")):
        terminal.wait_for(word)
        terminal.resize(columns, rows)
    terminal.wait_for("n150")
    terminal.press("ctrl-c")
    terminal.wait_for_prompt()
    numbers = [int(number) for number in re.findall(r"\bn(\d{3})\b", terminal.text)]
    assert numbers == list(range(len(numbers)))
    terminal.quit()


def test_tab_completes_commands_settings_and_paths(chat: Start, tmp_path: Path) -> None:
    picture(tmp_path / "Fotos" / "eine Zahl.png")
    terminal = chat("--no-preview", cwd=tmp_path)
    terminal.wait_for_prompt()
    for start, whole in (
        ("/he\t", "> /help"),
        ("/set tempe\t", "> /set temperature"),
        ("/image ./Fo\t", "> /image ./Fotos/"),
        ("/image ./Fotos/ei\t", r"> /image ./Fotos/eine\ Zahl.png"),
    ):
        terminal.type(start)
        terminal.wait_for(lambda text=whole: terminal.typed == text, whole)
        if not whole.endswith("png"):
            terminal.press("ctrl-c")
            terminal.wait_for_prompt()
    terminal.press("enter")
    terminal.wait_for(lambda: terminal.typed == "[1 picture] >", "the picture")
    terminal.quit()
