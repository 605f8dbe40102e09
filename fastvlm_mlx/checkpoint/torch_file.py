"""`pytorch_model*.bin` without torch: torch's zip format, one tensor read at a time.

Knows where in the archive each storage lies. What the pickle may say is `torch_pickle`'s; which
tensors a model needs is `layouts`'. Nothing is unpacked, imported or run, and only the table of
contents and the pickle are read when a file is opened. A nested dict ({"state_dict": ...}), the
format from before torch 1.6, TorchScript and big-endian files are refused with a line saying so.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastvlm_mlx.checkpoint.torch_pickle import (
    MAX_PICKLE_BYTES,
    RefusedPickle,
    TensorView,
    read_state_dict,
    shown,
)
from fastvlm_mlx.errors import CheckpointError

# As the items lie in the file. bfloat16 stays its bits; a bool is a byte until it is read.
_STORED = {
    name: np.dtype(stored)
    for name, stored in {
        "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
        "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "u1",
    }.items()
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30  # .ZIP specification (APPNOTE.TXT) 4.3.7
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
_RESAVE = "re-save it with torch.save of a current torch, or as safetensors"


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an archive entry's bytes lie in the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """One tensor of a torch file, not yet read.

    `shape` in items; `dtype` is float64, float32, float16, bfloat16, int64, int32, int16, int8,
    uint8 or bool; `storage_key` is equal for tensors that share memory (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    storage_key: str
    _path: Path
    _view: TensorView
    _entry: _Entry

    @property
    def nbytes(self) -> int:
        """Bytes of the array `read` returns."""
        return prod(self.shape) * _STORED[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The values, contiguous, in `shape`; bfloat16 as its bits in uint16.

        Only this tensor's stretch of the file is read. Raises CheckpointError if the file was
        cut short or removed since it was opened.
        """
        span, item = self._view.span, _STORED[self.dtype]
        try:
            with self._path.open("rb") as file:
                file.seek(self._entry.start + self._view.offset * item.itemsize)
                flat = np.fromfile(file, dtype=item, count=span)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror})") from None
        if flat.size != span:
            raise CheckpointError(
                f"{self._path}: was cut short while '{shown(self.name)}' was read"
            )
        if span == 0:
            array = np.empty(self.shape, item)
        else:
            steps = tuple(step * item.itemsize for step in self._view.stride)
            array = np.lib.stride_tricks.as_strided(flat, self.shape, steps)
        if self.dtype == "bool":
            return array != 0
        # A contiguous tensor is the buffer itself: no second copy of a large weight.
        return array if array.flags.c_contiguous else array.copy()


class TorchFile(Mapping[str, TorchTensor]):
    """The tensors of one `pytorch_model*.bin`, by name, in file order.

    Raises CheckpointError, one line that names the file, for anything but a zip-format torch file
    holding a plain dict of name to tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._tensors = self._read(file)
        except RefusedPickle as error:
            raise CheckpointError(f"{self.path}: refused: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __getitem__(self, name: str) -> TorchTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _read(self, file: BinaryIO) -> dict[str, TorchTensor]:
        entries = self._entries(file)
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise self._error(f"is a zip file, but not one torch.save made; {_RESAVE}")
        root = pickles[0].removesuffix("data.pkl")
        self._check_contents(file, root, entries)
        entry = entries[pickles[0]]
        if entry.nbytes > MAX_PICKLE_BYTES:
            raise RefusedPickle(
                f"its pickle is {entry.nbytes} bytes, more than any state_dict needs"
            )
        views = read_state_dict(_read_entry(file, entry))
        return {name: self._tensor(name, view, root, entries) for name, view in views.items()}

    def _tensor(
        self, name: str, view: TensorView, root: str, entries: Mapping[str, _Entry]
    ) -> TorchTensor:
        storage = view.storage
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise self._error(f"the data of '{shown(name)}' (data/{shown(storage.key)}) is missing")
        if storage.size * _STORED[storage.dtype].itemsize > entry.nbytes:
            raise self._error(
                f"the data of '{shown(name)}' has {entry.nbytes} bytes, "
                f"too few for {storage.size} items of {storage.dtype}"
            )
        return TorchTensor(name, view.shape, storage.dtype, storage.key, self.path, view, entry)

    def _check_contents(self, file: BinaryIO, root: str, entries: Mapping[str, _Entry]) -> None:
        stray = next((name for name in entries if not name.startswith(root)), None)
        if stray is not None:
            raise self._error(f"holds '{shown(stray)}', which torch.save never writes")
        order = entries.get(f"{root}byteorder")
        if order is not None and (word := _read_entry(file, order, 16)) != b"little":
            raise self._error(
                f"has byte order '{shown(word.decode('latin-1'))}'; only little is read; {_RESAVE}"
            )

    def _entries(self, file: BinaryIO) -> dict[str, _Entry]:
        """The archive's table of contents, each entry stored as it is and none overlapping."""
        magic = file.read(4)
        if magic != _LOCAL_HEADER_MAGIC:
            raise self._not_a_zip(magic)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                end = archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise self._error(
                f"is truncated or corrupt ({shown(str(error))}); fetch it again"
            ) from None
        if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", i.orig_filename) for i in infos):
            raise self._error(
                "is a TorchScript archive, which is a program and is never run; "
                "save the model's state_dict instead"
            )
        entries: dict[str, _Entry] = {}
        free_from = 0
        for info in infos:
            name = info.orig_filename
            if name in entries or name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise self._error(f"holds an entry named '{shown(name)}', not made by torch.save")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                raise self._error(f"holds '{shown(name)}' compressed or encrypted; {_RESAVE}")
            if not free_from <= info.header_offset < end:
                raise self._error(f"is truncated or corrupt ('{shown(name)}' overlaps another)")
            entries[name] = entry = self._locate(file, info)
            free_from = entry.start + entry.nbytes
        if free_from > end:
            raise self._error("is truncated or corrupt (its last entry overlaps the contents)")
        return entries

    def _locate(self, file: BinaryIO, info: zipfile.ZipInfo) -> _Entry:
        """The data begins after the local header, whose extra field pads it to 64 bytes."""
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes = int.from_bytes(header[26:28], "little")
        extra_bytes = int.from_bytes(header[28:30], "little")
        name = file.read(name_bytes).decode("latin-1")
        listed = info.orig_filename.encode("utf-8").decode("latin-1")
        if (
            not header.startswith(_LOCAL_HEADER_MAGIC)
            or len(header) < _LOCAL_HEADER_BYTES
            or name != listed
            or info.compress_size != info.file_size
        ):
            raise self._error(
                f"is truncated or corrupt (no '{shown(info.orig_filename)}' where it should be)"
            )
        return _Entry(info.header_offset + len(header) + name_bytes + extra_bytes, info.file_size)

    def _not_a_zip(self, magic: bytes) -> CheckpointError:
        if not magic:
            return self._error("is empty; fetch it again")
        if magic[:1] == b"\x80":
            return self._error(f"is a bare pickle or torch's format from before 1.6; {_RESAVE}")
        return self._error("is not a torch file in zip format; fetch it again, or " + _RESAVE)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")


def _read_entry(file: BinaryIO, entry: _Entry, most: int = MAX_PICKLE_BYTES) -> bytes:
    file.seek(entry.start)
    return file.read(min(entry.nbytes, most))
