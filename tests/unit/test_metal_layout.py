"""How arrays lie in memory: the audit's model beside the strides of arrays that MLX made."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.metal_rules.layout import Layout, collapsed, in_order


def strides(array: mx.array) -> tuple[int, ...]:
    """The strides MLX gave an array, in elements."""
    mx.eval(array)
    view = memoryview(array)
    assert view.strides is not None
    return tuple(step // view.itemsize for step in view.strides)


def fresh(*shape: int) -> mx.array:
    array = mx.arange(math.prod(shape)).reshape(shape)
    mx.eval(array)
    return array


def factors(size: int, draw: st.DataObject) -> list[int]:
    """A shape of `size` elements with up to five axes, some of them of one element."""
    shape = []
    while size > 1 and len(shape) < 4:
        n = draw.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(n)
        size //= n
    return [*shape, size]


def step(array: mx.array, layout: Layout, draw: st.DataObject) -> tuple[mx.array, Layout]:
    """Apply one drawn view to both."""
    axes = range(array.ndim)
    kind = draw.draw(st.sampled_from("transpose reshape slice split expand squeeze".split()))
    if kind == "transpose":
        order = draw.draw(st.permutations(list(axes)))
        return array.transpose(order), layout.transposed(order)
    if kind == "reshape":
        shape = factors(array.size, draw)
        if tuple(shape) == array.shape:
            return array, layout
        return array.reshape(shape), layout.reshaped(shape)[0]
    if kind == "slice":
        axis = draw.draw(st.sampled_from(list(axes)))
        start = draw.draw(st.integers(0, array.shape[axis] - 1))
        stop = draw.draw(st.integers(start + 1, array.shape[axis]))
        every = draw.draw(st.integers(1, 2))
        every = 1 if stop - start <= every else every  # as MLX normalises its own arguments
        if (start, stop, every) == (0, array.shape[axis], 1):
            return array, layout
        whole = [slice(None)] * array.ndim
        whole[axis] = slice(start, stop, every)
        starts, stops, steps = [0] * array.ndim, list(array.shape), [1] * array.ndim
        starts[axis], stops[axis], steps[axis] = start, stop, every
        return array[tuple(whole)], layout.sliced(starts, stops, steps)
    if kind == "split":
        axis = draw.draw(st.sampled_from(list(axes)))
        if array.shape[axis] < 2:
            return array, layout
        end = draw.draw(st.integers(1, array.shape[axis] - 1))
        return mx.split(array, [end], axis=axis)[1], layout.split([end], axis)[1]
    if kind == "expand":
        axis = draw.draw(st.integers(0, array.ndim))
        return mx.expand_dims(array, axis), layout.expanded([axis])
    ones = [axis for axis in axes if array.shape[axis] == 1]
    if not ones or array.ndim == 1:
        return array, layout
    return mx.squeeze(array, ones[0]), layout.squeezed(ones[:1])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_views_lie_as_mlx_lays_them(draw: st.DataObject) -> None:
    """Also for axes of one element: MLX's products look at their strides."""
    array = fresh(*draw.draw(st.sampled_from([(2, 3, 4), (6, 1, 4), (1, 8, 6), (24,), (4, 4, 2)])))
    layout = Layout.row(array.shape)
    for _ in range(4):
        array, layout = step(array, layout, draw)
        assert (layout.shape, layout.strides) == (array.shape, strides(array))


@pytest.mark.parametrize(
    ("shape", "wanted"), [((3,), (2, 3)), ((2, 1), (2, 5)), ((1, 4), (3, 1, 4)), ((1,), (1, 7))]
)
def test_a_broadcast_repeats_without_memory(
    shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    layout = Layout.row(shape).broadcast(wanted)
    real = strides(mx.broadcast_to(fresh(*shape), wanted))
    assert layout.strides == real
    assert layout.stored == math.prod(shape)


def test_flags_tell_holes_from_order() -> None:
    row = Layout.row((4, 6))
    turned, part, rows = row.transposed((1, 0)), row.split([3], 1)[0], row.split([2], 0)[1]
    assert (row.row_contiguous, row.contiguous) == (True, True)
    assert (turned.row_contiguous, turned.column_contiguous, turned.contiguous) == (
        False, True, True,
    )  # fmt: skip
    assert (part.row_contiguous, part.contiguous) == (False, False)
    assert (rows.row_contiguous, rows.contiguous) == (True, True)


def test_half_a_row_lies_in_order_if_it_is_the_only_one() -> None:
    """Its stride is that of the whole row still: Metal's products copy such a vector."""
    half = Layout.row((1, 1, 8)).split([4], 2)[0]
    assert half.row_contiguous
    assert half.strides == (8, 8, 1) == strides(mx.split(fresh(1, 1, 8), 2, axis=-1)[0])
    assert half.reshaped((1, 4))[0].strides == (4, 1)


@pytest.mark.parametrize(
    ("layout", "shape", "copied"),
    [
        (Layout.row((1, 6, 2, 4)).transposed((0, 2, 1, 3)), (1, 6, 8), True),
        (Layout.row((1, 1, 2, 4)).transposed((0, 2, 1, 3)), (1, 1, 8), False),
        (Layout.row((2, 6, 8)).split([4], 2)[0], (2, 6, 2, 2), False),
        (Layout.row((2, 6, 8)).split([4], 2)[0], (2, 24), True),
        (Layout.row((4, 6)).transposed((1, 0)), (6, 2, 2), False),
    ],
)
def test_a_reshape_copies_where_axes_would_have_to_merge(
    layout: Layout, shape: tuple[int, ...], copied: bool
) -> None:
    assert layout.reshaped(shape)[1] is copied


def test_axes_merge_only_where_they_do_in_every_array() -> None:
    a, b = (2, 3, 4), Layout.row((2, 4, 3)).transposed((0, 2, 1)).strides
    assert collapsed(a, [in_order(a)]) == ([24], [[1]])
    assert collapsed(a, [in_order(a), b]) == ([2, 3, 4], [[12, 4, 1], [12, 1, 3]])
    assert collapsed((1, 1), [(1, 1)]) == ([1], [[0]])
