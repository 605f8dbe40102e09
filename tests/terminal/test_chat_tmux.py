"""`fastvlm chat` inside tmux, a terminal that reflows its lines and keeps its own scrollback."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.command import COMMAND
from tests.terminal.screen import LIMIT_S, PROMPT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]


class Tmux:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path, command: list[str], *, columns: int, rows: int) -> None:
        self._socket = str(folder / "tmux")
        self._env = environment(folder)
        self._ask(
            "-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows),
            "-c", str(folder), "PS1='shell$ ' bash --norc --noprofile -i",
        )  # fmt: skip
        self.wait_for("shell$")
        self.type(f"seq -f 'before %g' 40; {shlex.join(command)}; echo left with $?")
        self.press("Enter")

    def _ask(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *words],
            env=self._env, capture_output=True, text=True, timeout=LIMIT_S, check=True,
        )  # fmt: skip
        return done.stdout

    def type(self, text: str) -> None:
        self._ask("send-keys", "-l", text)

    def press(self, key: str) -> None:
        self._ask("send-keys", key)

    def resize(self, columns: int, rows: int) -> None:
        self._ask("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def text(self) -> str:
        """Scrollback and screen; lines that tmux wrapped are joined again."""
        return self._ask("capture-pane", "-p", "-J", "-S", "-")

    def wait_for(self, condition: str | Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            if condition in self.text if isinstance(condition, str) else condition():
                return
        raise AssertionError(f"{condition}: no sign of it; the window:\n{self.text}")

    def wait_for_prompt(self) -> None:
        self.wait_for(lambda: PROMPT.fullmatch(self._line_of_cursor()) is not None)

    def _line_of_cursor(self) -> str:
        row = self._ask("display-message", "-p", "#{cursor_y}").strip()
        return self._ask("capture-pane", "-p", "-S", row, "-E", row).strip()

    def end(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], env=self._env, check=False)


@pytest.fixture
def window(home: Path, counting: Path) -> Iterator[Tmux]:
    """A chat with the counting model in a window of 60 by 15."""
    words = ["chat", "--model", str(counting), "--max-tokens", "8000"]
    tmux = Tmux(home, [*COMMAND, *words], columns=60, rows=15)
    try:
        tmux.wait_for_prompt()
        yield tmux
    finally:
        tmux.end()


def counted(tmux: Tmux) -> list[int]:
    return [int(number) for number in re.findall(r"\bn(\d{3})\b", tmux.text)]


def test_a_long_answer_is_whole_in_tmux_scrollback(window: Tmux) -> None:
    window.type("Count.")
    window.press("Enter")
    window.wait_for("n299")
    window.press("C-c")
    window.wait_for_prompt()
    numbers = counted(window)
    assert len(numbers) >= 300
    assert numbers == [number % 300 for number in range(len(numbers))]
    before = re.findall(r"^before (\d+)$", window.text, re.MULTILINE)
    assert before == [str(number) for number in range(1, 41)]
    window.type("/quit")
    window.press("Enter")
    window.wait_for("left with 0")


def test_tmux_may_reflow_in_the_middle_of_an_answer(window: Tmux) -> None:
    window.type("Count.")
    window.press("Enter")
    for columns, rows, seen in ((42, 15, "n020"), (80, 10, "n050"), (50, 20, "n080")):
        window.wait_for(seen)
        window.resize(columns, rows)
    window.wait_for("n130")
    window.press("C-c")
    window.wait_for_prompt()
    numbers = counted(window)
    assert all(after <= before + 1 for before, after in pairwise(numbers)), numbers
    # What a narrower window wraps anew is left as it is: of each, two lines may come twice.
    assert len(numbers) - len(set(numbers)) <= 2 * 12 + 2 * 16
    window.type("/quit")
    window.press("Enter")
    window.wait_for("left with 0")


def test_the_chat_can_be_stopped_by_its_shell_and_go_on(window: Tmux) -> None:
    window.press("C-z")
    window.wait_for("Stopped")
    window.type("stty -a | grep -o -- '-*icanon' ; echo $((6 * 7))")
    window.press("Enter")
    window.wait_for(lambda: re.search(r"^icanon\n42$", window.text, re.MULTILINE) is not None)
    window.type("fg")
    window.press("Enter")
    window.wait_for_prompt()
    window.type("Count.")
    window.press("Enter")
    window.wait_for("n010")
    window.press("C-c")
    window.wait_for_prompt()


def test_tmux_may_reflow_while_a_question_is_typed(window: Tmux) -> None:
    words = [f"word{number}" for number in range(12)]
    window.type(" ".join(words[:6]))
    window.wait_for("word5")
    window.resize(34, 12)
    window.type(" " + " ".join(words[6:]))
    window.wait_for("word11")
    window.resize(90, 15)
    window.wait_for(lambda: " ".join(words) in window.text)
    window.press("Enter")
    window.wait_for("n010")
    window.press("C-c")
    window.wait_for_prompt()
