"""The growth of cost as a picture: four panels, measured points, the fit, the formula's shape.

Knows `growth.py`'s result and matplotlib, which is imported nowhere else under `benchmarks/`.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 120
MEASURED, FITTED, FORMULA = "#4477aa", "#222222", "#ee6677"
# What the formula's curve counts; it is drawn through the point where the machine was fastest.
_COUNTS = {"vision": "flops", "prefill": "flops", "decode": "moved_bytes"}
_WORDS = {"flops": "operations at the best rate seen", "moved_bytes": "bytes at the best rate seen"}


def draw(result: dict[str, Any]) -> bytes:
    """Return a PNG of vision, prefill and decode, and of the memory each needs."""
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": ""}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2).ravel()
        for axes, kind in zip(panels, _COUNTS, strict=False):
            _times(axes, kind, result[kind])
        _memory(panels[3], result)
        machine = result["machine"]
        about = (result["model"], result["dtype"], result["forms"], machine["chip"])
        figure.suptitle(", ".join(about))
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _times(axes: Any, kind: str, found: dict[str, Any]) -> None:
    points = found["points"]
    xs = [point["x"] for point in points]
    for point in points:
        axes.plot([point["x"]] * len(point["ms"]), point["ms"], ".", color=MEASURED, alpha=0.4)
    axes.plot(xs, [p["best_ms"] for p in points], "o", color=MEASURED, label="best of rounds")
    residual = found["worst_residual"]
    fit_ms = found["fit_ms"]
    steps = [xs[0] + (xs[-1] - xs[0]) * i / 100 for i in range(101)]
    powers = {"constant": 0, "linear": 1, "square": 2}
    curve = [sum(f * x ** powers[name] for name, f in fit_ms.items()) for x in steps]
    axes.plot(steps, curve, color=FITTED, label=f"fit, worst point {residual:.0%} off")
    count = _COUNTS[kind]
    rate = min(point["best_ms"] / point[count] for point in points)
    axes.plot(xs, [p[count] * rate for p in points], "--", color=FORMULA, label=_WORDS[count])
    axes.set(xlabel=found["unit"], ylabel="ms", title=f"{kind}: time", xlim=(0, None))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _memory(axes: Any, result: dict[str, Any]) -> None:
    for kind, colour in zip(_COUNTS, (MEASURED, FITTED, FORMULA), strict=True):
        points = result[kind]["points"]
        largest = points[-1]["x"]
        shares = [point["x"] / largest for point in points]
        unit = result[kind]["unit"]
        name = f"{kind}: at most ({largest:,} {unit})"
        peaks = [point["peak_bytes"] / 2**20 for point in points]
        axes.plot(shares, peaks, "o-", color=colour, label=name)
        if kind == "decode":
            held = [point["held_bytes"] / 2**20 for point in points]
            axes.plot(shares, held, "s--", color=colour, label="KV cache held")
    axes.set(
        xlabel="share of the largest size", ylabel="MiB beyond the weights", title="memory",
        xlim=(0, None),
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
