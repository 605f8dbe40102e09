"""The chat in lines on a dumb terminal: a prompt, errors that end nothing, Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import COMMAND
from tests.terminal.chat_models import PICTURES, scripted_model

pytestmark = pytest.mark.slow  # many small ones: left to `make test`


class Dumb:
    """`fastvlm chat` on a pseudo-terminal that calls itself dumb."""

    def __init__(self, *words: object) -> None:
        self.fd, theirs = pty.openpty()
        # A session of its own, with this terminal, so that Ctrl-C typed there is its SIGINT.
        take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        self.process = subprocess.Popen(
            [sys.executable, "-c", take + COMMAND[2], "chat", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def until(self, wanted: str, *, after: int = 0) -> str:
        while wanted not in self.seen[after:]:
            assert select.select([self.fd], [], [], 120)[0], f"no {wanted!r} in: {self.seen}"
            try:
                chunk = os.read(self.fd, 4096)
            except OSError:
                chunk = b""
            assert chunk, f"ended before {wanted!r}: {self.seen}"
            self.seen += chunk.decode(errors="replace").replace("\r\n", "\n")
        return self.seen

    def type(self, keys: str) -> int:
        os.write(self.fd, keys.encode())
        return len(self.seen)

    def end(self) -> int:
        while select.select([self.fd], [], [], 60)[0]:
            try:
                chunk = os.read(self.fd, 4096)
            except OSError:
                chunk = b""
            if not chunk:
                return self.process.wait(60)
            self.seen += chunk.decode(errors="replace")
        raise AssertionError(f"it does not end: {self.seen}")


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    return scripted_model(tmp_path / "counting", [f"n{n:03d} " for n in range(300)], again=True)


@pytest.fixture
def dumb() -> Iterator[list[Dumb]]:
    started: list[Dumb] = []
    yield started
    for chat in started:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.fd)


def start(dumb: list[Dumb], *words: object) -> Dumb:
    dumb.append(Dumb(*words))
    dumb[-1].until("> ")
    return dumb[-1]


def test_pictures_errors_and_answers_are_lines(dumb: list[Dumb]) -> None:
    chat = start(dumb, PICTURES / "number_42.png", "--model", "demo")
    assert "[1] number_42.png" in chat.seen
    at = chat.type("./missing.png What?\n")
    chat.until("error: ./missing.png: no such file\n> ", after=at)
    at = chat.type("What number is this?\n")
    chat.until("positions reused\n> ", after=at)
    at = chat.type("/edit\n")
    chat.until("last question was: What number is this?; /edit TEXT asks another\n> ", after=at)
    at = chat.type("/clear\n")
    chat.until("the same /clear again gives it up\n> ", after=at)
    chat.type("\x04")
    assert chat.end() == 0
    assert "\x1b" not in chat.seen


def test_a_conversation_that_is_gone_on_with_says_what_there_is(
    dumb: list[Dumb], tmp_path: Path
) -> None:
    words = (PICTURES / "number_42.png", "--model", "demo", "--session", tmp_path / "talk")
    first = start(dumb, *words)
    first.type("What is this?\n\x04")
    assert first.end() == 0 and "talk: " not in first.seen
    second = start(dumb, *words[1:])
    second.type("/edit\n")
    second.until("talk: 1 turn, 1 picture; last question: What is this?\n")
    second.type("\x04")
    assert second.end() == 0


def test_ctrl_c_stops_the_answer_and_at_the_prompt_leaves(dumb: list[Dumb], counting: Path) -> None:
    chat = start(dumb, "--model", counting, "--max-tokens", 8000)
    at = chat.type("Count.\n")
    chat.until("n020", after=at)
    at = chat.type("\x03")
    chat.until("stopped; /undo takes it back, /retry asks again\n> ", after=at)
    at = chat.type("/undo\n")
    chat.until("took back 'Count.'\n> ", after=at)
    chat.type("\x03")
    assert chat.end() == 130
    assert "Traceback" not in chat.seen


def test_an_answer_cannot_command_the_terminal(dumb: list[Dumb], tmp_path: Path) -> None:
    model = scripted_model(tmp_path / "evil", ["red \x1b[31m", "and \x07", "\x1b]0;title\x07"])
    chat = start(dumb, "--model", model)
    chat.type("hi\n")
    chat.until("positions reused\n> ")
    assert "red �[31m" in chat.seen and "\x1b" not in chat.seen and "\x07" not in chat.seen
    chat.process.send_signal(signal.SIGINT)
    assert chat.end() == 130
