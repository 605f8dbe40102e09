"""A Core ML package's structure and interface, read from its protobuf without coremltools.

Knows the few fields of Core ML's `Model` message that say which arrays go in and out
(apple/coremltools mlmodel/format/Model.proto, FeatureTypes.proto). Knows nothing of the network
inside, which `tests/parity` evaluates.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.convert.verify_folder import Folder, Json, Unchecked

# ArrayFeatureType.ArrayDataType in FeatureTypes.proto.
_DTYPES = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32"}
_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_BLOB_ALIGNMENT = 64
_BLOB_SENTINEL = 0xDEADBEEF


@dataclass(frozen=True, slots=True)
class Array:
    """A multi-array that goes into or comes out of a model; an unstated shape is empty."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def check_package(folder: Folder, requirement: Json) -> str | None:
    """Manifest, model and weights are there and whole; the manifest's root is the model."""
    package = requirement["package"]
    for part in ("Manifest.json", _MODEL, _WEIGHTS):
        path = folder.path / package / part
        if not path.is_file() or not path.stat().st_size:
            return f"there is no {package}/{part}"
    if not _is_whole(folder.path / package / _WEIGHTS):
        return f"{package}/{_WEIGHTS} is truncated or corrupt"
    try:
        manifest = folder.json(f"{package}/Manifest.json")
    except Unchecked as error:
        return str(error)
    entries, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    entry = entries.get(root) if isinstance(entries, dict) and isinstance(root, str) else None
    path = entry.get("path") if isinstance(entry, dict) else None
    if f"Data/{path}" != _MODEL:
        return f"{package}/Manifest.json's root model is {path!r}, not the one in Data"
    return None


def _is_whole(weights: Path) -> bool:
    """Whether a weight file holds every blob that its header counts, to the last byte.

    Its form is coremltools' MILBlob/Blob/StorageFormat.hpp: a header of 64 bytes that begins with
    the count, then for each blob a record of 64 (sentinel, dtype, bytes, place) before its data.
    """
    size = weights.stat().st_size
    with weights.open("rb") as file:
        (count,) = struct.unpack("<I", file.read(_BLOB_ALIGNMENT)[:4].ljust(4, b"\0"))
        end = _BLOB_ALIGNMENT
        for _ in range(count):
            file.seek(-(-end // _BLOB_ALIGNMENT) * _BLOB_ALIGNMENT)
            record = file.read(24)
            if len(record) < 24:
                return False
            sentinel, _, nbytes, place = struct.unpack("<IIQQ", record)
            if sentinel != _BLOB_SENTINEL or place < end:
                return False
            end = place + nbytes
    return end <= size


def check_array(folder: Folder, requirement: Json) -> str | None:
    """The package's model has just this input or output, of this shape and dtype.

    An output's shape may be left unstated in the file, as coremltools leaves it for programs.
    """
    package, side = requirement["package"], requirement["side"]
    try:
        data = (folder.path / package / _MODEL).read_bytes()
    except OSError as error:
        raise Unchecked(f"there is no {package}/{_MODEL}") from error
    try:
        arrays = _interface(data)[side]
    except (IndexError, UnicodeDecodeError, ValueError):
        return f"{package}/{_MODEL} is no Core ML model"
    asked = Array(requirement["name"], tuple(requirement["shape"]), requirement["dtype"])
    if len(arrays) != 1:
        return f"{package} has {len(arrays)} {side}s, not 1"
    (found,) = arrays
    if found.name != asked.name:
        return f"{package}'s {side} is called {found.name!r}, not {asked.name!r}"
    shape = found.shape or (asked.shape if side == "output" else ())
    if (shape, found.dtype) != (asked.shape, asked.dtype):
        return (
            f"{package}'s {side} is {found.dtype} {list(found.shape)}, "
            f"not {asked.dtype} {list(asked.shape)}"
        )
    return None


def _interface(data: bytes) -> dict[str, list[Array]]:
    """Return the arrays of a serialized `Model`: description is 2, its inputs 1, outputs 10."""
    sides: dict[str, list[Array]] = {"input": [], "output": []}
    for number, description in _fields(data):
        if number != 2 or not isinstance(description, bytes):
            continue
        for part, feature in _fields(description):
            side = {1: "input", 10: "output"}.get(part)
            if side and isinstance(feature, bytes):
                sides[side].append(_array(feature))
    return sides


def _array(feature: bytes) -> Array:
    """Read a FeatureDescription: name 1, type 3, in which multiArrayType 5 has shape 1, dtype 2."""
    name, shape, dtype = "", [], "no array"
    for number, value in _fields(feature):
        if number == 1 and isinstance(value, bytes):
            name = value.decode()
        elif number == 3 and isinstance(value, bytes):
            for kind, array in _fields(value):
                if kind != 5 or not isinstance(array, bytes):
                    continue
                for part, content in _fields(array):
                    if part == 1:
                        shape += _numbers(content)
                    elif part == 2 and isinstance(content, int):
                        dtype = _DTYPES.get(content, f"type {content}")
    return Array(name, tuple(shape), dtype)


def _numbers(content: bytes | int) -> list[int]:
    """Repeated numbers: packed into bytes, or one at a time."""
    if isinstance(content, int):
        return [content]
    numbers, at = [], 0
    while at < len(content):
        number, at = _varint(content, at)
        numbers.append(number)
    return numbers


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (field number, value) of a protobuf message: a varint, or the bytes of the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or at + length > len(data):
            raise ValueError("no protobuf message")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
