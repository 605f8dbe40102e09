"""FastViTHD in its fused form only: pixels [B,H,W,3] uint8 to features [B,tokens,2C].

Knows the network after every fold of `checkpoint/fuse.py`: BatchNorm, train-time branches, layer
scales, LayerNorm's affine and 1/255 are already inside the weights. Knows no checkpoint names.

Source: apple/ml-fastvlm `mci.py` (`fastvithd`), timm `fastvit_mci3`; arXiv 2412.13303.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import ConfigError
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
from fastvlm_mlx.model.memory import nothing_cached

Step = Callable[[mx.array], mx.array]

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

    def steps(self) -> Iterator[Step]:
        """Yield its convolutions, the first apart from its GELU: both make the largest arrays."""
        yield lambda x: mx.conv2d(x, self.weight, stride=2, padding=1)
        yield lambda x: bias_gelu(x, self.bias)
        yield lambda x: bias_gelu(self.depthwise(x), self.depthwise.bias)
        yield lambda x: gelu(self.pointwise(x))


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
    """Multi-head self-attention over all positions, then ConvFFN.

    Paired, heads 2i and 2i+1 share a key and value head of twice the width, and their queries are
    zero where the other's key is (`fuse.pair_heads`). Metal has a fused kernel for the width 64,
    none for FastViTHD's 32.
    """

    def __init__(self, dim: int, hidden: int, head_dim: int, *, paired_heads: bool = False) -> None:
        super().__init__()
        sharing = 2 if paired_heads else 1
        self.scale = head_dim**-0.5
        self.width = sharing * head_dim
        self.heads = dim // head_dim
        self.key_heads = self.heads // sharing
        self.qkv = Pointwise(dim, (sharing + 2) * dim)
        self.proj = Pointwise(sharing * dim, dim)
        self.ffn = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        mixed = pointwise(x, self.attend(x), self.proj.weight)
        x, residual = two_biases(mixed, self.proj.bias, self.ffn.fc2.bias)
        return self.ffn(x, residual)

    def attend(self, x: mx.array) -> mx.array:
        """Return each position's mix of the others' values before proj, [B,H,W,C] from [B,H,W,C].

        Paired, [B,H,W,2C]: half of what each head mixed is its neighbour's and proj's to drop.
        """
        return self.mix(mx.fast.layer_norm(x, None, None, LAYER_NORM_EPS))

    def mix(self, normed: mx.array) -> mx.array:
        """Attend from positions that are normed already."""
        batch, height, width, _ = normed.shape
        qkv = self.qkv(normed).reshape(batch, height * width, -1, self.width)
        # Split, not indexed: an integer index gathers, which copies.
        ends = [self.heads, self.heads + self.key_heads]
        q, k, v = mx.split(qkv.transpose(0, 2, 1, 3), ends, axis=1)
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return mixed.transpose(0, 2, 1, 3).reshape(batch, height, width, -1)


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

    def __init__(self, config: VisionConfig, index: int, *, paired_heads: bool = False) -> None:
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
                AttentionBlock(dim, hidden, config.head_dim, paired_heads=paired_heads)
                for _ in range(config.layers[index])
            ]

    def steps(self) -> Iterator[Step]:
        """Yield what is applied one after the other, each a function of one array."""
        if "downsample" in self:
            yield self.downsample
        if "pos_emb" in self:
            yield self._add_position
        yield from self.blocks

    def _add_position(self, x: mx.array) -> mx.array:
        # A float16 tower keeps the weights from here on in float32 (see `store.py`).
        x = x.astype(self.pos_emb.weight.dtype)
        return self.pos_emb(x) + self.pos_emb.bias


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
    """The vision tower: uint8 pixels to features, one for each 64 x 64 pixels, row by row.

    `paired_heads` takes the weights of `fuse.pair_heads`; raises ConfigError for a stage with an
    odd number of heads. `low_memory` evaluates step by step and gives each freed buffer back at
    once: the same features, bit for bit, for far less memory and a wait after each step.
    `form` is another way through the same weights (`cpu_tower.features`), None for this file's.
    """

    def __init__(
        self, config: VisionConfig, *, paired_heads: bool = False, low_memory: bool = False
    ) -> None:
        super().__init__()
        if paired_heads:
            _check_pairs(config)
        self.config = config
        self.low_memory = low_memory
        self.form: Callable[[FastViTHD, mx.array], mx.array] | None = None
        self.stem = Stem(config.embed_dims[0])
        self.stages = [
            Stage(config, i, paired_heads=paired_heads) for i in range(len(config.layers))
        ]
        self.expansion = Expansion(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return features [B, H/64 * W/64, 2C] of `pixels` [B,H,W,3] uint8, H and W on the grid.

        The pixels' 1/255 is inside the stem's weights. Raises ConfigError for a size off the grid.
        """
        tokens = self.config.tokens(pixels.shape[1], pixels.shape[2])
        features = self._in_little_memory(pixels) if self.low_memory else self._features(pixels)
        return features.reshape(pixels.shape[0], tokens, self.config.out_dim)

    def _features(self, pixels: mx.array) -> mx.array:
        if self.form is not None:
            return self.form(self, pixels)
        x = pixels
        for step in self.steps():
            x = step(x)
            if self.low_memory:
                mx.eval(x)
        return x

    def _in_little_memory(self, pixels: mx.array) -> mx.array:
        """Return the features, evaluated, with no more in memory than one step needs.

        MLX allocates for many steps ahead of the one that is running, and keeps what is freed for
        later use; neither is lived with here.
        """
        mx.clear_cache()
        with nothing_cached():
            features = self._features(pixels)
            mx.eval(features)
        return features

    def steps(self) -> Iterator[Step]:
        """Yield what is applied to the pixels one after the other, each a function of one array."""
        yield self._cast
        yield from self.stem.steps()
        for stage in self.stages:
            yield from stage.steps()
        yield self.expansion

    def _cast(self, pixels: mx.array) -> mx.array:
        dtype = self.stem.weight.dtype
        x = pixels.astype(dtype)
        return x * FLOAT16_PIXEL_SCALE if dtype == mx.float16 else x


def _check_pairs(config: VisionConfig) -> None:
    """Raise ConfigError unless each attention stage has an even number of heads."""
    for index, (mixer, dim) in enumerate(zip(config.token_mixers, config.embed_dims, strict=True)):
        heads = dim // config.head_dim
        if mixer == "attention" and heads % 2:
            raise ConfigError(
                f"stage {index} of this tower has {heads} attention heads, an odd number: "
                "load it without paired_heads"
            )


def pixel_fold(dtype: mx.Dtype) -> float:
    """Return what the stem's weights are multiplied by, so that uint8 pixels mean 0 to 1."""
    return 1 / 255 if dtype != mx.float16 else 1 / 255 / FLOAT16_PIXEL_SCALE
