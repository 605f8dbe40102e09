"""What MLX reaches on this machine: operations and bytes a second, measured in some three seconds.

Knows two things to run: products of square matrices, growing while time is left, and what does
little but read memory. The best of several rounds of several runs counts, since other work only
ever slows them down. If it lasts as long as the probe, even the best is too low: a program that
later finds the machine quiet can pass what is called a peak here. Knows no chip's specification,
and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from fastvlm_mlx.bench.limits import Peaks

SECONDS = 3.0
"""About how long a probe takes; a slow machine's one run of each thing may exceed it."""
ROUNDS = 3
"""How often all is measured, one round after the other."""
BUFFER_BYTES = 2**28
"""Far more than any cache; at most three of them are held at once."""

_SMALLEST, _LARGEST = 256, 8192
_REPEATS = 5


def measure_peaks(
    dtype: mx.Dtype, *, seconds: float = SECONDS, buffer_bytes: int = BUFFER_BYTES
) -> Peaks:
    """Measure the default device: products in `dtype`, and memory by `buffer_bytes` at a time.

    Returns what was best, and in `how` what that was. Nothing of it stays in memory.
    """
    name = str(dtype).rpartition(".")[2]
    each = seconds / ROUNDS / 2
    products: list[tuple[int, float]] = []
    streams: list[tuple[str, float]] = []
    for _ in range(ROUNDS):
        products += _products(dtype, each, buffer_bytes)
        streams += _streams(dtype, each, buffer_bytes)
    mx.clear_cache()
    side, flops_s = max(products, key=lambda measured: measured[1])
    what, bandwidth = max(streams, key=lambda measured: measured[1])
    return Peaks(
        flops_s=flops_s,
        bandwidth_bytes_s=bandwidth,
        dtype=name,
        how=f"measured, the best of {ROUNDS} rounds: a product of {side} x {side}, {what}",
    )


def _products(dtype: mx.Dtype, seconds: float, buffer_bytes: int) -> Iterator[tuple[int, float]]:
    """Yield (side, operations a second) of products of growing square matrices."""
    end = time.perf_counter() + seconds
    side = _SMALLEST
    while side <= _LARGEST and side * side * dtype.size <= buffer_bytes:
        a = mx.random.uniform(shape=(side, side)).astype(dtype)
        b = mx.random.uniform(shape=(side, side)).astype(dtype)
        mx.eval(a, b)
        best = _best(partial(mx.matmul, a, b), end)
        yield side, 2 * side**3 / best
        side *= 2
        # Twice the side is eight times the work, once to warm up and once to count.
        if time.perf_counter() + 2 * 8 * best > end:
            return


def _streams(dtype: mx.Dtype, seconds: float, buffer_bytes: int) -> Iterator[tuple[str, float]]:
    """Yield (what was run, bytes a second) of a sum of two arrays and a matrix times a vector.

    The second because it is what decoding does, and on a CPU runs on more cores than the first.
    """
    start = time.perf_counter()
    columns = 4096
    rows = max(1, buffer_bytes // dtype.size // columns)
    a = mx.ones((rows, columns), dtype=dtype)
    vector = mx.ones((columns, 1), dtype=dtype)
    mx.eval(a, vector)
    best = _best(lambda: a @ vector, start + seconds / 2)
    yield "a matrix times a vector", a.nbytes / best
    b = mx.ones((rows, columns), dtype=dtype)
    mx.eval(b)
    best = _best(lambda: a + b, start + seconds)
    yield "a sum of two arrays", 3 * a.nbytes / best


def _best(run: Callable[[], mx.array], end: float) -> float:
    """Return the seconds of the fastest of some runs after one to warm up; at least one counts."""
    mx.eval(run())
    best = float("inf")
    for count in range(_REPEATS):
        since = time.perf_counter()
        if count and since + best > end:
            break
        mx.eval(run())
        best = min(best, time.perf_counter() - since)
    return best
