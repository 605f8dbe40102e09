"""This run against an earlier one: which figures got worse, by a rule that noise does not trip.

Knows two reports. Refuses to compare different machines, models or inputs: what would such a
difference mean? What reads files is left out where the file cache was not in the same state.

The rule: a figure is worse if its median is worse than the baseline's by more than the tolerance,
and the noise of both says so too: the median lies beyond the baseline's p90 (of a speed: below its
10th percentile), and nine of ten of the new runs are worse than the baseline's median. Memory has a
tolerance of its own, since it does not vary with load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastvlm_mlx.bench.figures import fast_tail, label_of, metric_of, shown, slow_tail, worse_by
from fastvlm_mlx.bench.results import Report, Series
from fastvlm_mlx.errors import FastVLMError

TOLERANCE = 0.1
MEMORY_TOLERANCE = 0.05
_ONCE = "once a process"
# Figures that begin so depend on the file cache's state.
_FILE_CACHE = ("load_ms", "cold_", "api_cold_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """A figure of a case that got worse. `worse` is how many times, above 1; both are medians."""

    case: str
    metric: str
    now: Series
    before: Series
    worse: float

    def __str__(self) -> str:
        unit = self.now.unit
        return (
            f"{self.case}: {label_of(self.metric)} {shown(self.now.median, unit)}, "
            f"was {shown(self.before.median, unit)}: {self.worse - 1:.0%} worse"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check found: how many figures were compared, which got worse, which were not
    compared and why."""

    compared: int
    regressions: tuple[Regression, ...]
    missing: tuple[str, ...]


def check(
    report: Report,
    baseline: Report,
    *,
    tolerance: float = TOLERANCE,
    memory_tolerance: float = MEMORY_TOLERANCE,
) -> Checked:
    """Compare figures by the names of case and metric.

    A tolerance is a share: 0.1 allows a tenth worse. `missing` names what of the baseline was not
    compared. Raises FastVLMError, one line, if the two cannot be compared: another
    machine, model, input or prompt length, or nothing in common.
    """
    require_comparable(report, baseline)
    now, before = _figures(report), _figures(baseline)
    states = (report.settings.file_cache, baseline.settings.file_cache)
    apart = [] if states[0] == states[1] else [n for n in now if n[1].startswith(_FILE_CACHE)]
    names = [name for name in before if name in now and name not in apart]
    if not names:
        raise FastVLMError(
            "this run and the baseline have no case in common: give the baseline's --resolution, "
            "--prompt, --images and --max-tokens"
        )
    regressions = []
    for case, metric in names:
        mine, other = now[case, metric], before[case, metric]
        better = metric_of(metric, mine).better
        worse = worse_by(mine.median, other.median, better)
        allowed = memory_tolerance if mine.unit == "bytes" else tolerance
        beyond_noise = (
            worse_by(mine.median, slow_tail(other, better), better) > 1
            and worse_by(fast_tail(mine, better), other.median, better) > 1
        )
        if worse > 1 + allowed and beyond_noise:
            regressions.append(
                Regression(case=case, metric=metric, now=mine, before=other, worse=worse)
            )
    missing = [*_missing(before, now)] + [
        f"{case}: {label_of(metric)} (the file cache was {states[1]} then, {states[0]} now)"
        for case, metric in apart
        if (case, metric) in before
    ]
    return Checked(compared=len(names), regressions=tuple(regressions), missing=tuple(missing))


def require_comparable(report: Report, baseline: Report) -> None:
    """Raise FastVLMError, one line, naming the first thing that makes a comparison meaningless."""
    mine, other = report.machine, baseline.machine
    ours, theirs = report.model, baseline.model
    for what, one, two in (
        ("runtime", _word(report.runtime), _word(baseline.runtime)),
        ("chip", mine.chip, other.chip),
        ("number of GPU cores", mine.gpu_cores, other.gpu_cores),
        ("device", mine.device, other.device),
        ("number of parameters", ours.parameters, theirs.parameters),
        ("quantization", ours.quantization, theirs.quantization),
        ("form of the weights in memory", ours.held, theirs.held),
        ("compute dtype", ours.dtype, theirs.dtype),
    ):
        if one != two:
            raise FastVLMError(
                f"the baseline is of another {what}: {two} there, {one} here; measure a baseline "
                "here with --save"
            )
    for name, digest in report.settings.inputs.items():
        if baseline.settings.inputs.get(name, digest) != digest:
            raise FastVLMError(
                f"the baseline was measured with another {name} (its bytes differ): measure it "
                "again with --save"
            )
    before = {result.case: result.prompt_tokens for result in baseline.cases}
    for result in report.cases:
        there = before.get(result.case, result.prompt_tokens)
        if there != result.prompt_tokens:
            raise FastVLMError(
                f"{result.case.name}: the prompt is {result.prompt_tokens} tokens here and "
                f"{there} in the baseline, so the work differs; measure it again with --save"
            )


def _word(runtime: str) -> str:
    """A runtime's name without its version, which may differ."""
    return runtime.split(" ")[0]


def _figures(report: Report) -> dict[tuple[str, str], Series]:
    found = {(_ONCE, metric): series for metric, series in report.once.items()}
    for result in report.cases:
        found |= {(result.case.name, metric): one for metric, one in result.series.items()}
    return found


def _missing(
    before: dict[tuple[str, str], Series],
    now: dict[tuple[str, str], Series],
) -> Iterator[str]:
    """Name whole cases that this run has not, and single figures of those it has."""
    cases = {case for case, _ in now}
    for case in dict.fromkeys(case for case, _ in before if case not in cases):
        yield f"{case} (not measured now)"
    for case, metric in before:
        if case in cases and (case, metric) not in now:
            yield f"{case}: {label_of(metric)} (not measured now)"
