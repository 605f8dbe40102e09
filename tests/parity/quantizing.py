"""mlx-vlm's quantization of a FastVLM's tensors, and the float twin of the result.

Knows which tensors mlx-vlm's convert quantizes and how affine groups are packed (FORMATS B1: codes
least significant first in uint32, w = scale * code + bias a group). `mx.quantize` makes the codes;
the twin is unpacked here in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import frozen
import mlx.core as mx
import numpy as np
from fileformats import Stored, stored
from numpy.typing import NDArray

GROUP = 64
_MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def is_quantized(key: str, shape: tuple[int, ...]) -> bool:
    """Tell whether mlx-vlm's convert quantizes this tensor: every Linear and Embedding but the
    tower's, if the groups divide its inputs. The projector is not skipped, by accident of its name.
    """
    return (
        key.endswith(".weight")
        and len(shape) == 2
        and not key.startswith("vision_tower.")
        and shape[1] % GROUP == 0
    )


def quantize(
    tensors: Mapping[str, NDArray[Any]],
    bits: int,
    dtype: str,
    overrides: Mapping[str, int] | None = None,
) -> tuple[dict[str, Stored], dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Return (the packed tensors, their float32 twin, config.json's `quantization`).

    All floats are stored as `dtype`. `overrides` gives the modules at some paths bits of their own.
    """
    overrides = overrides or {}
    packed: dict[str, Stored] = {}
    twin: dict[str, NDArray[np.float32]] = {}
    for key, values in tensors.items():
        if not is_quantized(key, values.shape):
            packed[key] = stored(values, dtype)
            twin[key] = _as_float32(packed[key])
            continue
        path = key.removesuffix(".weight")
        width = overrides.get(path, bits)
        weight = mx.array(np.asarray(values, np.float32)).astype(_MLX[dtype])
        codes, scales, biases = mx.quantize(weight, group_size=GROUP, bits=width)
        packed[key] = stored(np.array(codes), dtype)
        packed[f"{path}.scales"] = stored(np.array(scales.astype(mx.float32)), dtype)
        packed[f"{path}.biases"] = stored(np.array(biases.astype(mx.float32)), dtype)
        scale, bias = (_as_float32(packed[f"{path}.{leaf}"]) for leaf in ("scales", "biases"))
        whole = _unpack(np.array(codes), width).astype(np.float32).reshape(*scale.shape, GROUP)
        twin[key] = (whole * scale[..., None] + bias[..., None]).reshape(values.shape)
    config: dict[str, Any] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    config |= {path: {"group_size": GROUP, "bits": width} for path, width in overrides.items()}
    return packed, twin, config


def _unpack(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((codes[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(len(codes), -1)


def _as_float32(value: Stored) -> NDArray[np.float32]:
    if value.dtype == "BF16":
        bits = np.frombuffer(value.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(value.shape)
    kind = {"F32": np.float32, "F16": np.float16}[value.dtype]
    return np.float32(np.frombuffer(value.data, kind)).reshape(value.shape)


def bfloat16_rounded(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The float32 twin of tensors stored as bfloat16."""
    return {
        key: frozen.bfloat16_rounded(np.asarray(value, np.float32))
        for key, value in tensors.items()
    }
