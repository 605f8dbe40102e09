"""What MLX does on Metal for the calls that stand-ins took: `mx.fast`, compiled, fills."""

from __future__ import annotations

import math

from benchmarks.metal_rules import UnknownRule, attention, gemm, rows
from benchmarks.metal_rules.launches import Launches, Rule, width
from benchmarks.metal_rules.layout import Layout
from benchmarks.metal_rules.operations import ELEMENTWISE, fill, one_launch
from benchmarks.metal_rules.standins import Operation, compiled_launches


def _compiled(at: Launches, o: Operation) -> None:
    """Add what MLX's compiler makes of a compiled function."""
    call = o.call
    assert call is not None
    shapes = tuple((a.shape, str(a.dtype)) for a in o.inputs)
    form = (id(call.function), shapes, repr(call.arguments), repr(call.keywords))
    if form not in at.trace.forms:
        at.trace.forms[form] = compiled_launches(call, o.inputs)
    counted = at.trace.forms[form]
    if counted.total() == 1:
        at.elementwise(o, next(iter(counted)))
        return
    for name, count in counted.items():
        if not (name in ELEMENTWISE or name.startswith("Compiled") or name == "AsType"):
            raise UnknownRule(f"a compiled function holds {name}, which is not fused")
        for _ in range(count):
            at.elementwise(o, name)


def _norm(at: Launches, o: Operation) -> None:
    assert o.call is not None
    layout = at.of(o.inputs[0])
    name, copied = rows.norm(o.call.name, layout)
    if copied:
        at.copy(o.inputs[0], "input of a norm")
        layout = Layout.row(layout.shape)
    at.launch("norm", name, *at.bytes_of(o))
    at.put(o, layout)


def _rope(at: Launches, o: Operation) -> None:
    assert o.call is not None
    name, copied = rows.rope(at.of(o.inputs[0]), o.call.arguments[1])
    if copied:
        at.copy(o.inputs[0], "input of RoPE")
    at.launch("rope", name, *at.bytes_of(o))


def _attention(at: Launches, o: Operation) -> None:
    assert o.call is not None
    q, k, v = (at.of(array) for array in o.inputs[:3])
    mask = o.call.keywords.get("mask")
    causal = isinstance(mask, str)
    masked = len(o.inputs) > 3
    if attention.is_fused(q, k, v, causal=causal, masked=masked, chip=at.chip):
        names, copies, written = attention.fused(q, k, v, at.chip)
        for array in o.inputs[:3]:
            if at.of(array) in copies:
                at.copy(array, "operand of attention")
        for name in names:
            at.launch("attention", name, *at.bytes_of(o))
        at.put(o, written)
        return
    _unfused(at, o, causal=causal, masked=masked)


def _unfused(at: Launches, o: Operation, *, causal: bool, masked: bool) -> None:
    q, k, v = (at.of(array) for array in o.inputs[:3])
    item, dtype = width(o.outputs[0]), o.outputs[0].dtype
    batch, heads, queries, head_dim = q.shape
    shared = k.shape[1]
    groups = (batch, shared) if shared == heads else (batch, shared, heads // shared)
    lying = [
        each if shared == heads else Layout(
            (*each.shape[:2], 1, *each.shape[2:]), (*each.strides[:2], 0, *each.strides[2:])
        ).broadcast((*groups, *each.shape[2:]))
        for each in (k, v)
    ]  # fmt: skip
    swapped = (*range(len(groups)), len(groups) + 1, len(groups))
    scores = (*groups, queries, k.shape[2])
    for name, read, written in attention.unfused_elementwise(q, k, causal=causal, masked=masked):
        at.launch("elementwise", name, read * item, written * item, note="unfused attention")
    fresh = Layout.row((*groups, queries, head_dim))
    pairs = (
        (fresh, lying[0].transposed(swapped), scores),
        (Layout.row(scores), lying[1], (*groups, queries, v.shape[3])),
    )
    for index, (a, b, output) in enumerate(pairs):
        made, copies = gemm.product(a, b, None, output, dtype)
        if copies:
            at.copy(o.inputs[1 + index], "operand of unfused attention")
        written = math.prod(output) * item
        for name in gemm.kernels(made, at.chip):
            read = (a.size + b.stored) * item
            at.launch("gemm", name, read, written, note=f"{made} (attention, unfused)")
        if index == 0:
            at.launch("softmax", rows.softmax(Layout.row(scores))[0], written, written)


CALLS: dict[str, Rule] = {
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rope": _rope,
    "scaled_dot_product_attention": _attention,
    "compiled": _compiled,
    "zeros": fill,
    "ones": fill,
    "full": fill,
    "quantize": one_launch("elementwise", "affine_quantize"),
    "dequantize": one_launch("elementwise", "affine_dequantize"),
}
