"""Two reports of the same work side by side: ratios, how sure they are, and what differs.

Knows reports only: who ran what in which order is compare.py's.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from fastvlm_mlx.bench.figures import label_of, metric_of, ordered, shown
from fastvlm_mlx.bench.results import Better, Report, Series, Unit

WIDTH = 80
_ROUNDS = 3  # fewer agree by chance too often


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs. `lowest` and `highest` are over rounds, None if the runs were apart."""

    median: float
    lowest: float | None
    highest: float | None
    rounds: int


def ratio(ours: Series, theirs: Series, *, interleaved: bool) -> Ratio | None:
    """Return ours over theirs; None if theirs holds a 0.

    `interleaved`: the n-th of ours was taken next to the n-th of theirs, so that a round's ratio
    has the machine's load in both; the median is over those. Otherwise it is the medians' ratio.
    """
    if 0 in theirs.values:
        return None
    if not interleaved or ours.n != theirs.n:
        return Ratio(ours.median / theirs.median, None, None, min(ours.n, theirs.n))
    rounds = [mine / other for mine, other in zip(ours.values, theirs.values, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds), len(rounds))


def verdict(found: Ratio, better: Better, unit: Unit) -> str:
    """Return which side wins if every round says so; "" where rounds disagree or are too few."""
    if found.lowest is None or found.highest is None or found.rounds < _ROUNDS:
        return ""
    good, bad = ("smaller", "larger") if unit == "bytes" else ("faster", "slower")
    low, high = found.lowest, found.highest
    if better == "higher":
        good, bad = bad, good
    return good if high < 1 else bad if low > 1 else ""


def comparison_table(ours: Report, theirs: Report, *, interleaved: bool) -> str:
    """Return ratios of every figure that both have, case by case, and what was not the same."""
    sides = ("ours", "theirs") if interleaved else ("now", "saved")
    lines = [
        f"{side:<10}{report.runtime}" for side, report in zip(sides, (ours, theirs), strict=True)
    ]
    if interleaved:
        meaning = (
            "ratio: ours / theirs, the median over rounds in which both ran in turn, and the "
            "lowest and highest of those; a word where every round agrees"
        )
    else:
        meaning = (
            f"ratio: now / saved, of medians of runs apart: the saved one is of {theirs.created}; "
            "a load that only one of them saw is in it"
        )
    lines += textwrap.wrap(meaning, WIDTH)
    lines += [
        line
        for what in differences(ours, theirs)
        for line in textwrap.wrap(f"not the same: {what}", WIDTH, subsequent_indent="    ")
    ]
    found = {result.case: result for result in theirs.cases}
    if both := [name for name in ordered(ours.once) if name in theirs.once]:
        lines += ["", _title("once a process", sides)]
        lines += [_line(name, ours.once[name], theirs.once[name], interleaved) for name in both]
    for result in ours.cases:
        other = found.get(result.case)
        if other is None:
            lines += ["", result.case.name, f"  {sides[1]} has no such case"]
            continue
        both = [name for name in ordered(result.series) if name in other.series]
        lines += ["", result.case.name, _title("", sides)]
        lines += [
            _line(name, result.series[name], other.series[name], interleaved) for name in both
        ]
        if result.prompt_tokens != other.prompt_tokens:
            lines.append(
                f"  not the same work: {result.prompt_tokens} prompt tokens against "
                f"{other.prompt_tokens}"
            )
    return "\n".join(lines)


def _title(what: str, sides: tuple[str, str]) -> str:
    return f"{what:<26}{sides[0]:>10}{sides[1]:>11}{'ratio':>7}{'rounds':>15}{'n':>4}"


def _line(name: str, ours: Series, theirs: Series, interleaved: bool) -> str:
    values = f"{shown(ours.median, ours.unit):>10}{shown(theirs.median, theirs.unit):>11}"
    line = f"  {label_of(name):<24}{values}"
    found = ratio(ours, theirs, interleaved=interleaved)
    if found is None:
        return line
    line += f"{found.median:>7.2f}"
    spread = ""
    if found.lowest is not None and found.highest is not None:
        spread = f"{found.lowest:.2f} to {found.highest:.2f}"
    return f"{line}{spread:>15}{found.rounds:>4} {verdict(*_judged(name, ours, found))}".rstrip()


def _judged(name: str, series: Series, found: Ratio) -> tuple[Ratio, Better, Unit]:
    return found, metric_of(name, series).better, series.unit


def differences(ours: Report, theirs: Report) -> Iterator[str]:
    """Yield what besides the runtime was not the same in both, one thing a line."""
    mine, other = ours.machine, theirs.machine
    for what, one, two in (
        ("model", ours.model.name, theirs.model.name),
        ("weights", ours.model.fingerprint, theirs.model.fingerprint),
        ("chip", mine.chip, other.chip),
        ("device", mine.device, other.device),
        ("power", mine.power, other.power),
        ("compute dtype", ours.model.dtype, theirs.model.dtype),
        ("quantization", ours.model.quantization, theirs.model.quantization),
        ("weights in memory", ours.model.held, theirs.model.held),
        ("parameters", ours.model.parameters, theirs.model.parameters),
        ("file cache", ours.settings.file_cache, theirs.settings.file_cache),
    ):
        if one != two:
            yield f"{what}: {one or 'unknown'} against {two or 'unknown'}"
    inputs = ours.settings.inputs
    for name in sorted(inputs.keys() & theirs.settings.inputs.keys()):
        if inputs[name] != theirs.settings.inputs[name]:
            yield f"input {name}: its bytes differ"
