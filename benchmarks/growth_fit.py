"""Fits a cost's own terms to measurements: least squares of relative errors, no term below zero.

Knows numbers only. Relative, because the largest size takes a hundred times the smallest and would
else decide alone; not below zero, because no work takes negative time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Term = Callable[[float], float]
TERMS: dict[str, Term] = {"constant": lambda _: 1.0, "linear": float, "square": lambda x: x * x}


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients by term's name, and how far off the worst point is, relative to it."""

    coefficients: Mapping[str, float]
    worst_residual: float

    def at(self, x: float) -> float:
        """The fitted value at `x`."""
        return sum(factor * TERMS[name](x) for name, factor in self.coefficients.items())

    def shares(self, x: float) -> dict[str, float]:
        """Each term's part of the fitted value at `x`."""
        return {
            name: factor * TERMS[name](x) / self.at(x) for name, factor in self.coefficients.items()
        }


def fit(xs: Sequence[float], ys: Sequence[float], terms: Sequence[str]) -> Fit:
    """Fit the sum of `terms` (names of TERMS), each times a factor of at least zero.

    Every subset of the terms is solved and the best without a negative factor taken: exact for the
    two or three there are. Raises ValueError for fewer points than terms, or values not above zero.
    """
    if len(xs) != len(ys) or len(xs) < len(terms) or min(ys) <= 0:
        raise ValueError("a fit needs as many points as terms, and values above zero")
    y = np.array(ys, dtype=np.float64)
    columns = {name: np.array([TERMS[name](x) for x in xs]) / y for name in terms}
    best: tuple[float, dict[str, float]] | None = None
    for count in range(1, len(terms) + 1):
        for chosen in itertools.combinations(terms, count):
            matrix = np.stack([columns[name] for name in chosen], axis=1)
            scale = np.abs(matrix).max(axis=0)
            factors = np.linalg.lstsq(matrix / scale, np.ones(len(y)), rcond=None)[0] / scale
            error = float(np.sum((matrix @ factors - 1) ** 2))
            if min(factors) >= 0 and (best is None or error < best[0] - 1e-15):
                best = error, dict(zip(chosen, map(float, factors), strict=True))
    if best is None:
        raise ValueError("no term fits with a factor of at least zero")
    found = Fit({name: best[1].get(name, 0.0) for name in terms}, 0.0)
    worst = max(abs(found.at(x) - value) / value for x, value in zip(xs, ys, strict=True))
    return Fit(found.coefficients, worst)
