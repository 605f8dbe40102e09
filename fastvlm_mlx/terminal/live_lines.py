"""Lines at the end of a terminal's output that may still be rewritten, drawn without flicker.

Knows cursor movement and how to change as little as possible: each update is one write inside
synchronized output, lines that did not change are not touched, a line that only grew gets its new
part. Never clears first and writes then. Knows nothing of what the lines say; they must be narrower
than the screen, so that no terminal wraps them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TextIO, TypeAlias

Run: TypeAlias = tuple[str, str]
"""Text and its SGR parameters ("1;36", "" for none)."""
Line: TypeAlias = tuple[Run, ...]

# Private mode 2026: the terminal shows the update as a whole; those without it ignore the mode.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_ERASE_RIGHT, _ERASE_BELOW = "\x1b[K", "\x1b[J"
_JOINERS = "\u200d\ufe0f\u20e3"
_UNKNOWN: Line = (("\0", ""),)
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")


class LiveLines:
    """The lines last drawn that can still be reached; the cursor stands after the last of them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: list[Line] = [()]

    @property
    def shown(self) -> tuple[Line, ...]:
        """The lines drawn and not yet kept; the first is where the next `draw` begins."""
        return tuple(self._shown)

    def draw(self, lines: Sequence[Line]) -> None:
        """Make the lines on the screen these, the first in the place of the first shown."""
        target = list(lines) or [()]
        changes = _changes(self._shown, target)
        self._shown = target
        if changes:
            self._out.write(f"{_BEGIN}{changes}{_END}")
            self._out.flush()

    def keep(self, count: int) -> None:
        """Leave the first `count` lines as they are for good, all but the last shown at most."""
        del self._shown[: min(count, len(self._shown) - 1)]

    def restart(self, reachable: int, *, untouched: int) -> bool:
        """Make the next `draw` write all lines but the first `untouched`, after the screen's width
        changed. Return whether those first are still among the `reachable` rows above the cursor;
        if not, the next `draw` begins at the highest row that is.
        """
        still_there = len(self._shown) <= reachable
        count = len(self._shown) - untouched if still_there else max(reachable, 1)
        self._shown = [*self._shown[: untouched if still_there else 0], *([_UNKNOWN] * count)]
        return still_there

    def leave(self) -> None:
        """Leave all lines as they are for good; the next `draw` begins below them."""
        if any(self._shown):
            self.end()
            self._shown = [()]

    def end(self) -> None:
        """Put the cursor on the line after the last."""
        self._out.write("\r\n")
        self._out.flush()


def _changes(old: Sequence[Line], new: Sequence[Line]) -> str:
    """Return what turns the lines `old`, the cursor after the last, into `new`."""
    first = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), None
    )
    if first is None:
        if len(old) == len(new):
            return ""
        first = min(len(old), len(new)) - 1
    parts: list[str] = []
    row = len(old) - 1
    if first == row and (more := _grown(old[row], new[row])) is not None:
        parts.append(_written(more))
        first += 1
    else:
        if row > first:
            parts.append(f"\x1b[{row - first}A")
        parts.append("\r")
        row = first
    for index in range(first, len(new)):
        if index > row:
            parts.append("\r\n")
            row = index
        if index >= len(old):
            parts.append(_written(new[index]))
        elif old[index] != new[index]:
            parts.append(_written(new[index]) + _ERASE_RIGHT)
    return "".join(parts) + _tidy(old, new)


def _tidy(old: Sequence[Line], new: Sequence[Line]) -> str:
    """Return what erases lines that are no more, and brings the cursor after the last line."""
    last = len(new) - 1
    below = f"\r\n{_ERASE_BELOW}\x1b[1A" if len(old) > len(new) else ""
    unchanged = last < len(old) and old[last] == new[last]
    # A line left as it was has the cursor at its start: writing it again moves it to its end.
    return below + (f"\r{_written(new[last])}" if below or unchanged else "")


def _grown(old: Line, new: Line) -> Line | None:
    """Return what `new` has after all of `old`; None if it is no continuation of it."""
    rest = list(new)
    for text, sgr in old:
        if not rest or rest[0][1] != sgr or not rest[0][0].startswith(text):
            return None
        left = rest[0][0][len(text) :]
        rest[:1] = [(left, sgr)] if left else []
    if rest and old and _joins(old[-1][0][-1:], rest[0][0][:1]):
        return None
    return tuple(rest)


def _joins(before: str, after: str) -> bool:
    """Whether a terminal may draw `after` into the cell of `before`."""
    return (
        before in _JOINERS
        or after in _JOINERS
        or unicodedata.category(after) in ("Mn", "Me", "Mc", "Cf")
        or _SKIN_TONES[0] <= after <= _SKIN_TONES[1]
    )


def _written(line: Line) -> str:
    return "".join(f"\x1b[{sgr}m{text}\x1b[0m" if sgr else text for text, sgr in line)
