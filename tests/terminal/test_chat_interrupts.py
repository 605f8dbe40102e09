"""Ctrl-C at moments that are too short to hit by hand: nothing typed or answered is lost.

The chat runs as always, with SIGINT raised once as one of its functions begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.terminal.screen import Chat

pytestmark = pytest.mark.slow
Start = Callable[..., Chat]

_TERMINAL = "fastvlm_mlx.terminal"
_RAISING = """
import fcntl, importlib, os, signal, sys, termios
fcntl.ioctl(2, termios.TIOCSCTTY, 0)

def interrupt(module, owner, name, call, after):
    holder = getattr(importlib.import_module(module), owner)
    real, calls = getattr(holder, name), []
    def wrapped(*args, **how):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGINT)
        value = real(*args, **how)
        if len(calls) == call and after:
            os.kill(os.getpid(), signal.SIGINT)
        return value
    setattr(holder, name, wrapped)

interrupt({place})
from fastvlm_mlx.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "place",
    [
        (f"{_TERMINAL}.line_input", "LineInput", "read", 2, False),
        (f"{_TERMINAL}.conversation", "Conversation", "settle", 1, False),
        (f"{_TERMINAL}.conversation", "Conversation", "settle", 1, True),
        (f"{_TERMINAL}.markdown_stream", "MarkdownStream", "finish", 1, False),
        (f"{_TERMINAL}.app", "App", "_show_notes", 3, False),
    ],
    ids=lambda place: f"{place[2]}-{'after' if place[4] else 'before'}",
)
def test_a_late_ctrl_c_stops_nothing_that_has_ended(chat: Start, place: tuple) -> None:
    """It left the chat, or said "stopped" of an answer that was whole and kept."""
    code = _RAISING.replace("{place}", ", ".join(map(repr, place)))
    terminal = chat(code=code)
    terminal.wait_for_prompt()
    answer = terminal.ask("Hello")
    assert "stopped" not in answer
    terminal.wait_for_prompt()
    terminal.type("typed after")
    terminal.wait_for(lambda: terminal.is_typed("typed after"))
    terminal.press("ctrl-c")
    terminal.quit()


def test_ctrl_c_right_after_enter_offers_the_question_again(chat: Start) -> None:
    """The chat was left, and the question lost."""
    place = (f"{_TERMINAL}.line_input", "LineInput", "_remember", 1, False)
    terminal = chat(code=_RAISING.replace("{place}", ", ".join(map(repr, place))))
    terminal.wait_for_prompt()
    terminal.type("Hello")
    terminal.press("enter")
    terminal.wait_for("stopped")
    terminal.wait_for(lambda: terminal.is_typed("Hello"))
    terminal.press("ctrl-c")
    terminal.quit()


def test_a_question_sent_before_the_prompt_is_there_is_asked(chat: Start) -> None:
    """Its Enter came as Ctrl-J, a new line, since the terminal was taken only with the prompt."""
    terminal = chat()
    terminal.wait_for(lambda: terminal.keeps_keys)
    assert not terminal.text.strip()
    terminal.type("Hello\r")
    terminal.wait_for("to first token")
    terminal.wait_for_prompt()
    terminal.quit()


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_before_the_prompt_is_there_gives_the_terminal_back(
    chat: Start, number: str, code: int
) -> None:
    place = ("fastvlm_mlx.terminal.conversation", "Conversation", "__init__", 1, False)
    raising = _RAISING.replace("SIGINT", number).replace("{place}", ", ".join(map(repr, place)))
    terminal = chat(code=raising)
    assert terminal.wait_for_end() == code
    terminal.assert_restored()
