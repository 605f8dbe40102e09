"""`fastvlm chat` in a terminal: a real pseudo-terminal outside, pyte's screen to look at.

Knows keys, sizes, what a terminal answers and what it keeps of lines that left its top. Nothing of
the developer's (home, history, colours, chosen model) reaches the chat. Knows nothing of what the
chat says. Waiting is for a condition, never for a time: the limit is for a test that fails.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte
from pyte.modes import DECAWM
from wcwidth import wcwidth

LIMIT_S = 60.0
CHAT = (
    # The controlling terminal is taken before anything else runs, as a shell's child has it.
    "import fcntl, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); "
    "from fastvlm_mlx.cli.main import main; sys.exit(main())"
)
PROMPT = re.compile(r"(\[\d+ pictures?\] )?>")
_KEYS = {
    "enter": "\r", "alt-enter": "\x1b\r", "tab": "\t", "escape": "\x1b", "backspace": "\x7f",
    "up": "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D",
}  # fmt: skip
_PASSED_ON = ("PATH", "HF_HOME", "HF_HUB_OFFLINE", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
# pyte shows what it does not know: kitty's pictures are taken out of what it is given.
_APC = re.compile(rb"\x1b_[^\x1b]*\x1b\\")
_APC_BEGUN = re.compile(rb"\x1b(_[^\x1b]*\x1b?)?\Z")


def environment(home: Path, changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return what a chat may know of this machine; None in `changes` takes a variable away."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    values: dict[str, str | None] = {
        **kept,
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        **(changes or {}),
    }
    return {name: value for name, value in values.items() if value is not None}


class Screen(pyte.HistoryScreen):
    """pyte's screen, with an answer for who asks where the cursor is, and a real one's resize."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=20_000, ratio=0.5)
        self._answer = answer
        self.wrapped: list[str] = []

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def draw(self, data: str) -> None:
        """Draw text; note each line that the terminal had to wrap by itself.

        pyte gives up on the rest of a text at a character without width that is no accent.
        """
        for char in data:
            if self.cursor.x == self.columns and wcwidth(char) and DECAWM in self.mode:
                self.wrapped.append(_text(self.buffer[self.cursor.y]))
            super().draw(char)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Make the window larger or smaller as xterm does: what leaves at the top is kept."""
        surplus = self.cursor.y + 1 - (lines or self.lines)
        for _ in range(surplus):
            self.history.top.append(self.buffer[0])
            for row in range(self.lines - 1):
                self.buffer[row] = self.buffer[row + 1]
            self.buffer.pop(self.lines - 1, None)
            self.cursor.y -= 1
        for row in range(lines or self.lines, self.lines):
            self.buffer.pop(row, None)
        if lines and lines < self.lines:
            self.lines = lines
        super().resize(lines, columns)
        self.cursor.x = min(self.cursor.x, self.columns - 1)

    @property
    def scrollback(self) -> list[str]:
        """The lines that left at the top, oldest first."""
        return [_text(line) for line in self.history.top]

    @property
    def rows(self) -> list[str]:
        """The lines that are to be seen, blanks at their ends removed."""
        return [_text(self.buffer[row]) for row in range(self.lines)]


def _text(line: Mapping[int, Any]) -> str:
    """Return a line's characters; a wide one's second cell is empty."""
    width = max(line, default=-1) + 1
    return "".join(line[i].data if i in line else " " for i in range(width)).rstrip()


class Chat:
    """A running `fastvlm chat`. Leave the context, and nothing of it is left."""

    def __init__(
        self,
        *arguments: object,
        home: Path,
        columns: int = 80,
        rows: int = 24,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        code: str = CHAT,
        **streams: Any,
    ) -> None:
        """`code` runs the chat; `streams` (stdin, stdout) are the terminal unless given."""
        self._master, self._slave = os.openpty()
        self.raw = b""
        self._replies = b""
        self.screen = Screen(columns, rows, self._reply)
        self._stream = pyte.ByteStream(self.screen)
        self._held = b""
        self._set_size(columns, rows)
        self.modes = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", *map(str, arguments)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), self._slave) | streams,
            env=environment(home, env), cwd=cwd or home, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def keeps_keys(self) -> bool:
        """Whether the chat has taken the terminal, so that Enter waits as it was typed."""
        return not termios.tcgetattr(self._slave)[0] & termios.ICRNL

    # ---- what the user does

    def type(self, text: str) -> None:
        self._send(text.encode())

    def paste(self, text: str) -> None:
        """Paste as a terminal does where the program asked to be told; line ends are returns."""
        pasted = text.replace("\n", "\r").encode()
        self._send(b"\x1b[200~" + pasted + b"\x1b[201~")

    def press(self, *keys: str) -> None:
        """Press "enter", "up", …, or "ctrl-c" for any letter."""
        for key in keys:
            control = re.fullmatch(r"ctrl-(.)", key)
            self.type(chr(ord(control[1].upper()) - 64) if control else _KEYS[key])

    def enter(self, line: str) -> None:
        """Type a line, see it before the cursor, and send it."""
        self.type(line)
        self.wait_for(lambda: self.is_typed(line), f"{line} in the prompt")
        self.press("enter")

    def ask(self, question: str) -> list[str]:
        """Ask, wait for the next empty prompt, and return the lines between the two."""
        self.enter(question)
        self.wait_for_prompt()
        above = self.lines[: len(self.screen.scrollback) + self.screen.cursor.y]
        asked = max(i for i, line in enumerate(above) if line.endswith(f"> {question}"))
        return above[asked + 1 :]

    def resize(self, columns: int, rows: int) -> None:
        """Change the window's size; the program hears of it from the system."""
        self._read(0)
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    # ---- what the user sees

    @property
    def rows(self) -> list[str]:
        return self.screen.rows

    @property
    def lines(self) -> list[str]:
        """The scrollback and the screen."""
        return [*self.screen.scrollback, *self.screen.rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def typed(self) -> str:
        """The line the cursor is in."""
        return self.screen.rows[self.screen.cursor.y]

    @property
    def status(self) -> str:
        """The lowest line with anything in it."""
        return next((row for row in reversed(self.rows) if row), "")

    @property
    def at_prompt(self) -> bool:
        """Whether the cursor is in an empty prompt."""
        return PROMPT.fullmatch(self.typed) is not None

    def is_typed(self, line: str) -> bool:
        """Whether the text ends at the cursor, however it is wrapped."""
        above = "".join(self.rows[: self.screen.cursor.y + 1])
        return "".join(above.split()).endswith("".join(line.split()))

    def wait_for(self, what: str | Callable[[], bool], name: str = "") -> None:
        """Wait until a text is to be seen or was, or until a condition holds."""
        condition = (lambda: what in self.text) if isinstance(what, str) else what
        for _ in self._waiting():
            if condition():
                return
        why = "ended" if self.process.poll() is not None else f"no sign in {LIMIT_S:.0f} s"
        raise AssertionError(f"{name or what}: {why}; the screen:\n{self.text}")

    def wait_for_prompt(self) -> None:
        self.wait_for(lambda: self.at_prompt, "an empty prompt")

    def wait_for_end(self) -> int:
        """Wait until the process has ended; return its exit code, negative for a signal."""
        self.wait_for(lambda: self.process.poll() is not None, "the end")
        self._read(0)
        return self.process.returncode

    def quit(self) -> None:
        """Leave as a user does, and see that it leaves everything as it was."""
        self.enter("/quit")
        assert self.wait_for_end() == 0, self.text
        self.assert_restored()

    def assert_restored(self) -> None:
        """The terminal is as before: its modes, the cursor to be seen, no bracketed paste."""
        assert termios.tcgetattr(self._slave) == self.modes
        assert not self.screen.cursor.hidden
        for on, off in ((b"\x1b[?2004h", b"\x1b[?2004l"), (b"\x1b[?2026h", b"\x1b[?2026l")):
            assert self.raw.rfind(on) <= self.raw.rfind(off)
        assert not self.screen.cursor.attrs.bold and self.screen.cursor.attrs.fg == "default"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    # ---- the pseudo-terminal

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _waiting(self) -> Iterator[None]:
        """Yield after each piece of output, once more after the process's end, until the limit."""
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            while self._read(0.0 if ended else 0.02):
                if not ended:
                    yield
            yield
            if ended:
                return

    def _read(self, timeout_s: float) -> bool:
        """Take in what has been written so far; return whether there was anything."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        new = os.read(self._master, 65536)
        self.raw += new
        whole = _APC.sub(b"", self._held + new)
        begun = _APC_BEGUN.search(whole)
        end = begun.start() if begun else len(whole)
        self._held = whole[end:]
        self._stream.feed(whole[:end])
        replies, self._replies = self._replies, b""
        os.write(self._master, replies)
        return bool(new)

    def _reply(self, data: str) -> None:
        self._replies += data.encode()

    def _send(self, data: bytes) -> None:
        """Write all of it, and read meanwhile: who waits for its own reader reads nothing."""
        while data:
            readable, writable, _ = select.select([self._master], [self._master], [], LIMIT_S)
            if not (readable or writable):
                raise AssertionError(f"it reads nothing; the screen:\n{self.text}")
            if readable:
                self._read(0)
            elif writable:
                data = data[os.write(self._master, data[:256]) :]
