"""Lines that are said are broken by us, not by the terminal: between words, at any width."""

from __future__ import annotations

import pytest

from fastvlm_mlx.terminal.screen import folded
from fastvlm_mlx.terminal.status import cells


@pytest.mark.parametrize("columns", [3, 20, 40])
@pytest.mark.parametrize(
    "line",
    [
        "",
        "short",
        "a" * 50,
        "20 ms to first token · 106 tok/s · 30 of 40 positions reused",
        "日本語" * 10 + " x",
        "   indented words go here and there and on",
        "word " * 500,
    ],
)
def test_no_part_is_too_wide_and_nothing_but_blanks_is_lost(line: str, columns: int) -> None:
    parts = folded(line, columns)
    assert all(cells(part) < columns for part in parts)
    assert "".join("".join(parts).split()) == "".join(line.split())


def test_it_breaks_between_words() -> None:
    assert folded("one two three", 9) == ["one two", "three"]
    assert folded("  one two three", 8) == ["  one", "two", "three"]
    assert folded("one two", 8) == ["one two"]
