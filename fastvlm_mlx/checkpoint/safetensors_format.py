"""How a safetensors file is spelled: names of dtypes, a file's head, an array's bits.

Knows the format (github.com/huggingface/safetensors, README "Format"). Reads and writes no files,
and knows nothing of what the tensors are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U32": "uint32",
    "U8": "uint8",
    "BOOL": "bool_",
}
"""The dtypes we read, as the format and as MLX spells them."""

CODES = {DTYPES[code]: code for code in ("BF16", "F16", "F32", "U32", "U8")}
"""The dtypes we write, as MLX and as the format spells them."""

# What an array's bits are taken as, by their bytes an item: numpy has no bfloat16.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def item_bytes(dtype: str) -> int:
    """Return the bytes of one value of a dtype, as MLX spells it."""
    size: int = getattr(mx, dtype).size
    return size


def file_head(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
) -> bytes:
    """Return a file's head: its length in 8 bytes, little-endian, then JSON padded to 8 bytes.

    `tensors` are (name, dtype as MLX spells it, shape) in the order of their values.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * item_bytes(dtype)
        fields[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dtype_name(array: mx.array) -> str:
    """Return an array's dtype as MLX spells it: "bfloat16"."""
    return str(array.dtype).removeprefix("mlx.core.")


def stored_bits(array: mx.array) -> np.ndarray:
    """Return an array's bits, flat and unsigned, in the memory where MLX has them if in order."""
    flat = mx.contiguous(array).reshape(-1)
    return np.asarray(flat.view(_BITS[array.dtype.size]))  # evaluates it
