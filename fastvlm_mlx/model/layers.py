"""The few layers FastViTHD is made of, NHWC, in their fused form: no BatchNorm, no branches.

Knows shapes and arithmetic only. Every 1x1 convolution is an `addmm` on a 2-D view, so that it
runs as a GEMM with its bias or residual in the epilogue; every k x k convolution but the stem's
first is depthwise with as many outputs as inputs, the one form Metal has a fast kernel for.

The compiled functions are module-level, tiny and shapeless: one kernel each for any shape.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x/2 (1 + erf(x/sqrt 2)): the tower and projector were trained with this one."""
    return x * (mx.erf(x * (1 / math.sqrt(2))) + 1) * 0.5


@partial(mx.compile, shapeless=True)
def bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    """GELU of x + bias in one kernel."""
    x = x + bias
    return x * (mx.erf(x * (1 / math.sqrt(2))) + 1) * 0.5


@partial(mx.compile, shapeless=True)
def two_biases(x: mx.array, first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Return (x + first, x + first + second) from one kernel.

    The second output is the residual with the next GEMM's bias already in it. It must be computed
    from the first output: two independent sums compile to two kernels.
    """
    y = x + first
    return y, y + second


@partial(mx.compile, shapeless=True)
def gate_gelu(x: mx.array, gate: mx.array) -> mx.array:
    """GELU of x * sigmoid(gate) in one kernel."""
    x = x * mx.sigmoid(gate)
    return x * (mx.erf(x * (1 / math.sqrt(2))) + 1) * 0.5


def depthwise(x: mx.array, weight: mx.array, *, stride: int = 1) -> mx.array:
    """Convolve each channel with its own filter, "same" padding, no bias.

    `x` [B,H,W,C], `weight` [C,k,k,1] with k odd; returns [B,H/stride,W/stride,C].
    """
    pad = weight.shape[1] // 2
    return mx.conv2d(x, weight, stride=stride, padding=pad, groups=weight.shape[0])


def pointwise(c: mx.array, x: mx.array, weight: mx.array) -> mx.array:
    """Compute `x @ weight.T + c` over the last axis as one 2-D GEMM.

    `x` [...,I], `weight` [O,I]; `c` is a bias [O] or a residual [...,O]. Returns [...,O].
    The 2-D view is free on contiguous arrays and spares the CPU backend a loop over rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if c.ndim > 1:
        c = c.reshape(-1, c.shape[-1])
    return mx.addmm(c, rows, weight.T).reshape(*x.shape[:-1], weight.shape[0])


class Pointwise(nn.Module):
    """A 1x1 convolution: `weight` [O,I], `bias` [O]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out_dim, in_dim))
        self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return pointwise(self.bias, x, self.weight)


class Depthwise(nn.Module):
    """A depthwise convolution: `weight` [C,k,k,1], `bias` [C]; the caller adds the bias."""

    def __init__(self, dim: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = mx.zeros((dim, kernel, kernel, 1))
        self.bias = mx.zeros((dim,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        return depthwise(x, self.weight, stride=self.stride)


class SqueezeExcite(nn.Module):
    """Channel gates from the spatial mean (Hu et al. 2018), before their sigmoid."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.reduce = Pointwise(dim, hidden)
        self.expand = Pointwise(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the gates' logits [B,1,1,C] of `x` [B,H,W,C]."""
        pooled = x.mean(axis=(1, 2))
        gate = self.expand(nn.relu(self.reduce(pooled)))
        return gate[:, None, None, :]
