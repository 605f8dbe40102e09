"""Products of one position on a CPU in float32, cut where OpenBLAS is quick.

OpenBLAS copies a matrix into panels before it multiplies, unless the product is small (at most a
million multiplications): for one position the copy costs more than the product. So the rows of a
weight are taken a few hundred at a time, as a batch: views of the same array, one primitive.
Knows plain linear layers and the tied head. Decoding is what it is for; prefill does not meet it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

SMALL = 1_000_000
"""Multiplications of a product that OpenBLAS does without a copy (`interface/gemm.c`, its
small-matrix path on x86-64)."""


class RowLinear(nn.Linear):
    """A linear layer, float32, that holds another's arrays; one position goes through in pieces."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        dict.update(self, linear)

    def __call__(self, x: mx.array) -> mx.array:
        """Return `x @ weight.T + bias`, [...,I] to [...,O]."""
        if x.size != x.shape[-1]:
            return super().__call__(x)
        y = row_product(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


class RowEmbedding(nn.Embedding):
    """An embedding table, float32, whose use as a tied head takes one position in pieces."""

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        dict.update(self, embedding)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return `x @ weight.T`, [...,I] to [...,O]."""
        if x.size != x.shape[-1]:
            return super().as_linear(x)
        return row_product(x, self["weight"])


def row_product(x: mx.array, weight: mx.array) -> mx.array:
    """Return `x @ weight.T` of one position: x [...,I], all but the last axis 1; weight [O,I]."""
    rows, width = weight.shape
    fewest = -(-rows // max(1, SMALL // width))
    even = (count for count in range(fewest, 2 * fewest + 1) if rows % count == 0)
    count = next(even, fewest)
    cut = rows // count * count
    pieces = weight[:cut].reshape(count, -1, width).swapaxes(1, 2)
    y = (x.reshape(1, 1, width) @ pieces).reshape(1, cut)
    if cut < rows:  # a few rows, where no even cut is near: a vocabulary with words added
        y = mx.concatenate([y, x.reshape(1, width) @ weight[cut:].T], axis=1)
    return y.reshape(*x.shape[:-1], rows)


def use_row_products(decoder: nn.Module) -> None:
    """Put these in the place of every plain float32 linear layer and embedding of `decoder`."""
    kinds = {nn.Linear: RowLinear, nn.Embedding: RowEmbedding}
    leaves = tree_map(
        lambda module: kinds.get(type(module), lambda same: same)(module),
        decoder.leaf_modules(),
        is_leaf=nn.Module.is_module,
    )
    decoder.update_modules(leaves)
