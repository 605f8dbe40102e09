"""Reports as pictures: PNG bytes, the same ones for the same report.

The only file that imports matplotlib, and only when something is drawn: no window, no display, and
nothing of the user's matplotlib settings. Knows reports; writes no files.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from fastvlm_mlx.bench.figures import bits_of, shown
from fastvlm_mlx.bench.ratios import ratio
from fastvlm_mlx.bench.results import METRICS, STAGES, CaseResult, Report
from fastvlm_mlx.errors import FastVLMError

DPI = 120
# Paul Tol's "bright" scheme, told apart by colour-blind readers too
# (https://sronpersonalpages.nl/~pault/, section 2), and its grey for the two smallest stages.
_COLOURS = {
    "image_decode_ms": "#bbbbbb",
    "preprocess_ms": "#66ccee",
    "vision_ms": "#4477aa",
    "projector_ms": "#aa3377",
    "prompt_ms": "#777777",
    "prefill_ms": "#228833",
    "first_token_ms": "#ccbb44",
}
_SIDES = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
_RUNS = ("now", "saved")
_UNFENCED, _LIMIT = "TTFT, nothing waited for", "vision, the limit"
_COMPARED = ("ttft_ms", "second_turn_ttft_ms", "decode_tps", "peak_bytes")


def require_matplotlib() -> None:
    """Raise FastVLMError, one line, if plots cannot be drawn here."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401 (found or not)
    except ImportError as error:
        raise FastVLMError(
            "plots need matplotlib: pip install 'fastvlm-mlx[bench]', or leave out --plots"
        ) from error


def draw_all(ours: Report, *theirs: Report, interleaved: bool = False) -> dict[str, bytes]:
    """Return every plot that these reports have the figures for, PNGs by file name.

    `interleaved` is `ratios.ratio`'s. Raises FastVLMError where matplotlib is missing.
    """
    plots = {"ttft-stages.png": stage_bars(ours), "resolution.png": resolution_lines(ours)}
    if theirs:
        plots["comparison.png"] = comparison_bars(ours, *theirs, interleaved=interleaved)
    return {name: raw for name, raw in plots.items() if raw is not None}


def stage_bars(report: Report) -> bytes | None:
    """Return a stacked bar of stages a case, its unfenced TTFT marked; None without profiles."""
    cases = [result for result in report.cases if any(name in result.series for name in STAGES)]
    if not cases:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in STAGES:
            widths = [_median(result, name) or 0.0 for result in cases]
            if any(widths):
                starts = [_before(result, name) for result in cases]
                axes.barh(
                    range(len(cases)), widths, left=starts, height=0.62,
                    color=_COLOURS[name], label=METRICS[name].label,
                )  # fmt: skip
        marks = [(_median(result, "ttft_ms"), row) for row, result in enumerate(cases)]
        found = [(value, row) for value, row in marks if value is not None]
        if found:
            axes.plot(
                [value for value, _ in found], [row for _, row in found],
                linestyle="none", marker="D", markersize=6, markerfacecolor="white",
                markeredgecolor="black", label=_UNFENCED,
            )  # fmt: skip
            for value, row in found:
                end = max(value, _before(cases[row], ""))
                axes.annotate(
                    shown(value, "ms"), (end, row), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=8,
                )  # fmt: skip
        axes.set_yticks(range(len(cases)), [_short(result, cases) for result in cases])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds, medians; each stage is waited for")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        _legend(figure, axes, last=_UNFENCED)
        _title(figure, "Time to first token by stage", report)

    return _png(draw, height=2.6 + 0.45 * len(cases))


def resolution_lines(report: Report) -> bytes | None:
    """Return TTFT and vision latency against resolution, both axes logarithmic.

    The work measured at the most resolutions is drawn. None if that is a single one.
    """
    groups: dict[tuple[int, str, int], list[CaseResult]] = {}
    for result in report.cases:
        case = result.case
        groups.setdefault((case.images, case.prompt, case.max_tokens), []).append(result)
    most = max(groups.values(), key=len, default=[])
    cases = sorted(most, key=lambda result: result.case.resolution)
    if len({result.case.resolution for result in cases}) < 2:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, label, colour in (
            ("ttft_ms", "TTFT", "#222222"),
            ("vision_ms", "vision", _COLOURS["vision_ms"]),
            ("prefill_ms", "prefill", _COLOURS["prefill_ms"]),
        ):
            _line(axes, cases, name, label, colour)
        limits = [
            (result.case.resolution, limit.limit_ms)
            for result in cases
            if (limit := result.limits.get("vision_ms")) is not None and limit.limit_ms
        ]
        if len(limits) > 1:
            axes.plot(
                [x for x, _ in limits], [y for _, y in limits], linestyle="--",
                color=_COLOURS["vision_ms"], alpha=0.7, label=_LIMIT,
            )  # fmt: skip
        resolutions = sorted({result.case.resolution for result in cases})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(resolutions, [str(pixels) for pixels in resolutions])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("side of the picture, pixels")
        axes.set_ylabel("milliseconds, medians; bars to p90")
        axes.grid(alpha=0.3)
        _legend(figure, axes, last=_LIMIT)
        case = cases[0].case
        images = f"{case.images} image{'' if case.images == 1 else 's'}"
        _title(figure, f"Latency against resolution, {images}, {case.prompt} prompt", report)

    return _png(draw, height=5.0)


