"""The fused form of a training-form tower, in float64: a second opinion on checkpoint/fuse.py.

Knows timm's `fastvit_mci3` names and the formulas of apple/ml-fastvlm's mci.py: BatchNorm after a
bias-free convolution is a scale gamma/sqrt(var + eps) and a shift beta - mean * scale; parallel
branches add; an identity is the kernel with a 1 in its middle. Shares no code with fastvlm_mlx.
`make_fusing_proof.py` compares it with timm's own `reparameterize_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

EPS = 1e-5
Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.generic]]

_TRAINING_ONLY = re.compile(r"\.(conv_kxk|conv_scale|identity|large_conv|small_conv|pos_enc)\.")


def is_training_form(keys: Iterable[str]) -> bool:
    """Tell by the keys whether the tower still has its training-time branches."""
    return any(_TRAINING_ONLY.search(key) for key in keys)


def fuse_tower(tensors: Arrays) -> dict[str, Array]:
    """Return the tower `timm.create_model("fastvit_mci3", inference_mode=True)` would load.

    Keys are timm's, without prefix. ConvMLP's BatchNorm stays, as timm leaves it. A tower that is
    fused already comes back as it is, in float64.
    """
    rest = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
    fused: dict[str, Array] = {}

    def pull(prefix: str) -> dict[str, Array]:
        found = {key: rest.pop(key) for key in list(rest) if key.startswith(prefix)}
        return {key[len(prefix) :]: value for key, value in found.items()}

    for mixer in _prefixes(rest, ".token_mixer.mixer."):
        part = pull(f"{mixer}.token_mixer.")
        weight, bias = _mobile_one(part, "mixer.")
        skip, skip_bias = _identity_bn(part, "norm.identity.", weight.shape)
        scale = part["layer_scale.gamma"].reshape(-1)
        fused[f"{mixer}.token_mixer.reparam_conv.weight"] = _eye(weight.shape) + scale[
            :, None, None, None
        ] * (weight - skip)
        fused[f"{mixer}.token_mixer.reparam_conv.bias"] = scale * (bias - skip_bias)
    for large in _prefixes(rest, ".large_conv."):
        part = pull(f"{large}.")
        weight, bias = _conv_bn(part, "large_conv.")
        small, small_bias = _conv_bn(part, "small_conv.")
        fused[f"{large}.reparam_conv.weight"] = weight + np.pad(
            small, ((0, 0), (0, 0), (2, 2), (2, 2))
        )
        fused[f"{large}.reparam_conv.bias"] = bias + small_bias
    for encoding in _prefixes(rest, ".pos_enc."):
        part = pull(f"{encoding}.pos_enc.")
        fused[f"{encoding}.reparam_conv.weight"] = part["weight"] + _eye(part["weight"].shape)
        fused[f"{encoding}.reparam_conv.bias"] = part["bias"]
    for block in _prefixes(rest, ".conv_kxk.0."):
        part = pull(f"{block}.")
        weight, bias = _mobile_one(part, "")
        fused[f"{block}.reparam_conv.weight"], fused[f"{block}.reparam_conv.bias"] = weight, bias
        fused |= {f"{block}.{key}": value for key, value in part.items() if key.startswith("se.")}
    return fused | rest


def _prefixes(tensors: Arrays, marker: str) -> list[str]:
    return sorted({key.split(marker)[0] for key in tensors if marker in key})


def _eye(shape: tuple[int, ...]) -> Array:
    """Return the grouped kernel [O, I/g, k, k] that copies its input."""
    eye = np.zeros(shape)
    for channel in range(shape[0]):
        eye[channel, channel % shape[1], shape[2] // 2, shape[3] // 2] = 1
    return eye


def _bn(part: Mapping[str, Array], prefix: str) -> tuple[Array, Array]:
    scale = part[f"{prefix}weight"] / np.sqrt(part[f"{prefix}running_var"] + EPS)
    return scale, part[f"{prefix}bias"] - part[f"{prefix}running_mean"] * scale


def _conv_bn(part: Mapping[str, Array], prefix: str) -> tuple[Array, Array]:
    scale, shift = _bn(part, f"{prefix}bn.")
    return part[f"{prefix}conv.weight"] * scale[:, None, None, None], shift


def _identity_bn(
    part: Mapping[str, Array], prefix: str, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    scale, shift = _bn(part, prefix)
    return _eye(shape) * scale[:, None, None, None], shift


def _mobile_one(part: Mapping[str, Array], prefix: str) -> tuple[Array, Array]:
    """Sum of the k x k branch, the 1x1 branch in its middle and the normalised identity."""
    weight, bias = _conv_bn(part, f"{prefix}conv_kxk.0.")
    if f"{prefix}conv_kxk.1.conv.weight" in part:
        raise ValueError("fastvit_mci3 has one k x k branch a block")
    if f"{prefix}conv_scale.conv.weight" in part:
        point, shift = _conv_bn(part, f"{prefix}conv_scale.")
        pad = weight.shape[2] // 2
        weight = weight + np.pad(point, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        bias = bias + shift
    if f"{prefix}identity.weight" in part:
        skip, shift = _identity_bn(part, f"{prefix}identity.", weight.shape)
        weight, bias = weight + skip, bias + shift
    return weight, bias
