"""What a piece of MLX code would compute, counted without running it; and what it waits for.

Knows MLX's primitives by name and the calls by which Python waits for MLX; which kernels Metal runs
them with is in `metal_rules`. Knows no model: the tests count ours with it, and
`peers/` counts other projects' code by the same rules.

Two views of a lazy computation: `trace` (every primitive with shapes, dtypes and arguments;
compiled functions appear as their parts) and `graph` (names only, each compiled function one
node). Both are taken on the CPU stream, where `mx.fast` operations expand to their parts, so that
the counts are the same on every machine.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.metal_rules import convolution

# Primitives that only describe the same values anew. A reshape or a transposition may still copy.
VIEWS = frozenset(
    "Broadcast ExpandDims Flatten Reshape Slice Split Squeeze Transpose Unflatten View".split()
)
PRODUCTS = frozenset(("Matmul", "AddMM", "QuantizedMatmul", "Convolution"))


@dataclass(frozen=True, slots=True)
class Primitive:
    """One operation: shapes and dtypes of what goes in and comes out, MLX's own arguments."""

    name: str
    inputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    arguments: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its first output."""
        return self.outputs[0][0]

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of its first output."""
        return self.outputs[0][1]


def trace(function: Callable[..., Any], *inputs: mx.array) -> list[Primitive]:
    """Return every primitive of `function(*inputs)`, in order, compiled functions taken apart."""
    entries: list[dict[str, Any]] = []
    with mx.stream(mx.cpu):
        mx.export_function(entries.append, function, *inputs)
    return [
        Primitive(
            entry["name"],
            tuple((tuple(shape), dtype) for _, shape, dtype in entry["inputs"]),
            tuple((tuple(shape), dtype) for _, shape, dtype in entry["outputs"]),
            tuple(entry["arguments"]),
        )
        for entry in entries
        if entry["type"] == "primitive"
    ]


def graph(function: Callable[..., Any], *inputs: mx.array) -> Counter[str]:
    """Count the primitives of `function(*inputs)` by name; a compiled function is one.

    Its outputs must be arrays or a tuple of arrays. Nothing is evaluated but the inputs.
    """
    mx.eval(*inputs)
    with mx.stream(mx.cpu):
        return names_drawn(function(*inputs))


def names_drawn(outputs: mx.array | Sequence[mx.array]) -> Counter[str]:
    """Count the primitives that lazy arrays would be computed by, by name."""
    drawn = io.StringIO()
    mx.export_to_dot(drawn, *((outputs,) if isinstance(outputs, mx.array) else outputs))
    return Counter(re.findall(r'label ="([^"]*)"', drawn.getvalue()))


def work(counts: Counter[str]) -> int:
    """Return how many of the counted primitives compute something: all but the views."""
    return sum(count for name, count in counts.items() if name not in VIEWS)


def hollow(module: nn.Module) -> nn.Module:
    """Give a module weights of the right shape that take no memory, for tracing only."""

    def empty(array: mx.array) -> mx.array:
        return mx.broadcast_to(mx.array(0, dtype=array.dtype), array.shape)

    module.update(tree_map(empty, module.parameters()))
    mx.eval(module.parameters())
    return module


@contextmanager
def compiling(on: bool) -> Generator[None, None, None]:
    """Turn `mx.compile` on or off for a while; afterwards it is as it was.

    MLX does not say whether it is on, so a probe is compiled and looked at (never run).
    """
    probe = mx.compile(lambda x: mx.exp(mx.sin(x)))
    before = any(name.startswith("Compiled") for name in graph(probe, mx.array(0.0)))
    _compile(on)
    try:
        yield
    finally:
        _compile(before)


def _compile(on: bool) -> None:
    (mx.enable_compile if on else mx.disable_compile)()


def metal_kernel(conv: Primitive) -> str:
    """Name the kernel family that MLX's Metal backend would run a 2-D convolution with.

    The rule is in `metal_rules.convolution`. Fast are "depthwise", "winograd", and "implicit_gemm"
    of an ungrouped convolution.
    """
    return convolution.family(conv.inputs[0][0], conv.inputs[1][0], conv.shape, conv.arguments)


def is_pointwise(conv: Primitive) -> bool:
    """Whether a convolution's kernel is 1x1."""
    return math.prod(conv.inputs[1][0][1:3]) == 1


def convolutions(primitives: Sequence[Primitive]) -> list[Primitive]:
    """Return the convolutions among the primitives."""
    return [primitive for primitive in primitives if primitive.name == "Convolution"]


def is_dense(conv: Primitive) -> bool:
    """Whether a convolution mixes channels over a window: ungrouped and not 1x1."""
    return conv.arguments[5] == 1 and not is_pointwise(conv)


# What makes Python wait for MLX, or hands it work. numpy's buffer protocol is not caught.
_FUNCTIONS = ("eval", "async_eval", "synchronize", "clear_cache")
_METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__iter__")


@contextmanager
def host_calls() -> Generator[list[str], None, None]:
    """Collect, in order, the names of the calls that wait for MLX or dispatch work to it.

    `mx.eval` and the like are replaced for a while; a module that imported them by name escapes.
    """
    calls: list[str] = []
    originals: list[tuple[Any, str, Any]] = [(mx, name, getattr(mx, name)) for name in _FUNCTIONS]
    originals += [
        (mx.array, name, getattr(mx.array, name)) for name in _METHODS if hasattr(mx.array, name)
    ]

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, watched(name, original))
    try:
        yield calls
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
