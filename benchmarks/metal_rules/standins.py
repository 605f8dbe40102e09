"""A trace of lazy MLX code in which what is one operation on a GPU is one operation.

On a CPU `mx.fast` operations expand to their parts, and the exporter takes compiled functions
apart and merges equal nodes. So for a while stand-ins take their places: each calls the real one
for the shapes and dtypes of what comes out, and returns one `Depends` node of the same inputs
instead. Its last input is a number under which the call is kept. Values mean nothing here.

How many kernels a compiled function becomes is asked of MLX's own compiler (`compiled_launches`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import mlx.core as mx

from benchmarks.graph_trace import VIEWS, compiling, graph, names_drawn

FAST = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
# Two equal arrays of zeros are one node to the exporter, two launches to a GPU; packing and
# unpacking are one launch there and a page of shifts on a CPU.
OTHERS = ("zeros", "ones", "full", "quantize", "dequantize")
# Drawn graphs name a reduction by what it does, exported ones do not.
_EXPORTED_AS = dict.fromkeys(("And", "Or", "Sum", "Prod", "Min", "Max"), "Reduce")
_EXPORTED_AS |= dict.fromkeys(("ArgMin", "ArgMax"), "ArgReduce") | {"Rsqrt": "Sqrt"}
_COMPILED = type(mx.compile(lambda x: x))
# Whose modules are searched for compiled functions.
_PACKAGES = ("fastvlm_mlx", "mlx_lm", "mlx_vlm", "mlx.nn")


@dataclass(frozen=True, slots=True)
class Array:
    """An array of a trace: its name there, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a stand-in took: what of, with which arguments; arrays are None in them."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    array_inputs: int
    taken_by: _Calls


@dataclass(frozen=True, slots=True)
class Operation:
    """A node of a trace; `call` is set where a stand-in stands for it."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...]
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Operations in order, the outputs' names, equal nodes the exporter merged, by name.

    `forms` keeps what the compiler made of each compiled call, asked once.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    merged: Counter[str] = field(default_factory=Counter)
    forms: dict[tuple[object, ...], Counter[str]] = field(default_factory=dict)

    def of_dtype(self, dtype: mx.Dtype) -> int:
        """Count the arrays of a dtype that its operations make."""
        return sum(a.dtype == dtype for o in self.operations for a in o.outputs)


class _Calls:
    """The calls of one stretch under stand-ins, and the originals they stand for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._aside = False

    @contextmanager
    def aside(self) -> Generator[None, None, None]:
        """Let the stand-ins pass every call on to what they stand for."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def stand_in(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._aside:  # a compiled function may call another one
                return function(*arguments, **keywords)
            with self.aside():
                real = function(*arguments, **keywords)
            several = isinstance(real, (tuple, list))
            outputs = list(real) if several else [real]
            given = [*arguments, *keywords.values()]
            arrays = [each for each in given if isinstance(each, mx.array)]
            plain = tuple(None if isinstance(a, mx.array) else a for a in arguments)
            named = {k: None if isinstance(v, mx.array) else v for k, v in keywords.items()}
            self.calls.append(Call(name, function, plain, named, len(arrays), self))
            seeds = [_hollow(each.shape, each.dtype) for each in outputs]
            marker = mx.array(len(self.calls) - 1, dtype=mx.int32)
            made = mx.depends(seeds, [*arrays, marker])
            return type(real)(made) if several else made[0]

        return call


@cache
def _hollow(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    made = mx.broadcast_to(mx.array(0, dtype=dtype), shape)
    mx.eval(made)
    return made


@contextmanager
def standing_in() -> Generator[_Calls, None, None]:
    """Put stand-ins in the places of `mx.fast`'s operations, `OTHERS` and all compiled functions.

    Compiled functions are found as attributes of the loaded modules of `_PACKAGES`; one that a
    closure holds is not found and appears as its parts. Build the model inside as well: some
    layers keep the function they were given. All is put back at the end.
    """
    calls = _Calls()
    places: list[tuple[Any, str, Any]] = [(mx.fast, name, getattr(mx.fast, name)) for name in FAST]
    places += [(mx, name, getattr(mx, name)) for name in OTHERS]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(_PACKAGES):
            found = [(n, v) for n, v in vars(module).items() if type(v) is _COMPILED]
            places += [(module, name, value) for name, value in found]
    made: dict[int, Any] = {}
    for owner, name, original in places:
        kind = name if owner in (mx, mx.fast) else "compiled"
        made.setdefault(id(original), calls.stand_in(kind, original))
        setattr(owner, name, made[id(original)])
    try:
        yield calls
    finally:
        for owner, name, original in places:
            setattr(owner, name, original)


def take(calls: _Calls, function: Callable[..., Any], *inputs: mx.array) -> Trace:
    """Trace `function(*inputs)`, arrays to an array or a tuple of them, under stand-ins.

    `merged` counts, by name, nodes that the exporter gave up for an equal one.
    """
    entries: list[dict[str, Any]] = []
    mx.eval(*inputs)
    # A compiled function that nobody stands for would keep, compiled, what stands in it.
    with compiling(False), mx.stream(mx.cpu):
        mx.export_function(entries.append, function, *inputs)
        drawn = Counter[str]()
        for name, count in names_drawn(function(*inputs)).items():
            drawn[_EXPORTED_AS.get(name, name)] += count
    by_type = {entry["type"]: entry for entry in entries if entry["type"] != "primitive"}
    constants = dict(by_type["constants"]["constants"])
    operations = [
        _operation(entry, calls.calls, constants)
        for entry in entries
        if entry["type"] == "primitive"
    ]
    merged = drawn - Counter(operation.name for operation in operations)
    return Trace(
        tuple(operations),
        tuple(name for name, *_ in by_type["outputs"]["outputs"]),
        Counter({name: n for name, n in merged.items() if name not in VIEWS}),
    )


def _operation(
    entry: dict[str, Any], calls: list[Call], constants: dict[str, mx.array]
) -> Operation:
    inputs, outputs = (
        tuple(Array(name, tuple(shape), dtype) for name, shape, dtype in entry[key])
        for key in ("inputs", "outputs")
    )
    call = None
    if entry["name"] == "Depends":
        marker = constants.get(inputs[-1].name)
        if marker is not None and marker.dtype == mx.int32 and marker.ndim == 0:
            call = calls[cast(int, marker.item())]
            inputs = inputs[-1 - call.array_inputs : -1]
    return Operation(entry["name"], inputs, outputs, tuple(entry["arguments"]), call)


def compiled_launches(call: Call, inputs: tuple[Array, ...]) -> Counter[str]:
    """Count what MLX's compiler makes of a compiled function: nodes by name, views left out.

    Each is one launch on a GPU; a group it fused is one node.
    """
    arrays = iter([_hollow(each.shape, each.dtype) for each in inputs])
    arguments = [next(arrays) if a is None else a for a in call.arguments]
    keywords = {k: next(arrays) if v is None else v for k, v in call.keywords.items()}
    given = [*arguments, *keywords.values()]

    def run(*_: mx.array) -> Any:
        made = call.function(*arguments, **keywords)
        return tuple(made) if isinstance(made, list) else made

    with call.taken_by.aside(), compiling(True):
        counted = graph(run, *[a for a in given if isinstance(a, mx.array)])
    return Counter({name: n for name, n in counted.items() if name not in VIEWS})
