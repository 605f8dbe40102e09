"""Two ways of computing the same thing, timed in turns; and when to call one of them faster.

Knows a clock and MLX's memory counter; knows nothing of what is computed. `formulations.py` says
what the rounds are.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

MIB = 2**20
# Fewer rounds that all agree may be chance: one in 16 at 5.
LEAST_ROUNDS = 5
# A timing shorter than this measures the waiting for a device; the work is repeated up to it.
LEAST_SECONDS, MOST_REPEATS = 0.05, 16

Outputs = mx.array | tuple[mx.array, ...]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Comparison:
    """The engine's form `ours` against `other`; what to do if that is faster, and if it is not.

    Their outputs may differ by `tolerance`, relative RMS.
    """

    name: str
    ours: Run
    other: Run
    advice: str
    tolerance: float
    otherwise: str = "keep ours"


@dataclass(frozen=True)
class Result:
    """Ratios of times, other / ours: median, lowest and highest of the rounds.

    `noise` is how far ours was from itself within a round, `difference` how far the outputs are
    apart. The peaks are of one run, beside what was held before.
    """

    name: str
    ratio: float
    lowest: float
    highest: float
    noise: float
    rounds: int
    difference: float
    ours_ms: float
    other_ms: float
    ours_peak_mib: float
    other_peak_mib: float
    verdict: str


def compare(comparison: Comparison, *, rounds: int, clock: Callable[[], float]) -> Result:
    """Check that both agree, warm them up, and take turns, each twice a round.

    Of the two the quicker counts: what disturbs a run only ever makes it longer. Raises SystemExit
    where the outputs differ.
    """
    difference = relative(comparison.other(), comparison.ours())
    if not difference <= comparison.tolerance:
        raise SystemExit(
            f"{comparison.name}: the outputs differ by {difference:.1e}, at most "
            f"{comparison.tolerance:.0e} was expected: nothing to compare"
        )
    peaks = [peak_mib(run) for run in (comparison.ours, comparison.other)]
    repeats = repeats_of(comparison.ours)
    ratios, noises, times = [], [], {"ours": [], "other": []}
    for turn in range(rounds):
        order = ("ours", "other") if turn % 2 == 0 else ("other", "ours")
        found: dict[str, list[float]] = {"ours": [], "other": []}
        for name in order * 2:
            found[name].append(timed(getattr(comparison, name), repeats, clock))
        ours, other = min(found["ours"]), min(found["other"])
        noises.append(max(found["ours"]) / ours - 1)
        ratios.append(other / ours)
        times["ours"].append(ours * 1000)
        times["other"].append(other * 1000)
    noise = statistics.median(noises)
    return Result(
        comparison.name,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        noise,
        rounds,
        difference,
        statistics.median(times["ours"]),
        statistics.median(times["other"]),
        *peaks,
        verdict(ratios, noise, comparison.advice, comparison.otherwise),
    )


def verdict(
    ratios: Sequence[float], noise: float, advice: str, otherwise: str = "keep ours"
) -> str:
    """Say what to choose: the other form only if it won every round by more than the noise."""
    if len(ratios) < LEAST_ROUNDS:
        return f"undecided: it takes {LEAST_ROUNDS} rounds or more"
    if max(ratios) < 1 - noise:
        return f"faster: {advice}"
    if min(ratios) > 1 + noise:
        return f"slower: {otherwise}"
    return f"no difference: {otherwise}"


def timed(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    """Return the seconds of one run, the mean of `repeats` that are waited for together."""
    mx.synchronize()
    since = clock()
    mx.eval([run() for _ in range(repeats)])
    mx.synchronize()
    return (clock() - since) / repeats


def repeats_of(run: Run) -> int:
    """Return how often a warm run is to be repeated for one timing."""
    since = time.perf_counter()
    mx.eval(run())
    return max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS / (time.perf_counter() - since))))


def peak_mib(run: Run) -> float:
    """Return the most that one run holds beside what was held before, pool not counted."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return (mx.get_peak_memory() - before) / MIB


def relative(found: Outputs, expected: Outputs) -> float:
    """Return the largest relative RMS difference of their arrays."""
    pairs = zip(_listed(found), _listed(expected), strict=True)

    def one(a: mx.array, b: mx.array) -> float:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        return (mx.sqrt(mx.mean((a - b) ** 2) / mx.mean(b**2))).item()

    return max(one(a, b) for a, b in pairs)


def _listed(outputs: Outputs) -> Sequence[mx.array]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
