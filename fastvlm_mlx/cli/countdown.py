"""Which of many measurements is running and about how long the rest will take, on the live line.

Knows a clock and the console; knows nothing of what is measured.
"""

from __future__ import annotations

import logging
import time

from fastvlm_mlx.cli.console import Console

log = logging.getLogger("fastvlm_mlx")


class Countdown:
    """Shows on the live line which run it is and about how long the rest will take."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._begun = 0
        self._since = 0.0

    def __call__(self, line: str) -> None:
        """Begin the next measurement: `line` says which, "run 3 of 10: …"; others do not count."""
        log.info(line)
        which, colon, what = line.partition(": ")
        if not colon:
            self._console.report(0, 0, line)
            return
        if not self._begun:
            self._since = time.monotonic()
        elif self._begun < self._total:
            each = (time.monotonic() - self._since) / self._begun
            seconds = round(each * (self._total - self._begun))
            which += f", about {readable_seconds(seconds)} left"
        self._begun += 1
        self._console.report(0, 0, f"{which}: {what}")


def readable_seconds(seconds: int) -> str:
    """Return a time as people say it: 40 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
