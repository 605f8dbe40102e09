"""Sessions to save and files to damage: what the tests of session files start from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.generate.session_file import SavedImage, SavedKV, SavedSession
from fastvlm_mlx.model.fastvlm import pixel_digest
from fastvlm_mlx.prompt.template import Message, user_message

FORMS: tuple[tuple[mx.Dtype, int | None], ...] = (
    (mx.float32, None),
    (mx.bfloat16, None),
    (mx.float16, None),
    (mx.float32, 8),
    (mx.bfloat16, 4),
)


def picture(seed: int, name: str = "", height: int = 12, width: int = 8) -> SavedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return SavedImage(pixel_digest(pixels), name or f"desk {seed}.jpg", pixels)


def kv(
    positions: tuple, dtype: mx.Dtype = mx.float32, bits: int | None = None, layers: int = 2
) -> SavedKV:
    rng = np.random.default_rng(7)
    made = []
    for _ in range(layers):
        layer: dict[str, mx.array] = {}
        for part in ("keys", "values"):
            # Cut out of a longer buffer, as `KVPrefix.export` does it.
            whole = mx.array(rng.standard_normal((1, 2, len(positions) + 3, 64))).astype(dtype)
            if bits is None:
                layer[part] = whole[..., : len(positions), :]
            else:
                for i, a in enumerate(mx.quantize(whole, group_size=32, bits=bits)):
                    layer[f"{part}.{i}"] = a[..., : len(positions), :]
        made.append(layer)
    return SavedKV("ab" * 16, bits, bits and 32, positions, tuple(made))


def session(dtype: mx.Dtype = mx.float32, bits: int | None = None) -> SavedSession:
    one, two = picture(1, "Schreibtisch ü 机.jpg"), picture(2, height=5)
    messages = (
        Message("system", ("Du bist nett. 🙂",)),
        user_message("Was ist das?\n\tEin “Test”", 2),
        Message("assistant", ("Ein Ding\u0000\u001b[31m und noch eins.",)),
        user_message("And again?", 1),
        Message("assistant", ("",)),
    )
    rows = [(one.digest, row) for row in range(4)]
    positions = (3, 9, *rows, 5, *((two.digest, row) for row in range(2)), 8, 8, *rows, 1)
    return SavedSession(messages, (one, two, one), "apple/FastVLM-0.5B", kv(positions, dtype, bits))


def raw(array: mx.array) -> bytes:
    bits = mx.contiguous(array).view(mx.uint16 if array.dtype.size == 2 else mx.uint32)
    return np.array(bits).tobytes()


def same_kv(one: SavedKV | None, other: SavedKV | None) -> bool:
    if one is None or other is None:
        return one is other
    said = [(k.fingerprint, k.bits, k.group_size, k.positions) for k in (one, other)]
    forms = [
        [{n: (a.dtype, a.shape, raw(a)) for n, a in layer.items()} for layer in k.layers]
        for k in (one, other)
    ]
    return said[0] == said[1] and forms[0] == forms[1]


def same_image(one: SavedImage, other: SavedImage) -> bool:
    if (one.digest, one.name) != (other.digest, other.name):
        return False
    if one.pixels is None or other.pixels is None:
        return one.pixels is other.pixels
    return one.pixels.dtype == other.pixels.dtype and np.array_equal(one.pixels, other.pixels)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's JSON and the bytes after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(path: Path, header: dict[str, Any], rest: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def edit_session(path: Path, edit: Callable[[Any], Any], *, resign: bool) -> None:
    """Change the transcript's JSON; with `resign`, as someone would who knows the format."""
    header, rest = header_of(path)
    said = header["__metadata__"]
    said["session"] = json.dumps(edit(json.loads(said["session"])))
    if resign:
        said["session_digest"] = hashlib.blake2b(
            said["session"].encode(), digest_size=16
        ).hexdigest()
    write_header(path, header, rest)
