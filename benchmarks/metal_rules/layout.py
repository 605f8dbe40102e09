"""How MLX lays an array out: strides in elements, what a view does to them, which view must copy.

Knows MLX's flags (contiguous: no holes; row-contiguous: in order) and the rule by which a reshape
copies. Knows no values and no offsets. The tests compare it with arrays that MLX really made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


def in_order(shape: Sequence[int]) -> Shape:
    """Return the strides of a row-contiguous array."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape and strides; a stride of 0 repeats one element."""

    shape: Shape
    strides: Shape

    @classmethod
    def row(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of a fresh array."""
        return cls(tuple(shape), in_order(shape))

    @property
    def size(self) -> int:
        """Elements as read."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Elements in memory: repeated ones count once."""
        return math.prod(n for n, step in zip(self.shape, self.strides, strict=True) if step)

    @property
    def contiguous(self) -> bool:
        """Whether the memory it spans has no holes; the order may be any."""
        pairs = list(zip(self.shape, self.strides, strict=True))
        return 1 + sum((n - 1) * abs(step) for n, step in pairs) == self.stored

    @property
    def row_contiguous(self) -> bool:
        """Whether its elements lie in order; axes of one element do not matter."""
        return self._ordered(in_order(self.shape))

    @property
    def column_contiguous(self) -> bool:
        """Whether its elements lie in order, first axis fastest."""
        return self._ordered(tuple(reversed(in_order(self.shape[::-1]))))

    def _ordered(self, wanted: Shape) -> bool:
        given = zip(self.shape, self.strides, wanted, strict=True)
        return all(n == 1 or step == want for n, step, want in given)

    def transposed(self, axes: Sequence[int]) -> Layout:
        return Layout(
            tuple(self.shape[axis] for axis in axes), tuple(self.strides[axis] for axis in axes)
        )

    def broadcast(self, shape: Sequence[int]) -> Layout:
        """Repeat axes of one element, and add axes in front, until the shape is `shape`."""
        missing = len(shape) - len(self.shape)
        steps = [0 if n == 1 else step for n, step in zip(self.shape, self.strides, strict=True)]
        return Layout(tuple(shape), (0,) * missing + tuple(steps))

    def sliced(self, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Layout:
        shape = [
            max(0, -(-(stop - start) // step))
            for start, stop, step in zip(starts, stops, steps, strict=True)
        ]
        strides = [old * step for old, step in zip(self.strides, steps, strict=True)]
        return Layout(tuple(shape), tuple(strides))

    def split(self, ends: Sequence[int], axis: int) -> tuple[Layout, ...]:
        """Cut one axis at `ends`."""
        bounds = [0, *ends, self.shape[axis]]
        parts = []
        for start, stop in itertools.pairwise(bounds):
            shape = list(self.shape)
            shape[axis] = stop - start
            parts.append(Layout(tuple(shape), self.strides))
        return tuple(parts)

    def expanded(self, axes: Sequence[int]) -> Layout:
        """Add axes of one element at these places of the result."""
        shape, strides = list(self.shape), list(self.strides)
        for axis in sorted(axes):
            shape.insert(axis, 1)
            strides.insert(axis, 1)
        return Layout(tuple(shape), tuple(strides))

    def squeezed(self, axes: Sequence[int]) -> Layout:
        """Drop axes of one element."""
        kept = [axis for axis in range(len(self.shape)) if axis not in axes]
        return self.transposed(kept)

    def reshaped(self, shape: Sequence[int]) -> tuple[Layout, bool]:
        """Return the layout of a reshape, and whether MLX must copy for it (`prepare_reshape`)."""
        if self.size == 0 or self.row_contiguous:
            return Layout.row(shape), False
        sizes, (strides_in,) = collapsed(self.shape, [self.strides])
        strides: list[int] = []
        at = 0
        for n in shape:
            if at < len(sizes) and sizes[at] % n == 0:
                sizes[at] //= n
                strides.append(sizes[at] * strides_in[at])
                at += sizes[at] <= 1
            elif n == 1:
                strides.append(strides[-1])
            else:
                return Layout.row(shape), True
        return Layout(tuple(shape), tuple(strides)), False


def collapsed(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring axes that lie one behind the other in each of several arrays."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        if sizes and all(s[axis] * n == kept[-1] for s, kept in zip(strides, steps, strict=True)):
            sizes[-1] *= n
            for s, kept in zip(strides, steps, strict=True):
                kept[-1] = s[axis]
        else:
            sizes.append(n)
            for s, kept in zip(strides, steps, strict=True):
                kept.append(s[axis])
    if not sizes:
        return [1], [[0] for _ in strides]
    return sizes, steps
