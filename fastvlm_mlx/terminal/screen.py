"""The terminal as something to write on: its size, its colours, lines, pictures and answers.

Knows escape sequences for style only; nothing of what is said.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, TextIO

from fastvlm_mlx.terminal.attached import Attached
from fastvlm_mlx.terminal.safe_text import safe
from fastvlm_mlx.terminal.status import cells

if TYPE_CHECKING:
    from fastvlm_mlx.terminal.markdown_stream import MarkdownStream

BOLD, DIM, RED = "1", "2", "31"


class Screen:
    """The terminal of `out`. `color` is off where NO_COLOR is set; styles are then left out."""

    def __init__(self, out: TextIO) -> None:
        self.color = not os.environ.get("NO_COLOR")
        self._out = out

    def columns(self) -> int:
        """Return how many cells a line has, now."""
        return shutil.get_terminal_size().columns

    def rows(self) -> int:
        """Return how many lines there are, now."""
        return shutil.get_terminal_size().lines

    def say(self, line: str, style: str = "") -> None:
        """Write a text, made harmless, in as many lines as it needs."""
        lines = [part for whole in safe(line).split("\n") for part in folded(whole, self.columns())]
        for part in lines:
            styled = style and self.color
            self._out.write(f"\x1b[{style}m{part}\x1b[0m\n" if styled else f"{part}\n")
        self._out.flush()

    def show(self, picture: Attached) -> None:
        """Draw a picture, if this terminal can, in at most half of its rows."""
        from fastvlm_mlx.terminal.inline_image import detect, preview

        protocol = detect(os.environ, self._out.isatty())
        if protocol is not None:
            columns, rows = self.columns(), max(self.rows() // 2, 1)
            self._out.write(
                preview(picture.thumbnail, protocol, columns=columns, rows=rows, color=self.color)
            )

    def new_stream(self) -> MarkdownStream:
        """Return what draws one answer at the cursor."""
        from fastvlm_mlx.terminal.markdown_stream import MarkdownStream

        return MarkdownStream(self._out, columns=self.columns, rows=self.rows, color=self.color)


def folded(line: str, columns: int) -> list[str]:
    """Return the line in parts of fewer than `columns` cells, broken between words where it can."""
    room = max(columns - 1, 2)  # a wide character takes two
    parts: list[str] = []
    start = used = 0
    for at, char in enumerate(line):
        used += cells(char)
        if used > room:
            blank = line.rfind(" ", start, at + 1)
            end = blank if line[start:blank].strip() and blank > start else at
            parts.append(line[start:end].rstrip())
            start = blank + 1 if end == blank else end
            used = cells(line[start : at + 1])
    return [*parts, line[start:]]