def _line(axes: Any, cases: Sequence[CaseResult], name: str, label: str, colour: str) -> None:
    found = [result for result in cases if name in result.series]
    if not found:
        return
    medians = [result.series[name].median for result in found]
    above = [result.series[name].p90 - result.series[name].median for result in found]
    axes.errorbar(
        [result.case.resolution for result in found], medians,
        yerr=[[0.0] * len(found), above], marker="o", markersize=5, capsize=3,
        color=colour, label=label,
    )  # fmt: skip


def comparison_bars(ours: Report, *theirs: Report, interleaved: bool) -> bytes | None:
    """Return a panel a figure, a bar a runtime and case; None if no case is in all reports."""
    reports = (ours, *theirs)
    found = [{result.case: result for result in report.cases} for report in reports]
    shared = [case for case in found[0] if all(case in results for results in found)]
    panels = [
        name
        for name in _COMPARED
        if any(all(name in results[case].series for results in found) for case in shared)
    ]
    if not panels:
        return None

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, name in zip(rows, panels, strict=True):
            drawn = [
                case for case in shared if all(name in results[case].series for results in found)
            ]
            results = [[one[case] for case in drawn] for one in found]
            _compared(axes, name, reports, results, interleaved)
        figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        _title(figure, "The same work side by side, medians", ours)

    bars = len(panels) * (0.6 + 0.22 * len(shared) * len(reports))
    return _png(draw, height=1.6 + bars)


def _compared(
    axes: Any,
    name: str,
    reports: Sequence[Report],
    results: Sequence[Sequence[CaseResult]],
    interleaved: bool,
) -> None:
    """Draw one figure's panel: `results` has a list of cases for each report."""
    labels = _sides(reports)
    height = 0.8 / len(reports)
    mine = results[0]
    first = labels[0] if labels == _RUNS else "the first" if _same_runtime(reports) else "ours"
    for side, cases in enumerate(results):
        rows = [row + (side - (len(reports) - 1) / 2) * height for row in range(len(cases))]
        bars = axes.barh(
            rows, [case.series[name].median for case in cases], height=height * 0.92,
            color=_SIDES[side % len(_SIDES)],
            label=labels[side],
        )  # fmt: skip
        words = []
        for case, own in zip(cases, mine, strict=True):
            series = case.series[name]
            against = ratio(own.series[name], series, interleaved=interleaved)
            times = f", {first} {against.median:.2f}x" if side and against is not None else ""
            words.append(f" {shown(series.median, series.unit)}{times}")
        axes.bar_label(bars, words, fontsize=8)
    axes.set_yticks(range(len(mine)), [_short(result, mine) for result in mine])
    axes.invert_yaxis()
    metric = METRICS[name]
    better = "more" if metric.better == "higher" else "less"
    axes.set_title(f"{metric.label} ({better} is better)", fontsize=10, loc="left")
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _same_runtime(reports: Sequence[Report]) -> bool:
    return len({report.runtime for report in reports}) == 1


def _sides(reports: Sequence[Report]) -> tuple[str, ...]:
    """What tells reports apart: runtimes, or models, or that one of two was saved earlier."""
    if not _same_runtime(reports):
        return tuple(report.runtime for report in reports)
    names = tuple(report.model.name for report in reports)
    return _RUNS if len(names) == 2 and len(set(names)) == 1 else names


def _png(draw: Callable[[Any], None], *, height: float) -> bytes:
    """Draw on a figure of 8 inches' width in matplotlib's own style; no date, no version in it."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # All of the defaults but what chooses or starts a window system.
        defaults = matplotlib.rcParamsDefault
        matplotlib.rcParams.update(
            {name: defaults[name] for name in defaults if not name.startswith("backend")}
        )
        figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        raw = io.BytesIO()
        canvas.print_png(raw, metadata={"Software": None})
    return raw.getvalue()


def _title(figure: Any, what: str, report: Report) -> None:
    """Say what is drawn, and below it of which model on which machine."""
    machine, model = report.machine, report.model
    words = ", ".join(filter(None, (model.name, bits_of(model), model.dtype)))
    runs = f"runs: {report.settings.runs}"
    about = f"{words}; {machine.chip} ({machine.device}); {report.runtime}, {runs}"
    lines = textwrap.wrap(about, 105)
    figure.suptitle("\n".join([what, *lines]), fontsize=10)


def _legend(figure: Any, axes: Any, *, last: str) -> None:
    """Put the legend below; matplotlib would name lines before bars, whatever was drawn first."""
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda e: e[1] == last
    )
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)


def _median(result: CaseResult, name: str) -> float | None:
    return result.series[name].median if name in result.series else None


def _before(result: CaseResult, name: str) -> float:
    """Where a stage's bar begins: after all stages before it; for "" where the last one ends."""
    earlier = STAGES[: STAGES.index(name)] if name else STAGES
    return sum(_median(result, stage) or 0.0 for stage in earlier)


def _short(result: CaseResult, among: Sequence[CaseResult]) -> str:
    """A case's name, as short as tells it from the others."""
    case = result.case
    words = [f"{case.resolution} px"]
    if len({other.case.images for other in among}) > 1:
        words.append(f"{case.images} image{'' if case.images == 1 else 's'}")
    if len({other.case.prompt for other in among}) > 1:
        words.append(case.prompt)
    if len({other.case.max_tokens for other in among}) > 1:
        words.append(f"{case.max_tokens} tokens")
    return ", ".join(words)
