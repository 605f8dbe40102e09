"""Ctrl-C while an answer is written: the first ends it cleanly, a second aborts at once.

Before the first token there is nothing to keep, so the first aborts too. Knows signals only.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """A context in which SIGINT sets `wanted` once `answering`, and else is KeyboardInterrupt.

    Enter it in the main thread, which is the only one that may set signal handlers.
    """

    def __init__(self) -> None:
        self.answering = False
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if self.wanted or not self.answering:
            raise KeyboardInterrupt
        self.wanted = True
