"""The time that is left, in people's words, and what the live line says while it is unknown."""

from __future__ import annotations

import io
import re

import pytest

from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.countdown import Countdown, readable_seconds


class Heard(Console):
    """A console that keeps what it was told to show."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.lines: list[str] = []

    def report(self, done: int, total: int, what: str) -> None:
        super().report(done, total, what)
        self.lines.append(what)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_seconds_are_said_as_people_say_them(seconds: int, words: str) -> None:
    assert readable_seconds(seconds) == words


def test_the_time_left_is_said_from_the_second_measurement_to_the_last() -> None:
    console = Heard()
    countdown = Countdown(console, 3)
    for line in ("loading", "run 1 of 3: a", "run 2 of 3: a", "run 3 of 3: a", "run 4: b"):
        countdown(line)
    assert [re.sub(r"about \d+ s", "about N s", line) for line in console.lines] == [
        "loading",
        "run 1 of 3: a",
        "run 2 of 3, about N s left: a",
        "run 3 of 3, about N s left: a",
        "run 4: b",
    ]
