"""Every branch, BatchNorm, layer scale, LayerNorm affine and the pixels' 1/255 folded into weights.

Pure: named arrays of one module in, named arrays of its fused form out, always computed in
float32. Knows canonical names (`layouts.py` makes them) and the tower's structure; knows no files,
no source spelling and no target dtype. All folds are exact in real arithmetic.

Sources of the formulas: apple/ml-fastvlm `mci.py` and apple/ml-mobileclip `mobileone.py`
(`_fuse_bn_tensor`, `reparameterize`), Ding et al. 2021 (RepVGG), Vasu et al. 2023 (FastViT).

Canonical names of one convolution unit: `weight`, `bias` (already one convolution), or
`conv.weight` with `bn.*`, or the branches `kxk.N.{conv,bn}.*`, `scale.{conv,bn}.*` (a smaller
kernel) and `skip.bn.*` (identity). Convolution weights are OHWI.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from fastvlm_mlx.config import VisionConfig

BATCH_NORM_EPS = 1e-5

Weights = dict[str, mx.array]


def module_paths(config: VisionConfig) -> Iterator[str]:
    """Yield the path of every module that folds as a whole, in the order of the data."""
    yield "stem"
    for s, blocks in enumerate(config.layers):
        if s > 0:
            yield f"stages.{s}.downsample"
        if config.pos_embs[s]:
            yield f"stages.{s}.pos_emb"
        for j in range(blocks):
            yield f"stages.{s}.blocks.{j}"
    yield "expansion"


def fuse_module(
    path: str, weights: Weights, config: VisionConfig, *, pixel_scale: float
) -> Weights:
    """Return the fused arrays of the module at `path`, named as `model/vision.py` names them.

    `weights` holds the module's canonical arrays, named relative to `path`; each is removed as it
    is used, so what is left in it afterwards is no part of the module. `pixel_scale` multiplies
    the stem's weights. The result is lazy, float32, on the CPU stream. Raises KeyError with the
    relative name of a missing array.
    """
    with mx.stream(mx.cpu):
        unit = _Reader(weights)
        if path == "stem":
            return _stem(unit, pixel_scale)
        if path == "expansion":
            return _expansion(unit)
        stage = int(path.split(".")[1])
        if path.endswith("downsample"):
            return _downsample(unit, config.embed_dims[stage] // config.embed_dims[stage - 1])
        if path.endswith("pos_emb"):
            return _pos_emb(unit)
        if config.token_mixers[stage] == "repmixer":
            return _repmixer_block(unit)
        return _attention_block(unit)


def pair_heads(path: str, fused: Weights, config: VisionConfig) -> Weights:
    """Return a fused module whose attention heads 2i and 2i+1 share one key and value head.

    Keys and values of such a pair already lie side by side, so only queries are spread to twice
    the width, [q|0] and [0|q], by rows of zeros in `qkv`; columns of zeros in `proj` drop the half
    of each head's mix that is its neighbour's. Exact in real arithmetic: what is added is zero.
    Other modules come back as they are. Lazy, on the CPU stream. `model/vision.py` says which
    towers can be paired.
    """
    if "qkv.weight" not in fused:
        return fused
    dim = config.embed_dims[int(path.split(".")[1])]
    with mx.stream(mx.cpu):
        weight, bias = fused["qkv.weight"], fused["qkv.bias"]
        paired = {
            "qkv.weight": mx.concatenate([_spread(weight[:dim], config.head_dim), weight[dim:]]),
            "qkv.bias": mx.concatenate([_spread(bias[:dim], config.head_dim), bias[dim:]]),
            "proj.weight": _spread(fused["proj.weight"].T, config.head_dim).T,
        }
    return fused | paired


def _spread(rows: mx.array, head_dim: int) -> mx.array:
    """Put as many zeros behind the rows of each even head and before those of each odd one."""
    pairs = rows.reshape(-1, 2, head_dim, *rows.shape[1:])
    even, odd = pairs[:, 0], pairs[:, 1]
    zeros = mx.zeros_like(even)
    spread = mx.concatenate([even, zeros, zeros, odd], axis=1)
    return spread.reshape(2 * rows.shape[0], *rows.shape[1:])


def reparameterize_module(path: str, weights: Weights) -> Weights:
    """Return a module's canonical arrays with the branches of each convolution unit as one.

    That is the inference form that checkpoints are exchanged in: the 7x7's BatchNorm, LayerNorm and
    layer scales stay apart. A module already in that form comes back with the same values. Takes
    `weights` as `fuse_module` does, names are relative to `path`. The units are float32 and lazy,
    on the CPU stream; all else is as it was. Raises KeyError with the name of a missing array.
    """
    with mx.stream(mx.cpu):
        unit = _Reader(weights)
        if path.endswith("pos_emb"):
            folded = _pos_emb(unit)
        else:
            folded = {}
            for name in ("0", "1", "2", "conv", "mixer"):
                if unit.has(name):
                    fold = _mixer(unit) if name == "mixer" else _unit(unit.under(name))
                    folded |= {f"{name}.weight": fold[0], f"{name}.bias": fold[1]}
    rest = {name: weights.pop(name) for name in list(weights)}
    return folded | rest


class _Reader:
    """Named arrays under one prefix, handed out once each, in float32."""

    def __init__(self, weights: Weights, prefix: str = "") -> None:
        self.weights = weights
        self.prefix = prefix

    def under(self, name: str) -> _Reader:
        return _Reader(self.weights, f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        name = self.prefix + name
        return name in self.weights or any(key.startswith(name + ".") for key in self.weights)

    def take(self, name: str) -> mx.array:
        return self.weights.pop(self.prefix + name).astype(mx.float32)

    def vector(self, name: str) -> mx.array:
        return self.take(name).reshape(-1)


def _batch_norm(bn: _Reader) -> tuple[mx.array, mx.array]:
    """Return (scale, shift) [C] such that BatchNorm(x) = scale x + shift at inference."""
    scale = bn.take("weight") * mx.rsqrt(bn.take("running_var") + BATCH_NORM_EPS)
    return scale, bn.take("bias") - bn.take("running_mean") * scale


def _conv_bn(branch: _Reader) -> tuple[mx.array, mx.array]:
    """Fold `bn` into the bias-free convolution before it."""
    scale, shift = _batch_norm(branch.under("bn"))
    return branch.take("conv.weight") * scale[:, None, None, None], shift


def _identity(shape: tuple[int, ...]) -> mx.array:
    """Return the OHWI kernel [O,k,k,I] of a grouped convolution that copies its input."""
    outputs, kernel, _, inputs = shape
    inside = (mx.arange(outputs)[:, None] % inputs) == mx.arange(inputs)[None, :]
    pad = kernel // 2
    centre = inside.astype(mx.float32)[:, None, None, :]
    return mx.pad(centre, [(0, 0), (pad, pad), (pad, pad), (0, 0)])


def _pad_kernel(weight: mx.array, kernel: int) -> mx.array:
    """Centre a smaller odd kernel in zeros."""
    pad = (kernel - weight.shape[1]) // 2
    return mx.pad(weight, [(0, 0), (pad, pad), (pad, pad), (0, 0)])


def _unit(unit: _Reader) -> tuple[mx.array, mx.array]:
    """Return (weight OHWI, bias) of one convolution unit, its parallel branches summed."""
    if unit.has("weight"):
        return unit.take("weight"), unit.take("bias")
    weight, bias = _conv_bn(unit.under("kxk.0"))
    branch = 1
    while unit.has(f"kxk.{branch}"):
        more_weight, more_bias = _conv_bn(unit.under(f"kxk.{branch}"))
        weight, bias = weight + more_weight, bias + more_bias
        branch += 1
    if unit.has("scale"):
        small, small_bias = _conv_bn(unit.under("scale"))
        weight, bias = weight + _pad_kernel(small, weight.shape[1]), bias + small_bias
    if unit.has("skip"):
        scale, shift = _batch_norm(unit.under("skip.bn"))
        weight = weight + _identity(weight.shape) * scale[:, None, None, None]
        bias = bias + shift
    return weight, bias


def _matrix(weight: mx.array) -> mx.array:
    """View a 1x1 convolution [O,1,1,I] (or a matrix) as [O,I]."""
    return weight.reshape(weight.shape[0], weight.shape[-1])


def _stem(unit: _Reader, pixel_scale: float) -> Weights:
    first, first_bias = _unit(unit.under("0"))
    second, second_bias = _unit(unit.under("1"))
    third, third_bias = _unit(unit.under("2"))
    return {
        "weight": first * pixel_scale,
        "bias": first_bias,
        "depthwise.weight": second,
        "depthwise.bias": second_bias,
        "pointwise.weight": _matrix(third),
        "pointwise.bias": third_bias,
    }


def _mixer(block: _Reader) -> tuple[mx.array, mx.array]:
    """RepMixer x + ls (mixer(x) - norm(x)) as one depthwise 3x3 (FastViT, section 3.2)."""
    if block.has("mixer.weight"):
        return _unit(block.under("mixer"))
    weight, bias = _unit(block.under("mixer"))
    scale, shift = _batch_norm(block.under("mixer_norm.skip.bn"))
    layer_scale = block.vector("mixer_scale")
    identity = _identity(weight.shape)
    weight = weight - identity * scale[:, None, None, None]
    return identity + layer_scale[:, None, None, None] * weight, layer_scale * (bias - shift)


def _ffn(ffn: _Reader, layer_scale: mx.array) -> Weights:
    """BatchNorm's scale into the 7x7, its shift through fc1 into fc1's bias; layer scale into fc2.

    The shift may pass fc1 because fc1 is pointwise: no padding lies between, so borders are exact.
    """
    conv, shift = _conv_bn(ffn.under("conv"))
    fc1, fc2 = _matrix(ffn.take("fc1.weight")), _matrix(ffn.take("fc2.weight"))
    return {
        "ffn.conv.weight": conv,
        "ffn.fc1.weight": fc1,
        "ffn.fc1.bias": ffn.take("fc1.bias") + fc1 @ shift,
        "ffn.fc2.weight": fc2 * layer_scale[:, None],
        "ffn.fc2.bias": ffn.take("fc2.bias") * layer_scale,
    }


def _repmixer_block(block: _Reader) -> Weights:
    weight, bias = _mixer(block)
    return {
        "mixer.weight": weight,
        "mixer.bias": bias,
        **_ffn(block.under("ffn"), block.vector("layer_scale")),
    }


def _attention_block(block: _Reader) -> Weights:
    """LayerNorm's gamma into qkv's columns, its beta through qkv into a bias; layer scales out."""
    gamma, beta = block.take("norm.weight"), block.take("norm.bias")
    qkv = block.take("qkv.weight")
    layer_scale = block.vector("layer_scale_1")
    return {
        "qkv.weight": qkv * gamma[None, :],
        "qkv.bias": qkv @ beta,
        "proj.weight": block.take("proj.weight") * layer_scale[:, None],
        "proj.bias": block.take("proj.bias") * layer_scale,
        **_ffn(block.under("ffn"), block.vector("layer_scale_2")),
    }


def _downsample(unit: _Reader, multiple: int) -> Weights:
    """Split the grouped 7x7 into `multiple` depthwise ones; output channel c reads c // multiple.

    The 1x1 after it then sums over the parts, each with its own columns.
    """
    large, large_bias = _unit(unit.under("0"))
    small, small_bias = _unit(unit.under("1"))
    columns = _matrix(small)
    fused = {"bias": small_bias}
    for i in range(multiple):
        fused[f"multiples.{i}.weight"] = large[i::multiple]
        fused[f"multiples.{i}.bias"] = large_bias[i::multiple]
        fused[f"pointwise.{i}"] = columns[:, i::multiple]
    return fused


def _pos_emb(unit: _Reader) -> Weights:
    """RepCPE x + conv(x) as one depthwise 7x7."""
    if unit.has("weight"):
        weight, bias = _unit(unit)
    else:
        weight, bias = unit.take("encoding.weight"), unit.take("encoding.bias")
        weight = weight + _identity(weight.shape)
    return {"weight": weight, "bias": bias}


def _expansion(unit: _Reader) -> Weights:
    weight, bias = _unit(unit.under("conv"))
    return {
        "conv.weight": weight,
        "conv.bias": bias,
        "se.reduce.weight": _matrix(unit.take("se.reduce.weight")),
        "se.reduce.bias": unit.take("se.reduce.bias"),
        "se.expand.weight": _matrix(unit.take("se.expand.weight")),
        "se.expand.bias": unit.take("se.expand.bias"),
    }
