"""Other ways to write FastViTHD's layers, on the engine's own modules and weights.

Each computes what the engine's form computes; which is faster only a device can say, and
`formulations.py` asks it. None is part of the engine, and none is chosen from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fastvlm_mlx.checkpoint.fuse import module_paths, pair_heads
from fastvlm_mlx.checkpoint.store import target_dtype
from fastvlm_mlx.model.layers import Pointwise, bias_gelu, gelu, pointwise, two_biases
from fastvlm_mlx.model.vision import (
    LAYER_NORM_EPS,
    AttentionBlock,
    Downsample,
    Expansion,
    FastViTHD,
    RepMixerBlock,
    pixel_fold,
)

Step = Callable[[mx.array], mx.array]
Form = Callable[[Any], Step]
"""Takes the engine's module, prepares weights once, returns another way to compute it."""


def reform(tower: FastViTHD, forms: Mapping[type, Form]) -> Step:
    """Return the whole tower with each module of a type in `forms` computed in that form."""
    steps = [forms[type(step)](step) if type(step) in forms else step for step in tower.steps()]

    def run(pixels: mx.array) -> mx.array:
        x = pixels
        for step in steps:
            x = step(x)
        return x.reshape(pixels.shape[0], -1, x.shape[-1])

    return run


def first_inputs(tower: FastViTHD, pixels: mx.array) -> list[tuple[int, mx.array]]:
    """Return (index of the step, its input) for the first of each kind that works on each shape."""
    found: dict[tuple[type, tuple[int, ...]], tuple[int, mx.array]] = {}
    x = pixels
    for index, step in enumerate(tower.steps()):
        if isinstance(step, nn.Module):
            found.setdefault((type(step), tuple(x.shape)), (index, x))
        x = step(x)
        mx.eval(x)
    return list(found.values())


def paired(tower: FastViTHD) -> FastViTHD:
    """Return the tower as `load(..., paired_heads=True)` makes it; other weights are shared."""
    whole = FastViTHD(tower.config, paired_heads=True)
    weights = dict(tree_flatten(tower.parameters()))
    for path in module_paths(tower.config):
        names = [name for name in weights if name.startswith(f"{path}.")]
        group = {name.removeprefix(f"{path}."): weights.pop(name) for name in names}
        fused = pair_heads(path, group, tower.config)
        weights |= {f"{path}.{n}": mx.contiguous(a, stream=mx.cpu) for n, a in fused.items()}
    whole.load_weights(list(weights.items()), strict=True)
    mx.eval(whole.parameters())
    return whole


def step_by_step(tower: FastViTHD) -> FastViTHD:
    """Return the tower as `load(..., low_memory=True)` makes it, its weights shared."""
    low = FastViTHD(tower.config, low_memory=True)
    low.load_weights(tree_flatten(tower.parameters()), strict=True)
    low.form = tower.form
    return low


def in_dtype(tower: FastViTHD, dtype: mx.Dtype) -> FastViTHD:
    """Return the tower with weights cast to `dtype` as the loader keeps them."""
    cast = FastViTHD(tower.config)
    scale = pixel_fold(dtype) / pixel_fold(tower.stem.weight.dtype)
    named = []
    for name, array in tree_flatten(tower.parameters()):
        array = array.astype(mx.float32) * scale if name == "stem.weight" else array
        named.append((name, array.astype(target_dtype(f"vision.{name}", dtype))))
    cast.load_weights(named, strict=True)
    mx.eval(cast.parameters())
    return cast


def repeated_downsample(module: Downsample) -> Step:
    """Each channel repeated, then one depthwise convolution and one 1x1: a copy of the input."""
    weight, bias, columns = _interleaved(module)

    def run(x: mx.array) -> mx.array:
        multiple = weight.shape[0] // x.shape[-1]
        many = mx.broadcast_to(x[..., None], (*x.shape, multiple)).reshape(*x.shape[:-1], -1)
        many = mx.conv2d(many, weight, stride=2, padding=3, groups=weight.shape[0])
        return gelu(pointwise(module.bias, bias_gelu(many, bias), columns))

    return run


def grouped_downsample(module: Downsample) -> Step:
    """One grouped convolution with several outputs a channel, as the network is described."""
    weight, bias, columns = _interleaved(module)

    def run(x: mx.array) -> mx.array:
        many = mx.conv2d(x, weight, stride=2, padding=3, groups=x.shape[-1])
        return gelu(pointwise(module.bias, bias_gelu(many, bias), columns))

    return run


def _interleaved(module: Downsample) -> tuple[mx.array, mx.array, mx.array]:
    """Return (weight, bias, columns of the 1x1) in the order of the grouped convolution."""
    parts = module.multiples
    weight = mx.stack([part.weight for part in parts], axis=1)
    weight = weight.reshape(-1, *weight.shape[2:])
    bias = mx.stack([part.bias for part in parts], axis=1).reshape(-1)
    columns = mx.stack(module.pointwise, axis=2).reshape(module.bias.shape[0], -1)
    mx.eval(weight, bias, columns)
    return weight, bias, columns


def grouped_expansion(module: Expansion) -> Step:
    """The expansion's convolution with two outputs a channel instead of repeated channels."""

    def run(x: mx.array) -> mx.array:
        x = mx.conv2d(x, module.conv.weight, padding=1, groups=x.shape[-1]) + module.conv.bias
        return gelu(x * mx.sigmoid(module.se(x)))

    return run


def bias_after(block: RepMixerBlock) -> Step:
    """fc2's bias in the GEMM and the residual added after it, instead of one kernel for two."""

    def run(x: mx.array) -> mx.array:
        x = block.mixer(x) + block.mixer.bias
        hidden = gelu(block.ffn.fc1(block.ffn.conv(x)))
        return x + block.ffn.fc2(hidden)

    return run


def convolved(block: RepMixerBlock) -> Step:
    """Both 1x1 as convolutions, their biases and the residual added after."""

    def run(x: mx.array) -> mx.array:
        x = block.mixer(x) + block.mixer.bias
        hidden = bias_gelu(_conv(block.ffn.fc1, block.ffn.conv(x)), block.ffn.fc1.bias)
        return x + (_conv(block.ffn.fc2, hidden) + block.ffn.fc2.bias)

    return run


def _conv(layer: Pointwise, x: mx.array) -> mx.array:
    return mx.conv2d(x, layer.weight[:, None, None, :])


def written_out_norm(block: AttentionBlock) -> Step:
    """LayerNorm from its parts, as other ports write it; the rest is the engine's block."""

    def run(x: mx.array) -> mx.array:
        mean = mx.mean(x, axis=-1, keepdims=True)
        variance = mx.mean((x - mean) ** 2, axis=-1, keepdims=True)
        normed = (x - mean) / mx.sqrt(variance + LAYER_NORM_EPS)
        mixed = pointwise(x, block.mix(normed), block.proj.weight)
        x, residual = two_biases(mixed, block.proj.bias, block.ffn.fc2.bias)
        return block.ffn(x, residual)

    return run


FORMS: dict[str, tuple[type[nn.Module], Form]] = {
    "downsample: repeated channels": (Downsample, repeated_downsample),
    "downsample: grouped convolution": (Downsample, grouped_downsample),
    "expansion: grouped convolution": (Expansion, grouped_expansion),
    "bias after fc2": (RepMixerBlock, bias_after),
    "1x1 as a convolution": (RepMixerBlock, convolved),
    "LayerNorm from its parts": (AttentionBlock, written_out_norm),
}
"""Variants of one kind of module: name → (the engine's module, the form)."""
