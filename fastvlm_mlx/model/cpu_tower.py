"""FastViTHD on a CPU in float32: the same weights, arranged for GEMM and for vectorised loops.

MLX's CPU backend convolves depthwise in a scalar loop, and where it is built without SIMD (Linux)
its erf is scalar too; the two are most of a tower's time. Here a depthwise convolution is one
small GEMM a channel, GELU is a rational function, and activations lie [C,H,W], as both and every
1x1 convolution like them. Arrays are made in pieces that a processor's cache holds, which is also
why this form takes less memory. Knows the modules of `vision.py` and reads their weights; keeps
nothing of its own between two pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from fastvlm_mlx.model.layers import Depthwise, Pointwise
from fastvlm_mlx.model.vision import (
    AttentionBlock,
    ConvFFN,
    Downsample,
    Expansion,
    FastViTHD,
    RepMixerBlock,
    Stem,
)

PIECE = 1 << 19
"""Elements of the largest array that is made piece by piece, 2 MiB. Half as much made a block
a seventh slower, as GEMMs pack their weights anew for each piece; twice as much saves a twentieth
of the time and takes half as much memory again."""

# Phi(x) - 1/2 = x P(x^2) / Q(x^2) for |x| <= LIMIT, lowest power first, Q monic. Fitted here by
# iteratively reweighted least squares to float64 `math.erf` (1600 Chebyshev points, the value at
# LIMIT held at 1/2), then rounded to float32. Largest error of 2 Phi - 1 as an erf over 4.2 million
# float32 in [-8, 8]: 5.9e-7. In float32 the two ends come out as 0 and 1 exactly.
LIMIT = 5.2
P = (
    2487.84765625,
    413.6835632324219,
    40.53322982788086,
    2.9706649780273438,
    0.0383782796561718,
    -0.0001116834391723387,
)
Q = (6236.1201171875, 2076.23095703125, 291.873291015625, 22.631668090820312)


def gelu(x: mx.array) -> mx.array:
    """GELU, x Phi(x), of float32 of any shape; beyond LIMIT it is x or zero exactly."""
    c = mx.clip(x, -LIMIT, LIMIT)
    u = mx.square(c)
    p = u * P[-1]
    for a in P[-2:0:-1]:
        p = (p + a) * u
    q = u + Q[-1]
    for a in Q[-2::-1]:
        q = q * u + a
    return x * (c * ((p + P[0]) / q) + 0.5)


def depthwise(x: mx.array, weight: mx.array, *, stride: int = 1) -> mx.array:
    """Convolve each channel with its own filter, "same" padding, no bias.

    `x` [C,H,W], `weight` [C,k,k,1] with k odd; returns [C, ceil(H/stride), ceil(W/stride)]. The
    picture is cut into overlapping windows, and a GEMM takes each window to a tile of the result:
    a few times the multiplications, but at a GEMM's speed.
    """
    channels, height, width = x.shape
    kernel = weight.shape[1]
    pad = kernel // 2
    out_h, out_w = -(-height // stride), -(-width // stride)
    tile_h, tile_w = (4, 8) if out_w >= 64 else (4, 4)
    down, across = -(-out_h // tile_h), -(-out_w // tile_w)
    below = max((down * tile_h - 1) * stride + kernel - height - pad, 0)
    right = max((across * tile_w - 1) * stride + kernel - width - pad, 0)
    padded = mx.pad(x, [(0, 0), (pad, below), (pad, right)])
    _, rows, line = padded.shape
    window = ((tile_h - 1) * stride + kernel, (tile_w - 1) * stride + kernel)
    windows = mx.as_strided(
        padded,
        (channels, down, across, *window),
        (rows * line, tile_h * stride * line, tile_w * stride, line, 1),
    ).reshape(channels, down * across, -1)
    tiles = windows @ _window_to_tile(weight, tile_h, tile_w, stride)
    y = tiles.reshape(channels, down, across, tile_h, tile_w).transpose(0, 1, 3, 2, 4)
    return y.reshape(channels, down * tile_h, across * tile_w)[:, :out_h, :out_w]


def _window_to_tile(weight: mx.array, tile_h: int, tile_w: int, stride: int) -> mx.array:
    """Return [C, window, tile]: for each pixel of a tile, its filter where it lies in the window.

    Read from the filter inside a wide border of zeros: shifting the view moves the filter.
    """
    channels, kernel = weight.shape[:2]
    below, right = (tile_h - 1) * stride, (tile_w - 1) * stride
    padded = mx.pad(weight[..., 0], [(0, 0), (below, below), (right, right)])
    _, rows, line = padded.shape
    shifted = mx.as_strided(
        padded,
        (channels, kernel + below, kernel + right, tile_h, tile_w),
        (rows * line, line, 1, stride * line, stride),
    )
    return shifted[..., ::-1, ::-1].reshape(channels, -1, tile_h * tile_w)


def features(tower: FastViTHD, pixels: mx.array) -> mx.array:
    """Return what `tower` returns, for float32 weights: [B,H,W,3] uint8 to [B,tokens,2C].

    With `low_memory`, each block is evaluated before the next is begun.
    """
    return mx.stack([_features_of_one(tower, pixels[i]) for i in range(len(pixels))])


def _features_of_one(tower: FastViTHD, picture: mx.array) -> mx.array:
    settle = mx.eval if tower.low_memory else _leave_lazy
    x = _stem(tower.stem, picture)
    settle(x)
    for stage in tower.stages:
        if "downsample" in stage:
            x = _downsample(stage.downsample, x)
        if "pos_emb" in stage:
            x = _convolve(stage.pos_emb, x)
        for block in stage.blocks:
            x = _mix(block, x) if isinstance(block, RepMixerBlock) else _attend(block, x)
            settle(x)
    return _expand(tower.expansion, x)


def _leave_lazy(_x: mx.array) -> None:
    """Evaluate nothing: the whole tower is one graph."""


def _stem(module: Stem, picture: mx.array) -> mx.array:
    """[H,W,3] to [C,H/4,W/4]; the 3x3 with stride 2 is a GEMM over patches of 27 values."""
    x = mx.pad(picture.astype(mx.float32).transpose(2, 0, 1), [(0, 0), (1, 1), (1, 1)])
    _, rows, line = x.shape
    high, wide = (rows - 2) // 2, (line - 2) // 2
    patches = mx.as_strided(x, (3, 3, 3, high, wide), (rows * line, line, 1, 2 * line, 2))
    patches = patches.reshape(27, high * wide)
    weight = module.weight.transpose(0, 3, 1, 2).reshape(-1, 27)
    parts = []
    # Eight channels at least, or the GEMM would spend its time on reading the patches.
    for part in _pieces(len(weight), high * wide, at_least=8):
        y = gelu(mx.addmm(module.bias[part, None], weight[part], patches))
        parts.append(gelu(_convolve_part(module.depthwise, part, y.reshape(-1, high, wide))))
    return _by_pixels(
        mx.concatenate(parts), lambda z, _: gelu(_point(module.pointwise, z)), len(weight)
    )


def _mix(block: RepMixerBlock, x: mx.array) -> mx.array:
    mixed, convolved = [], []
    for part in _pieces(len(x), _window_cost(x)):
        y = _convolve_part(block.mixer, part, x[part])
        mixed.append(y)
        convolved.append(_convolve_part(block.ffn.conv, part, y))
    return _feed_forward(block.ffn, mx.concatenate(mixed), mx.concatenate(convolved))


def _attend(block: AttentionBlock, x: mx.array) -> mx.array:
    pixels_last = mx.contiguous(x.transpose(1, 2, 0))[None]
    mixed = block.attend(pixels_last).reshape(x[0].size, -1)
    y = x.reshape(len(x), -1) + block.proj.bias[:, None]
    y = mx.addmm(y, block.proj.weight, mixed.T).reshape(x.shape)
    return _feed_forward(block.ffn, y, _convolve(block.ffn.conv, y))


def _feed_forward(ffn: ConvFFN, x: mx.array, convolved: mx.array) -> mx.array:
    """Return `x` plus the two 1x1 convolutions of `convolved`, a piece of the picture at a time."""
    residual = x.reshape(len(x), -1)

    def run(piece: mx.array, part: slice) -> mx.array:
        hidden = gelu(_point(ffn.fc1, piece))
        return mx.addmm(residual[:, part] + ffn.fc2.bias[:, None], ffn.fc2.weight, hidden)

    return _by_pixels(convolved, run, len(ffn.fc1.bias))


def _downsample(module: Downsample, x: mx.array) -> mx.array:
    y = module.bias[:, None]
    for conv, weight in zip(module.multiples, module.pointwise, strict=True):
        h = _convolve(conv, x, then=gelu)
        y = mx.addmm(y, weight, h.reshape(len(h), -1))
    return _by_pixels(y.reshape(-1, *h.shape[1:]), lambda z, _: gelu(z), len(y))


def _expand(module: Expansion, x: mx.array) -> mx.array:
    """[C,H,W] to [H*W,2C], as the tower returns it."""
    y = _convolve(module.conv, mx.repeat(x, 2, axis=0))
    gate = mx.sigmoid(module.se(y.transpose(1, 2, 0)[None])).reshape(-1, 1)
    return mx.contiguous(gelu(y.reshape(len(y), -1) * gate).T)


def _convolve(
    conv: Depthwise, x: mx.array, *, then: Callable[[mx.array], mx.array] = lambda y: y
) -> mx.array:
    """Return `then` of the convolution and its bias, a few channels at a time."""
    parts = _pieces(len(x), _window_cost(x))
    return mx.concatenate([then(_convolve_part(conv, part, x[part])) for part in parts])


def _convolve_part(conv: Depthwise, part: slice, x: mx.array) -> mx.array:
    """Convolve `x`, the channels `part` of the whole; the 7x7 of a ConvFFN has no bias."""
    y = depthwise(x, conv.weight[part], stride=conv.stride)
    return y + conv.bias[part, None, None] if "bias" in conv else y


def _point(layer: Pointwise, x: mx.array) -> mx.array:
    """A 1x1 convolution of `x` [I,pixels], to [O,pixels]."""
    return mx.addmm(layer.bias[:, None], layer.weight, x)


def _by_pixels(
    x: mx.array, function: Callable[[mx.array, slice], mx.array], channels: int
) -> mx.array:
    """Apply what treats each pixel alone, and makes `channels` of it, piece by piece."""
    flat = x.reshape(len(x), -1)
    parts = [function(flat[:, part], part) for part in _pieces(flat.shape[1], channels)]
    return mx.concatenate(parts, axis=1).reshape(-1, *x.shape[1:])


def _window_cost(x: mx.array) -> int:
    """Elements of a channel's windows: tiles of 4 x 8 under a 7x7 hold each pixel 4.4 times."""
    return 4 * x.shape[1] * x.shape[2]


def _pieces(total: int, elements_each: int, *, at_least: int = 1) -> list[slice]:
    step = max(at_least, PIECE // elements_each)
    return [slice(start, start + step) for start in range(0, total, step)]
