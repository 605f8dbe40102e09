"""What a replay has found so far: how each array lies, and the kernels launched, in order.

Knows layouts and kernels, and how an elementwise result lies. Knows no other rule. Weights and
inputs are taken to lie in order, whatever stands for them in a trace.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from benchmarks.metal_rules.chips import Chip
from benchmarks.metal_rules.kernels import Kernel
from benchmarks.metal_rules.layout import Layout
from benchmarks.metal_rules.standins import Array, Operation, Trace


class Launches:
    """The kernels of one trace on one chip, as far as it was gone through."""

    def __init__(self, trace: Trace, chip: Chip) -> None:
        self.chip = chip
        self.trace = trace
        self.kernels: list[Kernel] = []
        self.layouts: dict[str, Layout] = {}
        self.seen_of: dict[str, str] = {}  # a view, and what it is a view of
        self.drawn: list[tuple[Kernel, str]] = []  # elementwise kernels and what they make
        self.held = Counter(array.name for o in trace.operations for array in o.inputs)
        self.held.update(trace.outputs)

    def of(self, array: Array) -> Layout:
        """Return how an array lies."""
        if array.name not in self.layouts:
            self.layouts[array.name] = Layout.row(array.shape)
        return self.layouts[array.name]

    def put(self, operation: Operation, *layouts: Layout) -> None:
        """Keep how an operation's outputs lie."""
        for array, layout in zip(operation.outputs, layouts, strict=True):
            self.layouts[array.name] = layout

    def put_views(self, operation: Operation, *layouts: Layout) -> None:
        """Keep how the outputs lie, which are views of the first input."""
        self.put(operation, *layouts)
        for array in operation.outputs:
            self.seen_of[array.name] = operation.inputs[0].name

    def launch(
        self, kind: str, name: str, read: int, written: int, *, slow: str = "", note: str = ""
    ) -> None:
        """Add a kernel that reads and writes so many bytes."""
        self.kernels.append(Kernel(kind, name, read, written, slow, note))

    def copy(self, array: Array, why: str) -> None:
        """Add the copy of an array that does not lie as the next kernel needs it."""
        stored, whole = self.of(array).stored, math.prod(array.shape)
        self.launch("copy", "copy", stored * width(array), whole * width(array), note=why)

    def bytes_of(self, operation: Operation) -> tuple[int, int]:
        """Return the bytes an operation reads, repeated ones once, and those it writes."""
        read = sum(self.of(array).stored * width(array) for array in operation.inputs)
        return read, sum(math.prod(array.shape) * width(array) for array in operation.outputs)

    def is_donated(self, array: Array) -> bool:
        """Whether an operation may write into this input: nobody else reads or holds its memory.

        What a graph is given counts as given up: it is the KV cache, whose old array is dropped.
        """
        name: str | None = array.name
        while name is not None:
            if self.held[name] != 1:
                return False
            name = self.seen_of.get(name)
        return self.of(array).contiguous

    def elementwise(self, operation: Operation, name: str) -> None:
        """One launch; what comes out lies as the inputs do if they lie alike, else in order."""
        read = sum(self.of(array).stored * width(array) for array in operation.inputs)
        written = 0
        for output in operation.outputs:
            self.layouts[output.name] = layout = self._shared(operation.inputs, output)
            written += layout.stored * width(output)
        note = "x".join(map(str, operation.outputs[0].shape))
        self.launch("elementwise", name, read, written, note=note)
        self.drawn.append((self.kernels[-1], operation.outputs[0].name))

    def _shared(self, inputs: Sequence[Array], output: Array) -> Layout:
        """Return how an elementwise result lies: as the first input if all lie in one order.

        Strides of axes of one element are taken over as they are, which later copies can hang on.
        """
        whole = [self.of(a) for a in inputs if self.of(a).stored > 1]
        if not whole or any(layout.shape != output.shape for layout in whole):
            return Layout.row(output.shape)
        one = len(whole) == 1 and whole[0].contiguous
        in_one_order = all(layout.row_contiguous for layout in whole) or all(
            layout.column_contiguous for layout in whole
        )
        return whole[0] if one or in_one_order else Layout.row(output.shape)


def width(array: Array) -> int:
    """Return bytes an element."""
    return int(array.dtype.size)


Rule: TypeAlias = Callable[[Launches, Operation], None]
