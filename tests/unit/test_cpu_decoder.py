"""One position's products on a CPU: the same sums, cut where OpenBLAS does not copy the weight."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from benchmarks.graph_trace import trace
from fastvlm_mlx.backend import has_scalar_cpu
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.config import PRESETS
from fastvlm_mlx.model.cpu_decoder import SMALL, RowEmbedding, RowLinear, row_product
from fastvlm_mlx.model.fingerprint import fingerprint

SIZES = [PRESETS[name].decoder for name in ("0.5b", "1.5b", "7b")]
SHAPES = sorted(
    {
        shape
        for size in SIZES
        for shape in (
            (size.hidden_size, size.hidden_size),
            (2 * size.intermediate_size, size.hidden_size),
            (size.hidden_size, size.intermediate_size),
        )
    }
)


@pytest.mark.parametrize(("rows", "width"), [*SHAPES[:4], (1117, 1800), (1, 7), (13, 5), (7, 3000)])
def test_a_row_product_is_the_product(rows: int, width: int) -> None:
    weight, x = mx.random.normal((rows, width)), mx.random.normal((1, 1, width))
    found, wanted = np.array(row_product(x, weight)), np.array(x, np.float64) @ np.array(weight).T
    assert found.shape == (1, 1, rows)
    assert np.abs(found - wanted).max() <= 2e-6 * np.sqrt(width) * np.abs(wanted).max()


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_row_product_is_one_product_of_views_each_small_enough(rows: int, width: int) -> None:
    weight = mx.broadcast_to(mx.array(0.0), (rows, width))
    primitives = trace(row_product, mx.zeros((1, 1, width)), weight)
    [product] = [primitive for primitive in primitives if primitive.name == "Matmul"]
    pieces, depth, piece = product.inputs[1][0]
    assert pieces * piece == rows and depth == width
    assert piece * width <= SMALL
    assert pieces == 1 or piece * width > SMALL / 4, "needlessly many"


@pytest.mark.parametrize("rows", [151647, 151665, 151651, 151936])
def test_a_vocabulary_that_no_even_cut_divides_is_not_cut_into_crumbs(rows: int) -> None:
    """The largest divisor was taken: a prime number of words made a product a row."""
    weight = mx.broadcast_to(mx.array(0.0), (rows, 896))
    products = [p for p in trace(row_product, mx.zeros((1, 896)), weight) if p.name == "Matmul"]
    assert len(products) <= 2 and products[0].inputs[1][0][0] <= 2 * -(-rows * 896 // SMALL)
    assert all(p.inputs[1][0][-1] * 896 <= SMALL for p in products)


@pytest.mark.skipif(not has_scalar_cpu(), reason="other CPUs keep the plain form")
def test_only_plain_float32_layers_on_a_cpu_are_replaced_and_none_of_their_arrays_copied() -> None:
    checkpoint = open_checkpoint(fv.load("demo").source)
    plain = load_model(checkpoint, mx.float32, dequantize=False, cpu_forms=False)
    cpu = load_model(checkpoint, mx.float32, dequantize=False)
    half = load_model(checkpoint, mx.bfloat16, dequantize=False)
    for model, wanted in ((plain, {False}), (cpu, {True}), (half, {False})):
        leaves = [
            module
            for _, module in model.decoder.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        ]
        assert {isinstance(module, (RowLinear, RowEmbedding)) for module in leaves} == wanted
    names = [name for name, _ in tree_flatten(plain.decoder.parameters())]
    assert names == [name for name, _ in tree_flatten(cpu.decoder.parameters())]
    assert fingerprint(plain) == fingerprint(cpu)


def test_packed_layers_stay_as_they_are() -> None:
    linear = nn.QuantizedLinear(64, 8, bias=False)
    holder = nn.Module()
    holder.linear = linear
    from fastvlm_mlx.model.cpu_decoder import use_row_products

    use_row_products(holder)
    assert holder.linear is linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 6), (2, 3, 6), (1, 0, 6)])
def test_a_row_layer_is_its_layer_for_any_number_of_positions(
    shape: tuple[int, ...], bias: bool
) -> None:
    linear = nn.Linear(6, 10, bias=bias)
    row, x = RowLinear(linear), mx.random.normal(shape)
    assert row["weight"] is linear["weight"]
    assert mx.allclose(row(x), linear(x), atol=1e-6).item()
    assert row(x).shape == (*shape[:-1], 10)


def test_a_tied_head_is_its_head() -> None:
    embedding = nn.Embedding(30, 6)
    row, x = RowEmbedding(embedding), mx.random.normal((1, 1, 6))
    assert mx.allclose(row.as_linear(x), embedding.as_linear(x), atol=1e-6).item()
    assert mx.array_equal(row(mx.array([[3, 4]])), embedding(mx.array([[3, 4]]))).item()
