"""Figures as people read them: a number with its unit, a slow tail, a drift.

Knows units and which way is better. Knows no table, no file and no clock.
"""

from __future__ import annotations

import math

from fastvlm_mlx.bench.results import METRICS, Better, Metric, ModelCard, Series
from fastvlm_mlx.checkpoint.memory import readable_bytes

DRIFT = 1.1
"""Last third against first third above which a drift is worth a remark."""
COLD = "cold_"
"""How the names of a cold start's parts begin."""
_DRIFT_NEEDS = 6  # thirds of two measurements at least: of one each they would show noise


def metric_of(name: str, series: Series) -> Metric:
    """Return what METRICS says of a figure; one it does not know is its name, lower is better."""
    return METRICS.get(name) or Metric(name, series.unit)


def label_of(name: str) -> str:
    """Return what people call a figure; a part of the cold start is its name's own words."""
    if name in METRICS:
        return METRICS[name].label
    return name.removeprefix(COLD).removesuffix("_ms").removesuffix("_bytes").replace("_", " ")


def bits_of(model: ModelCard) -> str:
    """Return how weights are packed, "" where the model's name says it already."""
    if not model.quantization.isdecimal():
        return model.quantization
    words = f"{model.quantization} bits"
    return "" if words in model.name else words


def ordered(series: dict[str, Series]) -> list[str]:
    """Return the names of some figures in the order of METRICS, a cold start's parts after it.

    What METRICS does not know comes last.
    """
    others = [name for name in series if name not in METRICS]
    parts = [name for name in others if name.startswith(COLD)]
    names: list[str] = []
    for name in METRICS:
        if name in series:
            names += [name, *parts] if name == "cold_ttft_ms" else [name]
    return names + [name for name in others if name not in names]


def number(value: float) -> str:
    """Return three digits, or more before the point: 0.42, 7.31, 42.1, 421, 1234."""
    size = abs(value)
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def shown(value: float, unit: str) -> str:
    """Return a figure with its unit: 42.1 ms, 55.3 tok/s, 1.52 GB."""
    if unit == "bytes":
        return readable_bytes(round(value))
    return f"{number(value)} {'tok/s' if unit == 'tokens/s' else unit}"


def slow_tail(series: Series, better: Better) -> float:
    """Return what nine runs of ten were as good as: p90, or the 10th percentile of a speed.

    Nearest rank: the worst value but one tenth of them.
    """
    if better == "lower":
        return series.p90
    return sorted(series.values, reverse=True)[math.ceil(0.9 * series.n) - 1]


def fast_tail(series: Series, better: Better) -> float:
    """Return what nine runs of ten were no better than: the mirror of `slow_tail`."""
    return slow_tail(series, "higher" if better == "lower" else "lower")


def worse_by(now: float, before: float, better: Better) -> float:
    """Return how many times worse `now` is than `before`: 1 is equal, above it is worse."""
    worse, good = (now, before) if better == "lower" else (before, now)
    if good == 0:
        return math.inf if worse > 0 else 1.0
    return worse / good


def drift(series: Series, better: Better) -> float | None:
    """Return how many times worse the last third is than the first; None with too few runs."""
    if series.n < _DRIFT_NEEDS or series.unit == "bytes":
        return None
    return worse_by(series.last_third, series.first_third, better)
