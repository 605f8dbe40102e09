"""A report as lines for a terminal of 80 columns.

Knows which figure belongs beside which. Measures nothing and draws nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from fastvlm_mlx.bench.figures import (
    COLD,
    DRIFT,
    bits_of,
    drift,
    label_of,
    metric_of,
    number,
    ordered,
    shown,
    slow_tail,
)
from fastvlm_mlx.bench.results import METRICS, STAGES, CaseResult, Limit, Report, Series
from fastvlm_mlx.checkpoint.memory import readable_bytes

WIDTH = 80
_ABOVE = "above the peak"
_WHY_ABOVE = (
    "done sooner than the limit. A measured peak is no more than the probe reached, less beside "
    "other work; and what is small may be read from a cache."
)
_INDENT = 10
_DIGEST = 8  # hexadecimal digits of a hash that are shown; the JSON has them all


def table(report: Report) -> str:
    """Return the whole report as text, no line longer than 80 columns unless a name is."""
    lines = list(heading(report))
    if report.once:
        lines += ["", *_once(report)]
    for result in report.cases:
        lines += ["", *_case(result)]
    limits = [limit for result in report.cases for limit in result.limits.values()]
    for source in dict.fromkeys(limit.source for limit in limits if limit.source):
        lines += ["", *_wrapped(f"limit: {source}", "  ")]
    if any(line.endswith(_ABOVE) for line in lines):
        lines += _wrapped(f"  {_ABOVE}: {_WHY_ABOVE}", "  ")
    return "\n".join(lines)


def heading(report: Report) -> Iterator[str]:
    """Yield what was run, on what, with which weights and how."""
    machine, model, settings = report.machine, report.model, report.settings
    yield from _entry("runtime", [f"{report.runtime}, {report.created}"])
    yield from _entry(
        "machine",
        [
            machine.chip,
            _count(machine.cpu_cores, "CPU core"),
            _count(machine.gpu_cores, "GPU core"),
            "" if machine.memory_bytes is None else f"{readable_bytes(machine.memory_bytes)} RAM",
            machine.os,
            machine.power,
            "virtual" if machine.virtual else "",
        ],
    )
    yield from _entry(
        "",
        [
            f"MLX {machine.mlx}" if machine.mlx else "",
            machine.device,
            machine.backend,
            machine.blas,
            f"Python {machine.python}",
            "" if machine.load_average is None else f"load {machine.load_average:.2f} at the start",
        ],
    )
    yield from _entry(
        "model",
        [
            f"{model.name}{', random weights' if model.synthetic else ''}",
            f"{model.parameters / 1e6:.4g} M parameters",
            f"{readable_bytes(model.weight_bytes)} of weights",
            bits_of(model),
            f"computing {'unpacked ' if model.unpacked else ''}in {model.dtype}",
            f"fingerprint {model.fingerprint[:_DIGEST]}" if model.fingerprint else "",
        ],
    )
    yield from _entry(
        "runs",
        [
            f"{settings.runs} counted",
            f"{settings.warm_up_runs} before them left out",
            # Random weights made in memory were in no file.
            ""
            if model.synthetic and settings.file_cache == "unknown"
            else f"file cache {settings.file_cache}",
            f"seed {settings.seed}" if model.synthetic else "",
            "tower in low memory" if settings.low_memory else "",
            "heads paired" if settings.paired_heads else "",
        ],
    )
    digests = [f"{name} {value[:_DIGEST]}" for name, value in settings.inputs.items()]
    yield from _entry("inputs", digests)


def _entry(name: str, values: list[str]) -> Iterator[str]:
    """Yield lines of a heading's entry: those values that are known, none cut between lines."""
    line = f"{name:<{_INDENT}}"
    empty = True
    for value in filter(None, values):
        if not empty and len(line) + 2 + len(value) >= WIDTH:
            yield f"{line},"
            line, empty = " " * _INDENT, True
        line += value if empty else f", {value}"
        empty = False
    if not empty:
        yield line


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _count(count: int | None, noun: str) -> str:
    return "" if count is None else f"{count} {noun}{'' if count == 1 else 's'}"


_FIGURES = f"{'':<26}{'median':>11}{'p90':>16}{'n':>4}"
_OVERHEAD = "cold_overhead_ms"
_OVERHEAD_AND_OTHERS = (_OVERHEAD, "cold_weights_ms", "cold_first_answer_ms")
"""What of a cold start is no part of its overhead; the rest adds up to it."""
_THIRDS = "   first → last third"


def _titles(series: dict[str, Series]) -> str:
    """The head of a block of figures; drifts have a column where a figure has one."""
    known = any(drift(one, metric_of(name, one).better) is not None for name, one in series.items())
    return _FIGURES + (_THIRDS if known else "")


