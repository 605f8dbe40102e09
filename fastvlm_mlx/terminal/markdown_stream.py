"""An answer as it comes, drawn as Markdown on a terminal without flicker.

A block that no later text can change is written once and never touched again; only the lines of
the unfinished one are drawn anew, where they changed. What is shown at the end is what drawing the
whole answer at once shows. Knows nothing of models, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from fastvlm_mlx.terminal.live_lines import Line, LiveLines
from fastvlm_mlx.terminal.markdown_blocks import (
    Block,
    blocks,
    certain_length,
    is_undecided,
    last_line,
)
from fastvlm_mlx.terminal.markdown_lines import MarkdownLines, fits, ink
from fastvlm_mlx.terminal.safe_text import SafeText

# The unfinished block is drawn again when it has grown by this part of itself: the work stays
# linear in the text's length, however long a block is.
_GROWTH = 64
_NARROWEST = 8


class MarkdownStream:
    """Draws the text fed to it; `finish`, or leaving the context, ends it.

    `columns` and `rows` are asked at each update, so the terminal may change its size.
    `rendered_characters` counts the Markdown parsed and rendered so far: the work done.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        columns: Callable[[], int],
        rows: Callable[[], int],
        color: bool,
    ) -> None:
        self._screen = LiveLines(out)
        self._columns, self._rows = columns, rows
        self._renderer = MarkdownLines(color=color)
        self._width = self._usable_width()
        self._safe = SafeText()
        self._tail = ""
        self._drawn = 0  # how much of the tail was there when it was drawn
        self._first: Block | None = None  # what the tail begins with, if cut from what came before
        self._below_blocks = False
        self._pinned: list[Line] = []  # the last line written for good: the rest is drawn after it
        self._kept: list[Line] = []  # the tail's lines that are written for good
        self._kept_width = self._width
        self._live: list[Line] = []  # all of the tail's lines as they were last rendered
        self._written = self._finished = False
        self.rendered_characters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def wait(self, text: str) -> None:
        """Show one dim line that the answer replaces; without effect once the answer has begun."""
        if not (self._written or self._finished):
            self._fit_width()
            self._screen.draw([self._renderer.dim(text, self._width)])

    def feed(self, text: str) -> None:
        """Take more of the answer, and draw what can be seen of it."""
        self._tail += self._safe.feed(text)
        if len(self._tail) - self._drawn >= max(1, len(self._tail) // _GROWTH):
            self._update()

    def finish(self) -> None:
        """Draw all that was fed and end its last line; an answer without text leaves nothing."""
        if self._finished:
            return
        self._finished = True
        self._tail += self._safe.finish()
        self._update()
        if self._written:
            self._screen.end()
        else:
            self._screen.draw([])

    def _update(self) -> None:
        self._fit_width()
        self._drawn = len(self._tail)
        visible, found, settled = self._blocks()
        lines, final = self._rendered(found, settled)
        kept = self._count_kept(lines)
        room = max(self._rows() - 1, 1)
        upto = max(final, kept)
        if len(lines) - upto > room:
            # The unfinished block is taller than the screen: what is certain of it scrolls away.
            # If that is not enough, its last lines are shown, and all of it when it is settled.
            block = found[settled]
            certain = final + self._certain(lines[final:], visible[block.start :], block)
            upto = max(upto, min(certain, len(lines) - room))
        target = [*self._pinned, *lines[kept:upto], *lines[upto:][-room:]]
        if target:
            self._written = True
            self._screen.draw(target)
        if upto > kept:
            self._screen.keep(len(self._pinned) + upto - kept - 1)
            self._pinned = [lines[upto - 1]]
        self._kept, self._kept_width = lines[final:upto], self._width
        self._live = lines[final:]
        self._forget(found, settled, final)

    def _blocks(self) -> tuple[str, list[Block], int]:
        """Return what of the tail is to be seen, its blocks, and how many of them are settled.

        A block is settled when the next one's first line is whole: an unfinished line may yet turn
        out to belong to the block before it.
        """
        visible, start = self._tail, last_line(self._tail)
        if not self._finished and is_undecided(visible[start:]):
            visible = visible[:start]
        found = self._parsed(visible)
        if self._finished:
            return visible, found, len(found)
        if found and found[-1].kind == "table_open" and len(visible) > start:
            # A row's cells are known at its end; half of one would change all the widths.
            visible = visible[:start]
            found = self._parsed(visible)
        return visible, found, max(sum(block.start < start for block in found) - 1, 0)

    def _parsed(self, text: str) -> list[Block]:
        self.rendered_characters += len(text)
        return blocks(text, first=self._first)

    def _rendered(self, found: list[Block], settled: int) -> tuple[list[Line], int]:
        """Return the blocks' lines, with one between two blocks, and how many are settled."""
        lines: list[Line] = []
        final = 0
        for index, block in enumerate(found):
            lines += self._render(block, below=bool(lines) or self._below_blocks)
            if index < settled:
                final = len(lines)
        return lines, final

    def _render(self, block: Block, *, below: bool) -> list[Line]:
        """Return a block's lines, after an empty one if it is `below` another."""
        self.rendered_characters += block.end - block.start
        lines = self._renderer.lines(block.tokens, self._width, number=block.number)
        return [(), *lines] if lines and below and not block.follows else lines

    def _certain(self, lines: list[Line], text: str, first: Block | None) -> int:
        """Return how many of the lines of `text`, which begins with block `first`, are certain."""
        known: list[Line] = []
        certain = text[: certain_length(text)]
        self.rendered_characters += len(text) + len(certain)
        for block in blocks(certain, first=first):
            known += self._render(block, below=bool(known) or lines[0] == ())
        # The last line of what is certain may still grow, those before it may not.
        pairs = zip(known[:-1], lines, strict=False)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(known) - 1)

    def _count_kept(self, lines: list[Line]) -> int:
        """Return how many of the tail's lines are written for good.

        After a change of width that is reckoned by what can be read in them: rather a line that
        is written twice than one never.
        """
        if self._kept_width == self._width:
            return min(len(self._kept), len(lines))
        left = sum(map(ink, self._kept))
        for index, line in enumerate(lines):
            left -= ink(line)
            if left < 0:
                return index
        return len(lines)

    def _forget(self, found: list[Block], settled: int, final: int) -> None:
        """Cut the settled blocks, which had `final` lines, off the tail."""
        if settled:
            self._below_blocks = self._below_blocks or final > 0
            self._first = found[settled] if settled < len(found) else None
            self._tail = self._tail[self._first.start :] if self._first else ""
            self._drawn = len(self._tail)

    def _usable_width(self) -> int:
        # The last column stays free: terminals differ in what they do after writing there.
        return max(self._columns() - 1, _NARROWEST)

    def _fit_width(self) -> None:
        """Draw anew, below what is written for good, if the terminal's width has changed."""
        width = self._usable_width()
        if width == self._width:
            return
        if not all(fits(line, width) for line in self._screen.shown):
            self._leave_lines()
        elif not self._screen.restart(self._rows(), untouched=len(self._pinned)):
            self._pinned = []
        self._width = width

    def _leave_lines(self) -> None:
        """Go on below lines that are too long now: most terminals have wrapped them, some have cut
        them, so where they are is not known. What of them is certain is not written again."""
        self._screen.leave()
        self._pinned = []
        if self._live:
            drawn = self._tail[: self._drawn]
            certain = self._certain(self._live, drawn, self._first)
            self._kept = self._live[: max(certain, len(self._kept))]
