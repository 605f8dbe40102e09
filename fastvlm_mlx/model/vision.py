"""FastViTHD in its fused form only: pixels [B,H,W,3] uint8 to features [B,tokens,2C].

Knows the network after every fold of `checkpoint/fuse.py`: BatchNorm, train-time branches, layer
scales, LayerNorm's affine and 1/255 are already inside the weights. Knows no checkpoint names.

Source: apple/ml-fastvlm `mci.py` (`fastvithd`), timm `fastvit_mci3`; arXiv 2412.13303.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.layers import (
    Depthwise,
    Pointwise,
    SqueezeExcite,
    bias_gelu,
    gate_gelu,
    gelu,
    pointwise,
    two_biases,
)

LAYER_NORM_EPS = 1e-5
# 1/255 inside float16 weights would make small ones subnormal; 2^-8 is exact on the pixels.
FLOAT16_PIXEL_SCALE = 2.0**-8


class Stem(nn.Module):
    """Three convolutions, each with GELU: 3x3 stride 2, depthwise 3x3 stride 2, 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = mx.zeros((dim, 3, 3, 3))
        self.bias = mx.zeros((dim,))
        self.depthwise = Depthwise(dim, 3, stride=2)
        self.pointwise = Pointwise(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = bias_gelu(mx.conv2d(x, self.weight, stride=2, padding=1), self.bias)
        x = bias_gelu(self.depthwise(x), self.depthwise.bias)
        return gelu(self.pointwise(x))


class ConvFFN(nn.Module):
    """Depthwise 7x7, then two 1x1 convolutions with GELU between; the residual enters the last.

    The 7x7 has no bias: its BatchNorm's shift is inside `fc1.bias`. `fc2` holds the layer scale.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = Depthwise(dim, 7)
        del self.conv.bias
        self.fc1 = Pointwise(dim, hidden)
        self.fc2 = Pointwise(hidden, dim)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """Return `residual + fc2.weight · …`; the caller has added `fc2.bias` to `residual`."""
        hidden = gelu(self.fc1(self.conv(x)))
        return pointwise(residual, hidden, self.fc2.weight)


class RepMixerBlock(nn.Module):
    """Token mixing by one depthwise 3x3 (the residual is inside its kernel), then ConvFFN."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mixer = Depthwise(dim, 3)
        self.ffn = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        x, residual = two_biases(self.mixer(x), self.mixer.bias, self.ffn.fc2.bias)
        return self.ffn(x, residual)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, then ConvFFN."""

    def __init__(self, dim: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Pointwise(dim, 3 * dim)
        self.proj = Pointwise(dim, dim)
        self.ffn = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        mixed = pointwise(x, self.attend(x), self.proj.weight)
        x, residual = two_biases(mixed, self.proj.bias, self.ffn.fc2.bias)
        return self.ffn(x, residual)

    def attend(self, x: mx.array) -> mx.array:
        """Return each position's mix of the others' values, [B,H,W,C] to [B,H,W,C], before proj."""
        batch, height, width, dim = x.shape
        heads = dim // self.head_dim
        normed = mx.fast.layer_norm(x, None, None, LAYER_NORM_EPS)
        qkv = self.qkv(normed).reshape(batch, height * width, 3 * heads, self.head_dim)
        # Split, not indexed: an integer index gathers, which copies.
        q, k, v = mx.split(qkv.transpose(0, 2, 1, 3), 3, axis=1)
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return mixed.transpose(0, 2, 1, 3).reshape(batch, height, width, dim)


class Downsample(nn.Module):
    """Depthwise 7x7 stride 2 that multiplies the channels, GELU, 1x1, GELU.

    A grouped convolution with several outputs a channel misses Metal's depthwise kernel, so it is
    one depthwise convolution for each multiple; the 1x1 sums over them, its columns split alike.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.multiples = [Depthwise(in_dim, 7, stride=2) for _ in range(out_dim // in_dim)]
        self.pointwise = [mx.zeros((out_dim, in_dim)) for _ in self.multiples]
        self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.bias
        for conv, weight in zip(self.multiples, self.pointwise, strict=True):
            y = pointwise(y, bias_gelu(conv(x), conv.bias), weight)
        return gelu(y)


class Stage(nn.Module):
    """An optional downsampling, an optional position encoding (depthwise 7x7), then blocks."""

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        dim = config.embed_dims[index]
        hidden = int(dim * config.mlp_ratios[index])
        if index > 0:
            self.downsample = Downsample(config.embed_dims[index - 1], dim)
        if config.pos_embs[index]:
            self.pos_emb = Depthwise(dim, 7)
        if config.token_mixers[index] == "repmixer":
            self.blocks = [RepMixerBlock(dim, hidden) for _ in range(config.layers[index])]
        else:
            self.blocks = [
                AttentionBlock(dim, hidden, config.head_dim) for _ in range(config.layers[index])
            ]

    def __call__(self, x: mx.array) -> mx.array:
        if "downsample" in self:
            x = self.downsample(x)
        if "pos_emb" in self:
            # A float16 tower keeps the weights from here on in float32 (see `store.py`).
            x = x.astype(self.pos_emb.weight.dtype)
            x = self.pos_emb(x) + self.pos_emb.bias
        for block in self.blocks:
            x = block(x)
        return x


class Expansion(nn.Module):
    """Depthwise 3x3 that doubles the channels, squeeze-and-excite, GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.conv = Depthwise(config.out_dim, 3)
        self.se = SqueezeExcite(config.out_dim, config.se_dim)

    def __call__(self, x: mx.array) -> mx.array:
        # Each channel is repeated rather than grouped: the gates need the channels' true order.
        doubled = mx.broadcast_to(x[..., None], (*x.shape, 2)).reshape(*x.shape[:-1], -1)
        x = self.conv(doubled) + self.conv.bias
        return gate_gelu(x, self.se(x))


class FastViTHD(nn.Module):
    """The vision tower: uint8 pixels to features, one for each 64 x 64 pixels, row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.embed_dims[0])
        self.stages = [Stage(config, i) for i in range(len(config.layers))]
        self.expansion = Expansion(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return features [B, H/64 * W/64, 2C] of `pixels` [B,H,W,3] uint8, H and W on the grid.

        The pixels' 1/255 is inside the stem's weights. Raises ConfigError for a size off the grid.
        """
        tokens = self.config.tokens(pixels.shape[1], pixels.shape[2])
        dtype = self.stem.weight.dtype
        x = pixels.astype(dtype)
        if dtype == mx.float16:
            x = x * FLOAT16_PIXEL_SCALE
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.expansion(x).reshape(pixels.shape[0], tokens, self.config.out_dim)


def pixel_fold(dtype: mx.Dtype) -> float:
    """Return what the stem's weights are multiplied by, so that uint8 pixels mean 0 to 1."""
    return 1 / 255 if dtype != mx.float16 else 1 / 255 / FLOAT16_PIXEL_SCALE
