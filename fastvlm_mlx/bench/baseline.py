"""This run against an earlier one: which figures got worse, by a rule that noise does not trip.

Knows two reports. Refuses to compare different machines, models or inputs: what would such a
difference mean? What reads files is left out where the file cache was not in the same state.

The rule: a figure is worse if its median is worse than the baseline's by more than the tolerance,
and the noise of both says so too: the median lies beyond the baseline's p90 (of a speed: below its
10th percentile), and nine of ten of the new runs are worse than the baseline's median. Memory has a
tolerance of its own, since it does not vary with load. A time measured fewer than three times has
no noise to go by and is not judged; half a millisecond more is never worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastvlm_mlx.bench.figures import fast_tail, label_of, metric_of, shown, slow_tail, worse_by
from fastvlm_mlx.bench.results import Report, Series, Settings
from fastvlm_mlx.errors import FastVLMError

TOLERANCE = 0.1
MEMORY_TOLERANCE = 0.05
FEWEST_RUNS = 3
"""Fewer measurements of a time or speed show no noise, so nothing is judged by them."""
_LEAST_MS = 0.5  # below it lies what any scheduler does
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
    machine, model, input or prompt length, or no case in common.
    """
    require_comparable(report, baseline)
    if not {one.case for one in report.cases} & {one.case for one in baseline.cases}:
        raise FastVLMError(
            "this run and the baseline have no case in common: give the baseline's --resolution, "
            "--prompt, --images and --max-tokens"
        )
    now, before = _figures(report), _figures(baseline)
    states = (report.settings.file_cache, baseline.settings.file_cache)
    apart = [] if states[0] == states[1] else [n for n in now if n[1].startswith(_FILE_CACHE)]
    both = [name for name in before if name in now and name not in apart]
    few = [name for name in both if _too_few(now[name], before[name])]
    names = [name for name in both if name not in few]
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
        slight = mine.unit == "ms" and mine.median - other.median < _LEAST_MS
        if worse > 1 + allowed and beyond_noise and not slight:
            regressions.append(
                Regression(case=case, metric=metric, now=mine, before=other, worse=worse)
            )
    missing = [*_missing(before, now)] + [
        f"{case}: {label_of(metric)} (the file cache was {states[1]} then, {states[0]} now)"
        for case, metric in apart
        if (case, metric) in before
    ]
    missing += [
        f"{case}: {label_of(metric)} (measured fewer than {FEWEST_RUNS} times, so its noise is "
        "unknown)"
        for case, metric in few
    ]
    return Checked(compared=len(names), regressions=tuple(regressions), missing=tuple(missing))


def choose(report: Report, baselines: Sequence[Report]) -> Report:
    """Return which of a result's models is this run's: by fingerprint, or else by name.

    A sweep over numbers of bits leaves several. One alone is it, whatever it is called. Raises
    FastVLMError, one line, if there are several and none is this run's.
    """
    if len(baselines) == 1:
        return baselines[0]
    mine = report.model
    for same in ("fingerprint", "name"):
        for baseline in baselines:
            if getattr(baseline.model, same) == getattr(mine, same):
                return baseline
    names = "; ".join(baseline.model.name for baseline in baselines)
    raise FastVLMError(f"the baseline has several models, none of them {mine.name}: {names}")


def require_comparable(report: Report, baseline: Report) -> None:
    """Raise FastVLMError, one line, naming the first thing that makes a comparison meaningless."""
    mine, other = report.machine, baseline.machine
    ours, theirs = report.model, baseline.model
    for what, one, two in (
        ("runtime", _word(report.runtime), _word(baseline.runtime)),
        ("chip", mine.chip, other.chip),
        ("number of GPU cores", mine.gpu_cores, other.gpu_cores),
        ("device", mine.device, other.device),
        ("kind of weights", _kind(report), _kind(baseline)),
        ("number of parameters", ours.parameters, theirs.parameters),
        ("quantization", ours.quantization, theirs.quantization),
        ("form of the weights in memory", ours.held, theirs.held),
        ("compute dtype", ours.dtype, theirs.dtype),
        ("form of the tower", _form(report.settings), _form(baseline.settings)),
        ("model by its weights' fingerprint", ours.fingerprint, theirs.fingerprint),
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


def _too_few(now: Series, before: Series) -> bool:
    return now.unit != "bytes" and min(now.n, before.n) < FEWEST_RUNS


def _kind(report: Report) -> str:
    if not report.model.synthetic:
        return "a real model's"
    return f"random, seed {report.settings.seed}"


def _form(settings: Settings) -> str:
    chosen = {"--low-memory": settings.low_memory, "--paired-heads": settings.paired_heads}
    return " ".join(option for option, given in chosen.items() if given) or "plain"


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
