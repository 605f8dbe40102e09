"""Frozen random weights and pictures: the same numbers on every machine, today and later.

Knows how to turn a state-dict key of timm's FastViT or of transformers' fast_vlm into a tensor,
and a seed into a picture. Knows no model, no file format and none of our own modules; the torch
reference makers and the tests both import it, so the weights never travel.

The stream: legacy `numpy.random.RandomState` (frozen by numpy's compatibility policy, NEP 19)
seeded with blake2b of the key, and only its `random_sample`, which is integer arithmetic. No
normal variates: they go through libm's log, which differs between machines in the last bit.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal[
    "count", "mean", "variance", "batch_norm", "layer_norm", "layer_scale", "bias", "embedding",
    "skip_conv", "mixer_conv", "gelu_conv", "weight",
]  # fmt: skip

# Kernels that stand for a fused skip connection: near the identity, as real ones are.
_SKIP = ("token_mixer.reparam_conv.weight", "pos_emb.reparam_conv.weight")
# Branches of a RepMixer that are added to its input 42 times over: kept small.
_MIXER = ("mixer.conv_kxk.0.conv.weight", "mixer.conv_scale.conv.weight", "pos_enc.weight")
# Layers followed by GELU, which takes half of the variance away. Several branches share the gain.
_GELU = ("stem.", "downsample.", "final_conv.")
_SMALL = ("small_conv.", "conv_scale.")


def kind_of(key: str, shape: tuple[int, ...]) -> Kind:
    """Say which rule makes this tensor. Raises ValueError for a key that no rule names."""
    last = key.rsplit(".", 1)[-1]
    by_last: dict[str, Kind] = {
        "num_batches_tracked": "count",
        "running_mean": "mean",
        "running_var": "variance",
        "gamma": "layer_scale",
        "bias": "bias",
    }
    if last in by_last:
        return by_last[last]
    if last != "weight":
        raise ValueError(f"no frozen rule for {key!r}")
    if len(shape) == 1:
        return "batch_norm" if ".bn." in key or ".identity." in key else "layer_norm"
    if key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "embedding"
    if key.endswith(_SKIP):
        return "skip_conv"
    if key.endswith(_MIXER):
        return "mixer_conv"
    if any(part in key for part in _GELU) and ".se." not in key:
        return "gelu_conv"
    return "weight"


def _is_small(key: str) -> bool:
    return any(part in key for part in _SMALL)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 values to the nearest bfloat16, ties to even; return its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 values that bfloat16 represents exactly."""
    return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32).reshape(values.shape)


def tensor(
    key: str, shape: tuple[int, ...], *, round_to: Literal["bfloat16"] | None = None
) -> NDArray[np.float32]:
    """Return the frozen float32 tensor of this key and shape (torch order: out, in, kh, kw).

    Weights have variance gain^2 / fan_in; a layer scale is 0.1 to 0.5 with either sign; a
    BatchNorm variance is 0.5 to 2. `round_to` leaves values that a bfloat16 file keeps exactly.
    `num_batches_tracked` is a float32 scalar here: whoever stores it casts it.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    stream = np.random.RandomState(seed)
    sample = stream.random_sample(shape)
    signed = sample * 2 - 1  # variance 1/3
    fan_in = int(np.prod(shape[1:], dtype=np.int64))
    unit = signed * np.sqrt(3 / fan_in)  # variance 1 / fan_in
    match kind_of(key, shape):
        case "count":
            values = np.full(shape, 1000.0)
        case "mean":
            values = 0.3 * signed
        case "variance":
            values = 0.5 + 1.5 * sample
        case "batch_norm":
            values = 0.5 + sample
        case "layer_norm":
            values = 1 + 0.3 * signed
        case "layer_scale":
            values = np.where(signed < 0, -1.0, 1.0) * (0.1 + 0.4 * np.abs(signed))
        case "bias":
            values = 0.1 * np.sqrt(3) * signed
        case "embedding":
            values = 0.5 * np.sqrt(3) * signed
        case "skip_conv":
            values = 0.4 * unit
            values[..., shape[-2] // 2, shape[-1] // 2] += 0.9
        case "mixer_conv":
            values = 0.35 * unit
        case "gelu_conv":
            values = unit * (1.5 if "reparam_conv" in key else 0.5 if _is_small(key) else 1.0)
        case "weight":
            values = unit
    single = np.asarray(values, np.float32)
    return bfloat16_rounded(single) if round_to == "bfloat16" else single


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Return an RGB picture uint8 [height, width, 3]: slopes, blocks, rings and grain.

    Integer arithmetic only. Structure matters: on pure noise a tower's pooled features hardly
    depend on where anything is, and a swapped axis or a shifted window would go unseen.
    """
    y = np.arange(height, dtype=np.int64)[:, None]
    x = np.arange(width, dtype=np.int64)[None, :]
    slope = (y * (3 + seed % 5) + x * (2 + seed % 3)) * 255 // (5 * height + 4 * width)
    block = ((y // (17 + seed % 7) + x // 23) % 3) * 60
    cy, cx = height * (2 + seed % 3) // 6, width * (1 + seed % 4) // 5
    ring = ((y - cy) ** 2 + (x - cx) ** 2) // (height + width + 29 * (seed % 11)) % 2 * 110
    grain = (y * 73856093 ^ x * 19349663 ^ seed * 83492791) % 37
    red, green, blue = slope + grain, block + ring, 255 - (slope + ring) // 2 - block // 2
    return (
        np.stack(np.broadcast_arrays(red, green, blue + grain), axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
    )
