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
_BAR_WIDTH = 20
_ERASE = "\r\x1b[K"


def progress_line(done: int, total: int, what: str, elapsed: float) -> str:
    """Return a bar, bytes done of bytes in all, and the time left after `elapsed` seconds."""
    if not total:
        return what
    full = _BAR_WIDTH * done // total
    bar = "#" * full + "-" * (_BAR_WIDTH - full)
    line = f"{what} [{bar}] {readable_bytes(done)} of {readable_bytes(total)}"
    if 0 < done < total and elapsed >= _APPEARS_AFTER_S:
        seconds = round(elapsed * (total - done) / done)
        minutes, seconds = divmod(seconds, 60)
        line += f", {minutes} min {seconds:02} s left" if minutes else f", {seconds} s left"
    return line


class Console:
    """One error stream. `line` and `report` may be called from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._what = ""
        self._since = 0.0
        self._measured = ""
        self._measured_since = 0.0
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
        """Say how many bytes of how many are done; `what` replaces what `start` said.

        A new `what` starts the clock that the time left is reckoned by.
        """
        with self._lock:
            if what != self._measured:
                self._measured, self._measured_since = what, time.monotonic()
            elapsed = time.monotonic() - self._measured_since
            self._what = progress_line(done, total, what, elapsed)

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
