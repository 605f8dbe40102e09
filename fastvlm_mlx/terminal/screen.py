"""The terminal as something to write on: its size, its colours, lines, pictures and answers.

Knows escape sequences for style only; nothing of what is said.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, TextIO

from fastvlm_mlx.terminal.attached import Attached
from fastvlm_mlx.terminal.safe_text import safe

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
        """Write a whole line, made harmless."""
        line = safe(line)
        if style and self.color:
            line = f"\x1b[{style}m{line}\x1b[0m"
        self._out.write(line + "\n")
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
