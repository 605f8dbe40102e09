"""Which kernels `mx.fast.scaled_dot_product_attention` takes on Metal, or its unfused form.

Queries [B,Hq,L,D], keys and values [B,Hk,S,D]. Up to 8 queries are "vector" attention, more are
"full"; both only for some head widths. Unfused, scores and probabilities go through memory.
"""

from __future__ import annotations

from benchmarks.metal_rules.chips import Chip
from benchmarks.metal_rules.layout import Layout

_VECTOR_QUERIES = 8
_VECTOR_WIDTHS = (64, 96, 128, 192, 256, 512)
_FULL_WIDTHS = (64, 72, 80, 96, 128, 192, 256)
# Query and value width, where they differ.
_UNEQUAL_VECTOR, _UNEQUAL_FULL = ((96, 64), (192, 128)), ((96, 64),)
_NAX_WIDTHS = (64, 96, 128, 256)


def is_fused(q: Layout, k: Layout, v: Layout, *, causal: bool, masked: bool, chip: Chip) -> bool:
    """Whether a fused kernel is used (`has_fused_kernel` and `use_fallback`), not training."""
    width, value_width = q.shape[-1], v.shape[-1]
    queries, keys = q.shape[2], k.shape[2]
    sharing = q.shape[1] // k.shape[1]
    if queries > _VECTOR_QUERIES:
        known = width == value_width and (width in _FULL_WIDTHS or (width == 512 and chip.nax))
        if not (known or (width, value_width) in _UNEQUAL_FULL) or (causal and queries > keys):
            return False
        if width == 256 and chip.nax and queries >= 1024 and (causal or masked):
            return True
        return width not in (192, 256)
    known = width == value_width and width in _VECTOR_WIDTHS
    if not (known or (width, value_width) in _UNEQUAL_VECTOR):
        return False
    if queries > keys or queries * sharing > 32:
        return False
    if width == 512 and (queries != 1 or sharing != 8 or masked or keys < 1024):
        return False
    return not (width == value_width == 192)


def fused(
    q: Layout, k: Layout, v: Layout, chip: Chip
) -> tuple[tuple[str, ...], tuple[Layout, ...], Layout]:
    """Return the fused form's kernels, the operands that are copied first, and what it writes."""
    batch, heads, queries, _ = q.shape
    width = v.shape[-1]
    if queries > _VECTOR_QUERIES:
        copies = tuple(each for each in (q, k, v) if each.strides[-1] != 1)
        # Written with the positions before the heads: to merge the heads is then no copy.
        written = Layout(
            (batch, queries, heads, width), Layout.row((batch, queries, heads, width)).strides
        )
        name = "steel_attention"
        if chip.nax and width in _NAX_WIDTHS:
            name = "steel_attention_dsplit_nax" if width == 256 else "steel_attention_nax"
        return (f"{name}_bd{width}",), copies, written.transposed((0, 2, 1, 3))
    copies = () if _vector_queries_lie_well(q) else (q,)
    copies += tuple(each for each in (k, v) if not _vector_keys_lie_well(each))
    keys = k.shape[2]
    two_passes = (chip.large and keys >= 1024) or (k.shape[1] < heads and keys >= 4096)
    names = ("sdpa_vector_2pass_1", "sdpa_vector_2pass_2") if two_passes else ("sdpa_vector",)
    return (
        tuple(f"{each}_{width}" for each in names),
        copies,
        Layout.row((batch, heads, queries, width)),
    )


def _vector_queries_lie_well(q: Layout) -> bool:
    if q.row_contiguous:
        return True
    if 1 not in q.shape[:2]:
        return False
    other = 1 if q.shape[0] == 1 else 0
    width = q.shape[3]
    return (q.strides[3], q.strides[2], q.strides[other]) == (1, width * q.shape[other], width)


def _vector_keys_lie_well(k: Layout) -> bool:
    if k.strides[-1] != 1:
        return False
    return 1 in k.shape[:2] or k.strides[0] == k.strides[1] * k.shape[1]


def unfused_elementwise(
    q: Layout, k: Layout, *, causal: bool, masked: bool
) -> tuple[tuple[str, int, int], ...]:
    """Return the unfused form's elementwise launches beside its two products and its softmax.

    As (name, elements read, elements written): queries are scaled; a causal mask is made of two
    ranges and a comparison and selects; an array mask is added (or selects, if boolean).
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    launches = [("Multiply", q.stored, q.size)]
    if causal:
        rows, columns = q.shape[2], k.shape[2]
        launches += [("Arange", 0, rows), ("Arange", 0, columns)]
        launches += [("GreaterEqual", rows + columns, rows * columns)]
    if causal or masked:
        launches += [("Select or Add", scores + q.shape[2] * k.shape[2], scores)]
    return tuple(launches)
