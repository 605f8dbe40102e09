"""Kernels that work along rows: norms, softmax, RoPE, reductions; and what they copy first.

A norm, a softmax and RoPE are one launch each. A reduction is one or two: the second adds up what
the first left in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.metal_rules.layout import Layout, collapsed, in_order

_BLOCK_LIMIT = {"rms_norm": 4096, "layer_norm": 6656, "softmax": 4096}
_ALL_REDUCE_AT_ONCE = 4096


def norm(name: str, x: Layout) -> tuple[str, bool]:
    """Return the kernel of `rms_norm` or `layer_norm`, and whether `x` is copied first."""
    return _looped(name, x), not (x.contiguous and _row_after_row(x, ones=True))


def softmax(x: Layout) -> tuple[str, bool]:
    """Return the kernel, and whether `x` is copied first."""
    return _looped("softmax", x), not _row_after_row(x, ones=False)


def _looped(name: str, x: Layout) -> str:
    return f"{name}_looped" if x.shape[-1] > _BLOCK_LIMIT[name] else name


def _row_after_row(x: Layout, *, ones: bool) -> bool:
    if x.strides[-1] != 1:
        return False
    if len(x.shape) < 2:
        return True
    return x.strides[-2] in (0, x.shape[-1]) or (ones and x.shape[-2] == 1)


def rope(x: Layout, dims: int) -> tuple[str, bool]:
    """Return the kernel of RoPE over `dims` of the last axis, and whether `x` is copied first.

    Heads before positions, transposed or sliced, need no copy if the batch is one.
    """
    _, *heads, length, width = x.shape
    name = "rope_single" if x.row_contiguous and length == 1 else "rope"
    if dims < width:
        return name, True
    if x.row_contiguous:
        return name, False
    axes = len(x.shape)
    while axes > 3 and x.shape[-axes] == 1:
        axes -= 1
    if axes == 3:
        return name, False
    count = math.prod(heads)
    turned = (length * count * width, width, count * width)
    return name, not (len(x.shape) == 4 and x.strides[:3] == turned)


def reduction(x: Layout, axes: Sequence[int]) -> tuple[tuple[str, ...], bool]:
    """Return the kernels of a sum or the like over `axes`, and whether `x` is copied first.

    The plan is MLX's `get_reduction_plan`: all of it, rows, or columns. Anything else is copied.
    """
    if len(axes) == len(x.shape) and x.contiguous:
        return (("all_reduce",) if x.size <= _ALL_REDUCE_AT_ONCE else ("all_reduce",) * 2), False
    if not x.row_contiguous:
        if x.strides[max(axes)] == 1 and _merged(x, axes) is not None:
            return ("row_reduce",), False
        return reduction(Layout.row(x.shape), axes)[0], True
    sizes, steps = _merged(x, axes) or ([0], [0])
    if steps[-1] == 1:
        return ("row_reduce",), False
    length = math.prod(sizes)
    outputs = x.size // length
    if length < 32:
        return ("col_reduce_small",), False
    if steps[-1] < 32 and length >= 1024:
        return ("col_reduce_longcolumn", "col_reduce_small"), False
    if length > 256 and outputs // 32 < 1024:
        return ("col_reduce_2pass", "col_reduce_small"), False
    return ("col_reduce_looped",), False


def _merged(x: Layout, axes: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Return sizes and strides of the reduced axes, neighbours in memory merged."""
    kept = sorted(axes)
    sizes, steps = collapsed([x.shape[a] for a in kept], [[x.strides[a] for a in kept]])
    return sizes, steps[0]


def ordered(shape: Sequence[int]) -> Layout:
    """Return the layout of what any of these but a norm writes."""
    return Layout(tuple(shape), in_order(shape))
