"""What each MIL operation computes, in numpy, by coremltools' documentation of the iOS 16 ops.

One function an operation, its parameters named as MIL names them, float32 in and out; `OPS` maps
MIL's names to them. A parameter or value that is not covered raises. Knows no packages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def conv(
    x: Array,
    weight: Array,
    strides: Array,
    pad_type: Array,
    pad: Array,
    dilations: Array,
    groups: Array,
    bias: Array | None = None,
) -> Array:
    """2-D, `x` [1,C,H,W], `weight` [O,C/groups,kh,kw], `pad` [top,bottom,left,right] of zeros."""
    if str(pad_type) != "custom" or x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"conv: pad_type {pad_type} of {x.shape} is not covered")
    top, bottom, left, right = (int(n) for n in pad)
    x = np.pad(x[0], ((0, 0), (top, bottom), (left, right)))
    n, outputs, inputs = int(groups), weight.shape[0], weight.shape[1]
    if n * inputs != x.shape[0] or outputs % n:
        raise ValueError(f"conv: {n} groups of {inputs} do not fit {x.shape}")
    windows = _Windows(x, weight.shape[2:], strides, dilations)
    filters = weight.reshape(n, outputs // n, *weight.shape[1:])
    run = _depthwise if inputs == 1 else _grouped
    y = run(windows, filters)
    return (y if bias is None else y + bias[:, None, None])[None]


class _Windows:
    """The input values that meet each tap of the kernel, [C, out height, out width]."""

    def __init__(self, x: Array, kernel: tuple[int, ...], strides: Array, dilations: Array) -> None:
        self.x = x
        self.steps = tuple(int(n) for n in strides)
        self.gaps = tuple(int(n) for n in dilations)
        self.size = tuple(
            (length - gap * (taps - 1) - 1) // step + 1
            for length, taps, step, gap in zip(
                x.shape[1:], kernel, self.steps, self.gaps, strict=True
            )
        )

    def tap(self, i: int, j: int, channels: slice) -> Array:
        rows, columns = (
            slice(k * gap, k * gap + step * (size - 1) + 1, step)
            for k, gap, step, size in zip((i, j), self.gaps, self.steps, self.size, strict=True)
        )
        return self.x[channels, rows, columns]


def _taps(filters: Array) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(filters.shape[-2]) for j in range(filters.shape[-1]))


def _depthwise(windows: _Windows, filters: Array) -> Array:
    """One input channel a group: shift, scale and add, a few channels at a time (cache)."""
    groups, multiple = filters.shape[:2]
    y = np.zeros((groups, multiple, *windows.size), np.float32)
    block = max(1, 2**16 // math.prod(windows.size))
    for start in range(0, groups, block):
        part = slice(start, start + block)
        for i, j in _taps(filters):
            tap = windows.tap(i, j, part)
            for m in range(multiple):
                y[part, m] += filters[part, m, 0, i, j][:, None, None] * tap
    return y.reshape(groups * multiple, *windows.size)


def _grouped(windows: _Windows, filters: Array) -> Array:
    """A matrix product for each group and tap."""
    groups, outputs, inputs = filters.shape[:3]
    y = np.zeros((groups, outputs, math.prod(windows.size)), np.float32)
    for g in range(groups):
        part = slice(g * inputs, (g + 1) * inputs)
        for i, j in _taps(filters):
            y[g] += filters[g, :, :, i, j] @ windows.tap(i, j, part).reshape(inputs, -1)
    return y.reshape(groups * outputs, *windows.size)


# erf at multiples of 2^-14 up to 6, where it is 1 in float64; linear between them: error 5e-10.
_ERF_STEPS = 2**14
_ERF_END = 6
_ERF = np.array([math.erf(k / _ERF_STEPS) for k in range(_ERF_END * _ERF_STEPS + 2)])


def erf(x: Array) -> NDArray[np.float64]:
    """Return the error function to 1e-9, for an array that is not large."""
    place = np.minimum(np.abs(x).astype(np.float64), _ERF_END) * _ERF_STEPS
    left = place.astype(np.intp)
    low = _ERF[left]
    return np.copysign(low + (place - left) * (_ERF[left + 1] - low), x)


def gelu(x: Array, mode: Array) -> Array:
    """x times the normal distribution's function, or the approximation of it with tanh."""
    flat, y = x.reshape(-1), np.empty(x.size, np.float32)
    for start in range(0, x.size, 2**15):  # temporaries stay in the cache
        part = flat[start : start + 2**15].astype(np.float64)
        if str(mode) == "EXACT":
            bent = erf(part / math.sqrt(2))
        elif str(mode) == "TANH_APPROXIMATION":
            bent = np.tanh(math.sqrt(2 / math.pi) * (part + 0.044715 * part**3))
        else:
            raise ValueError(f"gelu: mode {mode} is not covered")
        y[start : start + 2**15] = 0.5 * part * (1 + bent)
    return y.reshape(x.shape)


def layer_norm(x: Array, axes: Array, gamma: Array, beta: Array, epsilon: Array) -> Array:
    """Normalise over the last axis; the variance is the biased one."""
    if [int(axis) % x.ndim for axis in axes] != [x.ndim - 1]:
        raise ValueError(f"layer_norm: axes {axes} are not covered")
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + float(epsilon)) * gamma + beta


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: Array, y: Array, transpose_x: Array, transpose_y: Array) -> Array:
    x = x.swapaxes(-1, -2) if transpose_x else x
    return x @ (y.swapaxes(-1, -2) if transpose_y else y)


def softmax(x: Array, axis: Array) -> Array:
    raised = np.exp(x - x.max(int(axis), keepdims=True))
    return raised / raised.sum(int(axis), keepdims=True)


def split(x: Array, num_splits: Array, axis: Array) -> tuple[Array, ...]:
    return tuple(np.split(x, int(num_splits), int(axis)))


def reshape(x: Array, shape: Array) -> Array:
    if 0 in shape:
        raise ValueError("reshape: 0, which copies a size, is not covered")
    return x.reshape(tuple(shape))


def transpose(x: Array, perm: Array) -> Array:
    return x.transpose(tuple(perm))


def reduce_mean(x: Array, axes: Array, keep_dims: Array) -> Array:
    mean = x.mean(tuple(int(axis) for axis in axes), dtype=np.float64, keepdims=bool(keep_dims))
    return np.asarray(mean)


def add(x: Array, y: Array) -> Array:
    return x + y


def mul(x: Array, y: Array) -> Array:
    return x * y


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def cast(x: Array, dtype: Array) -> Array:
    """The interpreter rounds to the dtype that the program declares, which must be this one."""
    if str(dtype) not in ("fp16", "fp32"):
        raise ValueError(f"cast: {dtype} is not covered")
    return x


OPS: dict[str, Callable[..., Array | tuple[Array, ...]]] = {
    function.__name__: function
    for function in (
        add, cast, conv, gelu, layer_norm, linear, matmul, mul, reduce_mean, relu, reshape,
        sigmoid, softmax, split, transpose,
    )
}  # fmt: skip
