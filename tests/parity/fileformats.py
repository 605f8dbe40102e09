"""Weight files written by hand, byte by byte, as other programs write them.

Knows two containers: safetensors (8-byte length, JSON header, data) and `torch.save`'s zip (a
protocol-2 pickle and one file a storage). Knows no model and imports neither torch, safetensors
nor fastvlm_mlx, so a fault in a reader cannot hide in the writer.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import frozen
import numpy as np
from numpy.typing import NDArray

_NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U32": np.uint32}
_STORAGE = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_STORAGE |= {"I64": "LongStorage"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file holds it: safetensors' dtype name, shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored(values: NDArray[np.generic], dtype: str) -> Stored:
    """Encode as F32, F16 or BF16 (ties to even); integers keep their own type."""
    if np.issubdtype(values.dtype, np.integer):
        dtype = {"int64": "I64", "uint32": "U32"}[values.dtype.name]
    if dtype == "BF16":
        return Stored(
            dtype, values.shape, frozen.bfloat16_bits(np.asarray(values, np.float32)).tobytes()
        )
    return Stored(dtype, values.shape, np.ascontiguousarray(values, _NUMPY[dtype]).tobytes())


def write_safetensors(path: Path, tensors: Mapping[str, Stored], format_name: str) -> None:
    """Write one file; `format_name` is its metadata's `format` ("pt", "mlx")."""
    header: dict[str, object] = {"__metadata__": {"format": format_name}}
    offset = 0
    for key in sorted(tensors):
        end = offset + len(tensors[key].data)
        header[key] = {
            "dtype": tensors[key].dtype,
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in sorted(tensors):
            file.write(tensors[key].data)


def write_sharded(folder: Path, tensors: Mapping[str, Stored], count: int, suffix: str) -> None:
    """Split over `count` files of near equal size, with the index transformers writes.

    `suffix` is "safetensors" (`model-00001-of-…`) or "bin" (`pytorch_model-00001-of-…`).
    """
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    total = sum(len(value.data) for value in tensors.values())
    shards: list[dict[str, Stored]] = [{} for _ in range(count)]
    before = 0
    for key in tensors:
        shards[min(count * before // total, count - 1)][key] = tensors[key]
        before += len(tensors[key].data)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
        weight_map |= dict.fromkeys(shard, name)
        if suffix == "safetensors":
            write_safetensors(folder / name, shard, "pt")
        else:
            write_torch(folder / name, shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_torch(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write what `torch.save(model.state_dict(), path)` writes: zip, stored, 64-byte aligned.

    Equal tensors share one storage, as tied weights do there.
    """
    keys: dict[Stored, int] = {}
    for value in tensors.values():
        keys.setdefault(value, len(keys))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, "archive/data.pkl", _state_dict_pickle(tensors, keys))
        _member(archive, "archive/byteorder", b"little")
        for value, key in keys.items():
            _member(archive, f"archive/data/{key}", value.data)
        _member(archive, "archive/version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Store one member, its data aligned by an extra field named FB as torch does."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(name) + 4
    pad = -start % 64
    info.extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
    archive.writestr(info, data)


def _state_dict_pickle(tensors: Mapping[str, Stored], keys: Mapping[Stored, int]) -> bytes:
    """Return the protocol-2 opcodes of an OrderedDict of `_rebuild_tensor_v2` calls."""
    ordered = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    out = [pickle.PROTO + b"\x02", ordered, pickle.MARK]
    for name, value in tensors.items():
        strides = [int(np.prod(value.shape[i + 1 :])) for i in range(len(value.shape))]
        count = int(np.prod(value.shape))
        out += [_text(name), pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n", pickle.MARK]
        out += [pickle.MARK, _text("storage")]
        out += [pickle.GLOBAL + f"torch\n{_STORAGE[value.dtype]}\n".encode()]
        out += [_text(str(keys[value])), _text("cpu"), _integer(count), pickle.TUPLE]
        out += [pickle.BINPERSID, _integer(0), _tuple(value.shape), _tuple(strides)]
        out += [pickle.NEWFALSE, ordered, pickle.TUPLE, pickle.REDUCE]
    # A module's state dict carries its modules' versions as an attribute of the dict.
    out += [pickle.SETITEMS, pickle.EMPTY_DICT, _text("_metadata"), ordered, pickle.SETITEM]
    return b"".join([*out, pickle.BUILD, pickle.STOP])


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 8:
        return pickle.BININT1 + struct.pack("<B", value)
    return pickle.BININT + struct.pack("<i", value)


def _tuple(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(_integer(value) for value in values) + pickle.TUPLE
