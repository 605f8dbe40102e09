"""A KV cache as a session file has it: arrays by layer, and what each position stands for.

Knows the arrays' forms and checks a digest of each; one wrong byte and the cache is given up, since
it can be computed again. Refuses to know whether it fits a model: fingerprint and sizes are
compared where the model is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.checkpoint.safetensors_format import CODES, DTYPES, dtype_name, stored_bits
from fastvlm_mlx.generate.cache import Position
from fastvlm_mlx.generate.tensor_file import TensorFile

_MAX_POSITIONS = 1 << 18  # more than any context: what a file may make us list
_BITS = (4, 8)
_PLAIN = ("keys", "values")
_PACKED = tuple(f"{part}.{index}" for part in _PLAIN for index in range(3))
_KINDS = ("bfloat16", "float16", "float32", "uint32")  # of values, and of packed codes


@dataclass(frozen=True, slots=True, eq=False)
class SavedKV:
    """A KV cache and the network it came from.

    `layers` are as `KVPrefix.export` gives them: "keys" and "values" if `bits` is None, otherwise
    "keys.0" to "values.2"; each [1, heads, positions, width].
    """

    fingerprint: str
    bits: int | None
    group_size: int | None
    positions: tuple[Position, ...]
    layers: tuple[dict[str, mx.array], ...]


def kv_arrays(kv: SavedKV) -> Iterator[tuple[str, mx.array]]:
    """Yield each array by its name in the file, in order."""
    for index, layer in enumerate(kv.layers):
        for name in _part_names(kv.bits):
            yield f"kv.{index}.{name}", layer[name]


def _part_names(bits: int | None) -> tuple[str, ...]:
    return _PLAIN if bits is None else _PACKED


def kv_json(kv: SavedKV) -> dict[str, Any]:
    """Return what is said of a cache. Raises ValueError if its parts do not fit together."""
    if kv.bits is not None and kv.bits not in _BITS:
        raise ValueError(f"a cache of {kv.bits} bits")
    for layer in kv.layers:
        if set(layer) != set(_part_names(kv.bits)):
            raise ValueError(f"a layer of {kv.bits} bits has {', '.join(layer)}")
        for name, array in layer.items():
            if dtype_name(array) not in _KINDS or not _holds(array.shape, len(kv.positions)):
                raise ValueError(f"{name} is {array.dtype} {array.shape}")
    names = _part_names(kv.bits)
    return {
        "fingerprint": kv.fingerprint,
        "bits": kv.bits,
        "group_size": kv.group_size,
        "positions": _runs(kv.positions),
        "digests": [[_digest_of(layer[name]) for name in names] for layer in kv.layers],
    }


def _holds(shape: Sequence[int], length: int) -> bool:
    return len(shape) == 4 and shape[0] == 1 and shape[2] == length and min(shape) > 0


def read_kv(file: TensorFile, fields: object, altered: bool, damage: list[str]) -> SavedKV | None:
    """Return the cache if every byte of it is as it was saved; otherwise say so in `damage`."""
    if fields is None:
        return None
    if altered:  # its positions stand in the same text
        damage.append("the saved KV cache is not used for an altered transcript: computed again")
        return None
    try:
        return _read_layers(file, fields)
    except ValueError:
        damage.append("the saved KV cache is damaged: it is computed again")
        return None


def _read_layers(file: TensorFile, fields: object) -> SavedKV:
    """Read and check a cache. Raises ValueError for whatever is wrong with it."""
    match fields:
        case {
            "fingerprint": str(name),
            "bits": bits,
            "group_size": group_size,
            "positions": list(runs),
            "digests": list(digests),
        } if (bits, group_size) == (None, None) or (
            type(bits) is int and bits in _BITS and type(group_size) is int
        ):
            positions = _positions(runs)
        case _:
            raise ValueError("the cache is not described")
    layers = []
    for index, row in enumerate(digests):
        names = _part_names(bits)
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError("a layer has no digests")
        layers.append(
            {
                part: _read_array(file, f"kv.{index}.{part}", len(positions), digest)
                for part, digest in zip(names, row, strict=True)
            }
        )
    return SavedKV(name, bits, group_size, positions, tuple(layers))


def _read_array(file: TensorFile, name: str, length: int, digest: object) -> mx.array:
    """Return one array, evaluated. Raises ValueError if it is missing or not the one saved."""
    entry = file.entry(name)
    kind = DTYPES[entry.dtype] if entry is not None else ""
    if entry is None or kind not in _KINDS or not _holds(entry.shape, length):
        raise ValueError(f"{name} is missing")
    data = file.read(entry)
    if data is None or _array_digest(entry.dtype, entry.shape, data) != digest:
        raise ValueError(f"{name} is damaged")
    dtype = getattr(mx, kind)
    bits = data.view(np.uint16 if dtype.size == 2 else np.uint32).reshape(entry.shape)
    array = mx.array(bits).view(dtype)
    mx.eval(array)
    return array


def _digest_of(array: mx.array) -> str:
    return _array_digest(CODES[dtype_name(array)], array.shape, stored_bits(array))


def _array_digest(code: str, shape: Sequence[int], data: np.ndarray) -> str:
    """Return blake2b of an array's bytes, and of its dtype's name in the file and shape."""
    state = hashlib.blake2b(f"{code} {list(shape)}".encode(), digest_size=16)
    state.update(data.data)
    return state.hexdigest()


def _runs(positions: Sequence[Position]) -> list[dict[str, Any]]:
    """Return positions as runs of token ids, and of rows of a picture that follow each other."""
    runs: list[dict[str, Any]] = []

    def run_of(numbered: tuple[int, Position]) -> object:
        index, position = numbered
        return None if isinstance(position, int) else (position[0], position[1] - index)

    for key, group in groupby(enumerate(positions), run_of):
        members = [position for _, position in group]
        first = members[0]
        if key is None or isinstance(first, int):
            runs.append({"ids": members})
        else:
            runs.append({"image": first[0], "first": first[1], "rows": len(members)})
    return runs


def _positions(runs: Sequence[object]) -> tuple[Position, ...]:
    """Return what `_runs` was given. Raises ValueError for anything else."""
    positions: list[Position] = []
    for run in runs:
        match run:
            case {"ids": list(ids)} if all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                positions += ids
            case {"image": str(digest), "first": int(first), "rows": int(rows)} if (
                0 <= first <= _MAX_POSITIONS and 0 < rows <= _MAX_POSITIONS
            ):
                positions += [(digest, row) for row in range(first, first + rows)]
            case _:
                raise ValueError("a run of positions is neither ids nor a picture")
        if len(positions) > _MAX_POSITIONS:
            raise ValueError("there are more positions than any context holds")
    if not positions:
        raise ValueError("there are no positions")
    return tuple(positions)
