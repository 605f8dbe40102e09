"""Standard error as people read it: whole lines, and one live line while something takes long.

The live line appears after a second, only on a terminal, and is erased before anything else is
written and at the end. Knows terminals; knows nothing of what is going on.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import TextIO

import click

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.errors import one_line

_APPEARS_AFTER_S = 1.0
_REDRAWN_EVERY_S = 0.2
_ERASE = "\r\x1b[K"


class Console:
    """One error stream. `line` and `report` may be called from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._what = ""
        self._since = 0.0
        self._drawn = False
        self._idle = threading.Event()
        self._ticker: threading.Thread | None = None

    def line(self, text: str) -> None:
        """Print a whole line; a live line goes on below it."""
        with self._lock:
            self._erase()
            click.echo(text, file=self._stream)

    def start(self, what: str) -> None:
        """Begin something that may take long; `what` is shown with its seconds, until `close`."""
        with self._lock:
            self._what, self._since = what, time.monotonic()
            if self._live and self._ticker is None:
                self._idle.clear()
                self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
                self._ticker.start()

    def report(self, done: int, total: int, what: str) -> None:
        """Say how many bytes of how many are done; `what` replaces what `start` said."""
        share = f"{100 * done // total}% of " if total else ""
        with self._lock:
            self._what = f"{what}: {share}{readable_bytes(total)}"

    def close(self) -> None:
        """Erase the live line and end it."""
        with self._lock:
            self._idle.set()
            self._ticker = None
            self._erase()

    def _tick(self) -> None:
        idle = self._idle
        while not idle.wait(_REDRAWN_EVERY_S):
            with self._lock:
                elapsed = time.monotonic() - self._since
                if elapsed >= _APPEARS_AFTER_S and not idle.is_set():
                    columns = shutil.get_terminal_size().columns
                    text = one_line(f"{self._what} ({elapsed:.0f} s)")[: columns - 1]
                    self._stream.write(_ERASE + text)
                    self._stream.flush()
                    self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(_ERASE)
            self._stream.flush()
            self._drawn = False
