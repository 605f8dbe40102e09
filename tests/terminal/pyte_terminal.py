"""A terminal to write to, and what can be read on it: screen and scrollback."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pyte

SGR = re.compile(r"\x1b\[[\d;]*m")


class _Screen(pyte.HistoryScreen):
    """pyte gives up on a text at a character without width that is no accent, such as U+200D."""

    def draw(self, data: str) -> None:
        for char in data:
            super().draw(char)


class Terminal(io.StringIO):
    """A text stream whose writes go to a pyte screen; `seen` is called after each."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.screen = _Screen(columns, rows, history=10_000)
        self.stream = pyte.Stream(self.screen)
        self.writes: list[str] = []
        self.seen: Callable[[], None] = lambda: None

    def write(self, text: str) -> int:
        self.writes.append(text)
        self.stream.feed(text)
        self.seen()
        return len(text)

    @property
    def written(self) -> str:
        return "".join(self.writes)

    @property
    def columns(self) -> int:
        return int(self.screen.columns)

    @property
    def rows(self) -> int:
        return int(self.screen.lines)

    def cells(self) -> list[list[Any]]:
        """Every row of scrollback and screen as pyte's cells."""
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.rows))]
        return [[row[x] for x in range(self.columns)] for row in rows]

    def lines(self) -> list[str]:
        """Every line of scrollback and screen, without what is empty at its end and theirs."""
        lines = ["".join(cell.data for cell in row).rstrip() for row in self.cells()]
        while lines and not lines[-1]:
            lines.pop()
        return lines
