"""What MLX does on Metal for each primitive of a trace: views, copies, products, reductions.

A view launches nothing; a reshape of an array that does not lie in order is a copy; an update of a
slice copies the whole array first unless nobody else holds it.
"""

from __future__ import annotations

import math

from benchmarks.metal_rules import convolution, gemm, quantized, rows
from benchmarks.metal_rules.launches import Launches, Rule, width
from benchmarks.metal_rules.layout import Layout
from benchmarks.metal_rules.standins import Operation

ELEMENTWISE = frozenset(
    "Abs Add Ceil Cos Divide Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual Less LessEqual "
    "Log Log1p LogicalAnd LogicalNot LogicalOr LogAddExp Maximum Minimum Multiply Negative "
    "NotEqual Power Remainder Round Select Sigmoid Sign Sin Sqrt Square Subtract Tanh".split()
)
_QUANTIZATION_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def _reshape(at: Launches, o: Operation) -> None:
    layout, copied = at.of(o.inputs[0]).reshaped(o.outputs[0].shape)
    if copied:
        at.copy(o.inputs[0], "reshape of an array that does not lie in order")
        at.put(o, layout)
    else:
        at.put_views(o, layout)


def _elementwise(at: Launches, o: Operation) -> None:
    at.elementwise(o, o.name)


def _transpose(at: Launches, o: Operation) -> None:
    at.put_views(o, at.of(o.inputs[0]).transposed(o.arguments[0]))


def _broadcast(at: Launches, o: Operation) -> None:
    at.put_views(o, at.of(o.inputs[0]).broadcast(o.outputs[0].shape))


def _expand(at: Launches, o: Operation) -> None:
    at.put_views(o, at.of(o.inputs[0]).expanded(o.arguments[0]))


def _squeeze(at: Launches, o: Operation) -> None:
    at.put_views(o, at.of(o.inputs[0]).squeezed(o.arguments[0]))


def _slice(at: Launches, o: Operation) -> None:
    at.put_views(o, at.of(o.inputs[0]).sliced(*o.arguments))


def _split(at: Launches, o: Operation) -> None:
    at.put_views(o, *at.of(o.inputs[0]).split(*o.arguments))


def _as_it_is(at: Launches, o: Operation) -> None:
    at.put_views(o, *(at.of(array) for array in o.inputs[: len(o.outputs)]))


def _cast(at: Launches, o: Operation) -> None:
    array, out = o.inputs[0], o.outputs[0]
    layout = at.of(array)
    if array.dtype == out.dtype and at.is_donated(array):
        at.put_views(o, layout)
        return
    note = f"{array.dtype} to {out.dtype}".replace("mlx.core.", "")
    written = (layout.stored if layout.contiguous else layout.size) * width(out)
    at.launch("cast", "copy_cast", layout.stored * width(array), written, note=note)
    at.put(o, layout if layout.contiguous else Layout.row(layout.shape))


def fill(at: Launches, o: Operation) -> None:
    out = o.outputs[0]
    at.launch("fill", "fill", 0, math.prod(out.shape) * width(out))


def _contiguous(at: Launches, o: Operation) -> None:
    if not at.of(o.inputs[0]).row_contiguous:
        at.copy(o.inputs[0], "made contiguous")


def _concatenate(at: Launches, o: Operation) -> None:
    for array in o.inputs:
        at.copy(array, "concatenate")


def _slice_update(at: Launches, o: Operation) -> None:
    base, update = o.inputs
    if not at.is_donated(base):
        at.copy(base, "the whole array, which is held elsewhere, before a slice is written")
    at.copy(update, "written into a slice")


def _convolution(at: Launches, o: Operation) -> None:
    image, weight = o.inputs
    out = o.outputs[0]
    for array in o.inputs:
        if not at.of(array).row_contiguous:
            at.copy(array, "input of a convolution")
    name = convolution.family(image.shape, weight.shape, out.shape, o.arguments)
    note = f"{name}: " + " * ".join("x".join(map(str, a.shape)) for a in o.inputs)
    slow = convolution.slow_reason(name, weight.shape)
    for kernel in convolution.launches(name):
        at.launch("convolution", kernel, *at.bytes_of(o), slow=slow, note=note)
        slow = ""


def _product(at: Launches, o: Operation) -> None:
    a, b, *c = o.inputs
    added = at.of(c[0]).broadcast(o.outputs[0].shape) if c else None
    made, copies = gemm.product(at.of(a), at.of(b), added, o.outputs[0].shape, o.outputs[0].dtype)
    for array in (a, b):
        if at.of(array) in copies:
            at.copy(array, "operand of a product")
    for kernel in gemm.kernels(made, at.chip):
        at.launch("gemm", kernel, *at.bytes_of(o), note=str(made))


def _quantized_product(at: Launches, o: Operation) -> None:
    x, w = o.inputs[:2]
    group_size, bits, mode, transposed = o.arguments
    lying = at.of(x)
    if (lying.strides[-2], lying.strides[-1]) != (x.shape[-1], 1):
        at.copy(x, "input of a packed product")
        lying = Layout.row(x.shape)
    n, k = o.outputs[0].shape[-1], x.shape[-1]
    one = len(w.shape) == 2 and lying.row_contiguous
    m = lying.size // k if one else x.shape[-2]
    batch = math.prod(o.outputs[0].shape) // (m * n)
    names = quantized.kernels(
        m, n, k, batch,
        group_size=group_size, bits=bits, mode=_QUANTIZATION_MODES[mode],
        transposed=transposed, chip=at.chip,
    )  # fmt: skip
    for name in names:
        at.launch("quantized", name, *at.bytes_of(o), note=f"M{m} N{n} K{k} {bits}-bit")


def one_launch(kind: str, name: str) -> Rule:
    def launch(at: Launches, o: Operation) -> None:
        at.launch(kind, name, *at.bytes_of(o))

    return launch


def _softmax(at: Launches, o: Operation) -> None:
    name, copied = rows.softmax(at.of(o.inputs[0]))
    if copied:
        at.copy(o.inputs[0], "input of a softmax")
    at.launch("softmax", name, *at.bytes_of(o))


def _reduce(at: Launches, o: Operation) -> None:
    names, copied = rows.reduction(at.of(o.inputs[0]), o.arguments[1])
    if copied:
        at.copy(o.inputs[0], "input of a reduction")
    for name in names:
        at.launch("reduction", name, *at.bytes_of(o))


RULES: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, _elementwise) | {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Unflatten": _reshape,
    "Transpose": _transpose,
    "Broadcast": _broadcast,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Split": _split,
    "Depends": _as_it_is,
    "StopGradient": _as_it_is,
    "Copy": _as_it_is,
    "AsType": _cast,
    "Full": fill,
    "Arange": fill,
    "Contiguous": _contiguous,
    "Concatenate": _concatenate,
    "SliceUpdate": _slice_update,
    "Convolution": _convolution,
    "AddMM": _product,
    "Matmul": _product,
    "QuantizedMatmul": _quantized_product,
    "Gather": one_launch("gather", "gather"),
    "GatherAxis": one_launch("gather", "gather_axis"),
    "ArgReduce": one_launch("arg-reduce", "arg_reduce"),
    "LogSumExp": one_launch("reduction", "logsumexp"),
    "Softmax": _softmax,
    "Reduce": _reduce,
}
