"""`fastvlm chat` in terminals of every kind: narrow, without colour, dumb, half a pipe."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import spawn, wait
from tests.terminal.chat_models import PICTURES
from tests.terminal.screen import Chat

Start = Callable[..., Chat]

NUMBER_42 = PICTURES / "number_42.png"
COLOUR = re.compile(rb"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def conversation(chat: Chat) -> None:
    chat.wait_for_prompt()
    chat.ask("What number is this?")
    chat.ask("/stats")
    chat.enter("/nosuch")
    chat.wait_for("there is no command /nosuch")
    chat.wait_for_prompt()
    chat.ask("/help")


@pytest.mark.slow
def test_40_columns_are_enough(chat: Start) -> None:
    terminal = chat(NUMBER_42, columns=40)
    conversation(terminal)
    terminal.ask("/set")
    terminal.wait_for(lambda: "positions" in terminal.status, "the status line")
    # The terminal had to break no line by itself: that would be in the midst of words.
    assert terminal.screen.wrapped == []
    terminal.quit()


@pytest.mark.slow
def test_20_columns_and_6_rows_do_not_break_it(chat: Start) -> None:
    terminal = chat(NUMBER_42, columns=20, rows=6)
    terminal.wait_for_prompt()
    terminal.enter("What number is this?")
    terminal.wait_for("42.")
    terminal.wait_for_prompt()
    terminal.quit()


@pytest.mark.slow
def test_the_status_line_has_room_for_more_than_a_models_path(chat: Start, counting: Path) -> None:
    """Once it showed all of a folder's path, and nothing else."""
    terminal = chat(model=str(counting))
    terminal.wait_for(lambda: terminal.status.startswith("counting · float32 · "), "its name")
    assert "positions" in terminal.status
    terminal.wait_for_prompt()
    terminal.quit()


@pytest.mark.slow
def test_no_color_means_none(chat: Start) -> None:
    terminal = chat(NUMBER_42, env={"NO_COLOR": "1"})
    conversation(terminal)
    assert not COLOUR.search(terminal.raw)
    assert "▀" not in terminal.text
    terminal.quit()


@pytest.mark.slow
def test_colours_are_used_where_there_are_any(chat: Start) -> None:
    terminal = chat(NUMBER_42)
    conversation(terminal)
    assert COLOUR.search(terminal.raw)
    terminal.quit()


def test_a_dumb_terminal_gets_lines_only(chat: Start) -> None:
    terminal = chat(NUMBER_42, env={"TERM": "dumb"})
    terminal.wait_for_prompt()
    assert "42." in terminal.ask("What number is this?")
    terminal.press("ctrl-c")
    assert terminal.wait_for_end() == 130
    assert b"\x1b" not in terminal.raw
    terminal.assert_restored()


@pytest.mark.slow
def test_plain_is_a_choice(chat: Start) -> None:
    terminal = chat("--plain", NUMBER_42)
    terminal.wait_for_prompt()
    assert "42." in terminal.ask("What number is this?")
    terminal.press("ctrl-d")
    assert terminal.wait_for_end() == 0
    assert not re.search(rb"\x1b\[\??[\d;]*[hlm]", terminal.raw.replace(b"\x1b[K", b""))


def test_questions_through_a_pipe(home: Path) -> None:
    environment = {"HOME": str(home)}
    process = spawn("chat", NUMBER_42, "--model", "demo", env=environment)
    ran = wait(process, b"What number is this?\nDescribe the image.\n")
    assert (ran.code, ran.out) == (0, "42.\nThe number 42 in blue.\n")
    assert "Traceback" not in ran.err and "\x1b" not in ran.err


@pytest.mark.slow
def test_answers_into_a_file_while_the_questions_are_typed(chat: Start, tmp_path: Path) -> None:
    with (tmp_path / "answers.txt").open("wb") as out:
        terminal = chat(NUMBER_42, stdout=out)
        terminal.wait_for_prompt()
        terminal.type("What number is this?\r")
        terminal.wait_for("to first token")
        terminal.wait_for_prompt()
        terminal.press("ctrl-d")
        assert terminal.wait_for_end() == 0
    assert (tmp_path / "answers.txt").read_bytes() == b"42.\n"


@pytest.mark.slow
def test_questions_through_a_pipe_and_answers_on_a_terminal(chat: Start) -> None:
    terminal = chat(NUMBER_42, stdin=subprocess.PIPE)
    assert terminal.process.stdin is not None
    terminal.process.stdin.write(b"What number is this?\n")
    terminal.process.stdin.close()
    assert terminal.wait_for_end() == 0
    assert "42." in terminal.rows
    terminal.assert_restored()


@pytest.mark.slow
def test_iterm2_is_sent_the_picture(chat: Start) -> None:
    terminal = chat(NUMBER_42, env={"TERM_PROGRAM": "iTerm.app"})
    terminal.wait_for_prompt()
    match = re.search(rb"\x1b\]1337;File=inline=1;[^:]*:([A-Za-z0-9+/=]+)\x07", terminal.raw)
    assert match is not None and base64.b64decode(match[1]).startswith(b"\x89PNG")
    assert "▀" not in terminal.text
    terminal.quit()


@pytest.mark.slow
def test_kitty_is_sent_the_picture(chat: Start) -> None:
    terminal = chat(NUMBER_42, env={"KITTY_WINDOW_ID": "1", "TERM": "xterm-kitty"})
    terminal.wait_for_prompt()
    chunks = re.findall(rb"\x1b_G[^;]*;([A-Za-z0-9+/=]*)\x1b\\", terminal.raw)
    assert chunks and base64.b64decode(b"".join(chunks)).startswith(b"\x89PNG")
    assert "▀" not in terminal.text
    terminal.quit()


def test_half_blocks_elsewhere_in_the_pictures_colours(chat: Start) -> None:
    terminal = chat(NUMBER_42, env={"TERM_PROGRAM": None})
    terminal.wait_for_prompt()
    blocks = [
        cell
        for row in range(terminal.screen.lines)
        for cell in terminal.screen.buffer[row].values()
        if cell.data == "▀"
    ]
    assert len(blocks) > 100 and len({cell.fg for cell in blocks}) > 3
    assert b"\x1b]1337" not in terminal.raw and b"\x1b_G" not in terminal.raw
    terminal.quit()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["iTerm.app", "xterm"])
def test_no_preview_shows_none(chat: Start, program: str) -> None:
    terminal = chat(NUMBER_42, "--no-preview", env={"TERM_PROGRAM": program})
    terminal.wait_for_prompt()
    assert b"1337" not in terminal.raw and "▀" not in terminal.text
    assert "number_42.png 256x256" in terminal.text
    terminal.quit()
