"""A comparison of several runtimes as one Markdown table, with verdicts against the targets.

Knows which figures the table has and what was aimed at: at mlx-vlm alone. Measures nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastvlm_mlx.bench.compare import Comparison
from fastvlm_mlx.bench.figures import label_of, shown
from fastvlm_mlx.bench.ratios import Ratio, ratio
from fastvlm_mlx.bench.results import STAGES, Report, Series


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio of ours to mlx-vlm's is to be."""

    sign: str
    limit: float

    def met(self, value: float) -> bool:
        """Whether a ratio is on the right side."""
        compare: Callable[[float, float], bool] = operator.le if self.sign == "≤" else operator.ge
        return compare(value, self.limit)


AIMED_AT = "mlx-vlm"
"""How the name of the runtime begins that the targets are about."""
TARGETS = {
    "ttft_ms": Target("≤", 0.75),
    "api_cold_overhead_ms": Target("≤", 0.3),
    "second_turn_ttft_ms": Target("≤", 0.1),
    "decode_tps": Target("≥", 1.0),
}
ROWS = (
    "ttft_ms",
    *STAGES,
    "paper_ttft_ms",
    "decode_tps",
    "second_turn_ttft_ms",
    "api_cold_overhead_ms",
    "api_cold_start_ms",
    "api_cold_import_ms",
    "api_cold_weights_ms",
    "api_cold_ttft_ms",
    "load_ms",
    "peak_bytes",
    "resident_bytes",
    "peak_resident_bytes",
    "answer_cpu_ms",
)
LABELS = {
    "api_cold_overhead_ms": "cold start, overhead",
    "api_cold_start_ms": "… interpreter",
    "api_cold_import_ms": "… imports",
    "api_cold_weights_ms": "cold start, weights",
    "api_cold_ttft_ms": "cold start, until the first token",
    "peak_bytes": "peak of MLX's memory",
    "peak_resident_bytes": "peak resident memory",
    "answer_cpu_ms": "processor time of an answer",
}


def markdown(found: Comparison, failures: dict[str, str]) -> str:
    """Return the table, then what was the same, what failed, and on what it ran."""
    ours, *others = found.reports
    names = [report.runtime for report in found.reports]
    head = ["", *names, *(f"ours / {name.split()[0]}" for name in names[1:]), "target", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(cells) + " |" for name in ROWS if (cells := _row(name, ours, others))
    ]
    lines += ["", *_notes(found)]
    lines += [f"- {name} failed: {why}" for name, why in failures.items()]
    return "\n".join(lines)


def _row(name: str, ours: Report, others: list[Report]) -> list[str]:
    """Return a row's cells; [] if ours has no such figure."""
    mine = _figure(name, ours)
    if mine is None:
        return []
    theirs = [_figure(name, other) for other in others]
    ratios = [None if one is None else ratio(mine, one, interleaved=True) for one in theirs]
    target = TARGETS.get(name)
    judged = ""
    for other, found in zip(others, ratios, strict=True):
        if target is not None and found is not None and other.runtime.startswith(AIMED_AT):
            judged = "met" if target.met(found.median) else "missed"
    return [
        LABELS.get(name) or label_of(name),
        *("" if one is None else shown(one.median, one.unit) for one in (mine, *theirs)),
        *(_spelled(one) for one in ratios),
        "" if target is None else f"{target.sign} {target.limit:g}",
        judged,
    ]


def _figure(name: str, report: Report) -> Series | None:
    return report.cases[0].series.get(name) or report.once.get(name)


def _spelled(found: Ratio | None) -> str:
    if found is None:
        return ""
    text = f"{found.median:.3f}" if found.median < 0.1 else f"{found.median:.2f}"
    if found.lowest is None or found.highest is None or found.rounds == 1:
        return text
    return f"{text} ({found.lowest:.2f} to {found.highest:.2f})"


def _notes(found: Comparison) -> Iterator[str]:
    """Yield what a reader must know to believe the table."""
    ours = found.reports[0]
    machine, model = ours.machine, ours.model
    yield (
        f"- {model.name}, {model.dtype}; {ours.cases[0].case.name}; rounds: "
        f"{ours.settings.runs}; medians, ratios of neighbours in a round (lowest to highest)"
    )
    yield (
        f"- {machine.chip}, {machine.cpu_cores} cores, {machine.os}, {machine.blas}, MLX "
        f"{machine.mlx}; load {machine.load_average} at the start"
    )
    for name, same in found.agreement.items():
        yield f"- {name}: " + "; ".join(line.split(": ", 1)[1] for line in same)
    for note in found.notes:
        yield f"- {note}"
