"""A chat's prompt without a chat: run in a pseudo-terminal by test_line_input.py.

Prints each line it reads as JSON, and what ended it. Between lines it sleeps while a file "busy"
exists beside the history, as the chat does while a model answers.
"""

from __future__ import annotations

import json
import os
import sys
import termios
import time
from pathlib import Path

from fastvlm_mlx.terminal.line_input import Cancelled, LineInput


def wait_quietly(busy: Path) -> None:
    """Wait with the echo off and Enter left as it is, as the chat does while it answers."""
    before = termios.tcgetattr(0)
    quiet = termios.tcgetattr(0)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSADRAIN, quiet)
    print("answering")
    while busy.exists():
        time.sleep(0.01)
    termios.tcsetattr(0, termios.TCSADRAIN, before)


def main() -> None:
    folder = Path(sys.argv[1])
    line = LineInput(
        history_file=folder / "history",
        status=lambda columns: ("demo | 12 of 1024 positions | " + "=" * 200)[:columns],
        images=lambda: int(os.environ.get("PICTURES", "0")),
        color="NO_COLOR" not in os.environ,
        on_image_paste=lambda: None,
    )
    while True:
        try:
            print("read", json.dumps(line.read(), ensure_ascii=False))
        except Cancelled as cancelled:
            print("cancelled", json.dumps(cancelled.text, ensure_ascii=False))
            if not cancelled.text:
                return
        except EOFError:
            print("the end")
            return
        wait_quietly(folder / "busy")


main()