def _once(report: Report) -> Iterator[str]:
    """Yield what is measured once a process: loading, warm-up, cold start and its parts."""
    yield _titles(report.once).replace(" " * 14, "once a process", 1)
    for name in ordered(report.once):
        series = report.once[name]
        part = name.startswith(COLD) and name not in METRICS
        within = part and _OVERHEAD in report.once and name not in _OVERHEAD_AND_OTHERS
        yield _figure(name, series, "      " if within else "    " if part else "  ")


def _figure(name: str, series: Series, indent: str = "  ") -> str:
    metric = metric_of(name, series)
    label = f"{indent}{label_of(name)}"
    tail = shown(slow_tail(series, metric.better), series.unit)
    if metric.better == "higher":
        tail = f"p10 {tail}"
    line = f"{label:<26}{shown(series.median, series.unit):>11}{tail:>16}{series.n:>4}"
    factor = drift(series, metric.better)
    if factor is None:
        return line
    line += f"   {number(series.first_third)} → {number(series.last_third)}"
    return f"{line}  (!)" if factor > DRIFT else line


def _case(result: CaseResult) -> Iterator[str]:
    yield result.case.name
    yield (
        f"  prompt of {result.prompt_tokens} tokens, {result.image_tokens} of them the pictures'; "
        f"{result.generated_tokens} generated"
    )
    series = result.series
    names = [name for name in ordered(series) if name not in STAGES]
    if "paper_ttft_ms" in names and "paper_ttft_ms" in result.limits:
        names.remove("paper_ttft_ms")  # stands below its stages
    if names:
        yield _titles({name: series[name] for name in names})
        yield from (_figure(name, series[name]) for name in names)
    if any(name in series for name in STAGES):
        yield from _stages(result)
    warned = [
        label_of(name)
        for name, one in series.items()
        if (drift(one, metric_of(name, one).better) or 0) > DRIFT
    ]
    if warned:
        text = f"(!) slower at the end: {', '.join(warned)}. Heat, or load on the machine?"
        yield from _wrapped(f"  {text}", "      ")


def _stages(result: CaseResult) -> Iterator[str]:
    """Yield the split of a profiled call, each stage beside the least the chip needs for it."""
    series, limits = result.series, result.limits
    stages = [name for name in STAGES if name in series]
    whole = sum(series[name].median for name in stages)
    beside = f"{'work':>11}{'moved':>9}{'limit':>9}  reached" if limits else ""
    yield f"  {'stages, waited for':<18}{'median':>9}{'share':>6}{beside}"
    for name in stages:
        median = series[name].median
        share = f"{median / whole:>6.0%}" if whole else ""
        yield _stage(METRICS[name].label, median, share, limits.get(name))
    yield _stage("together", whole, "", None)
    if "paper_ttft_ms" in limits and "paper_ttft_ms" in series:
        paper = series["paper_ttft_ms"].median
        yield _stage("the paper's TTFT", paper, "", limits["paper_ttft_ms"])
    if "decode_tps" in limits and "decode_tps" in series:
        # A speed's limit is that of one token.
        yield _stage(
            "decode, a token", 1000 / series["decode_tps"].median, "", limits["decode_tps"]
        )


def _stage(label: str, median_ms: float, share: str, limit: Limit | None) -> str:
    line = f"  {label:<16}{shown(median_ms, 'ms'):>11}{share:>6}"
    if limit is None:
        return line.rstrip()
    line += f"{_work(limit.flops):>11}{readable_bytes(round(limit.bytes)):>9}"
    if limit.limit_ms is None:
        return line
    line += f"{shown(limit.limit_ms, 'ms'):>9}"
    if not median_ms:
        return line
    reached = limit.limit_ms / median_ms
    if reached > 1:  # no share of a peak: whatever the peak is, it is not this machine's
        return f"{line}  {_ABOVE}"
    return f"{line}{reached:>5.0%}{f' of {limit.bound}' if limit.bound else ''}"


def _work(flops: float) -> str:
    """Operations in billions, or in millions where few."""
    return f"{number(flops / 1e9)} GFLOP" if flops >= 1e8 else f"{number(flops / 1e6)} MFLOP"


_OVERVIEW = ("ttft_ms", "vision_ms", "prefill_ms", "decode_tps", "peak_bytes")


def overview(reports: Sequence[Report]) -> Iterator[str]:
    """Yield a line a case, to be read down: how cost grows. Several models are named beside."""
    results = [(report, result) for report in reports for result in report.cases]
    names = [name for name in _OVERVIEW if any(name in one.series for _, one in results)]
    prompt = max(len("prompt"), *(len(one.case.prompt) for _, one in results))
    titles = "".join(f"{METRICS[name].label:>12}" for name in names)
    yield f"{'px':>5}{'images':>7} {'prompt':<{prompt}}{titles}"
    for report, result in results:
        case = result.case
        cells = "".join(
            f"{shown(result.series[name].median, result.series[name].unit):>12}"
            if name in result.series
            else f"{'-':>12}"
            for name in names
        )
        model = f"  {report.model.name}" if len(reports) > 1 else ""
        yield f"{case.resolution:>5}{case.images:>7} {case.prompt:<{prompt}}{cells}{model}"
