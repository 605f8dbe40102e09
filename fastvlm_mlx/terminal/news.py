"""What the model's thread has to tell while nobody waits for it: lines, progress, what went wrong.

Any thread may tell; the user's side takes what there is when there is room for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from fastvlm_mlx.errors import FastVLMError


class News:
    """`changed` is called, in the thread that tells, when there is something new.

    `loading` is how far loading is, for the status line; `load_ms` how long it took, None before;
    `bug` an error that no user's mistake explains.
    """

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self.loading = ""
        self.load_ms: float | None = None
        self.bug: BaseException | None = None
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._since = time.perf_counter()

    def say(self, line: str) -> None:
        """Keep a line until there is a place to show it."""
        self._lines.put(line)
        self.changed()

    def take(self) -> list[str]:
        """Return the lines said since the last time."""
        lines: list[str] = []
        while True:
            try:
                lines.append(self._lines.get_nowait())
            except Empty:
                return lines

    def report(self, done: int, total: int, what: str) -> None:
        """Hear how far loading is."""
        percent = f"{100 * done // total}%" if total else ""
        self.loading = percent if what == "Loading weights" else f"{what} {percent}".rstrip()
        self.changed()

    def hear_loaded(self, _loaded: Future[None]) -> None:
        """Hear that loading is over."""
        self.load_ms = (time.perf_counter() - self._since) * 1000
        self.changed()

    def watch(self, future: Future[Any]) -> None:
        """Hear of a bug in work that nobody waits for.

        A user's mistake is said when the question is asked, which needs the same work, and a load
        that failed when the session is opened.
        """

        def hear(done: Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None and not isinstance(error, FastVLMError):
                self.bug = error

        future.add_done_callback(hear)
