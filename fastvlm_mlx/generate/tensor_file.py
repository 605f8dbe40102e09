"""One safetensors file of ours: written whole or not at all, read as far as it is sound.

Knows the format (github.com/huggingface/safetensors, README "Format"), what a file must say in its
metadata to be ours, and what disks refuse. The header comes first, so that a file cut short keeps
all that is said there. Refuses to know what is said, and what the values mean.

A header is only a claim: nothing is allocated that the file's own length does not bear out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from fastvlm_mlx.checkpoint.safetensors_format import CODES, file_head, item_bytes
from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate.whole_file import (
    expanded,
    is_taken,
    open_regular,
    printed,
    remove_stale,
    replacing,
    unreadable,
    unsaved,
)

MAX_HEADER_BYTES = 16 << 20
"""Longest header: JSON of this size takes a few hundred MB at worst when it is read."""

_ITEM_BYTES = {code: item_bytes(dtype) for dtype, code in CODES.items()}


class Entry(NamedTuple):
    """Where a tensor's values are said to be, from the file's beginning, and what they are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file of one `kind`: its metadata, and its tensors one at a time."""

    def __init__(self, path: str | os.PathLike[str], *, kind: str, version: int) -> None:
        """Read the header. Raises SessionError, naming `path`, if that cannot be done."""
        self._name = printed(path)
        self._unread_bytes = 0
        try:
            self._file = open_regular(expanded(path))
        except (OSError, ValueError) as error:
            raise SessionError(unreadable(self._name, error)) from error
        try:
            self.metadata, self._entries = self._read_header(kind, version)
        except OSError as error:
            self.close()
            raise SessionError(unreadable(self._name, error)) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def entry(self, name: str) -> Entry | None:
        """Return what the header says of a tensor; None if nothing sound, or past the end."""
        return self._entries.get(name)

    def read(self, entry: Entry) -> np.ndarray | None:
        """Return a tensor's bytes, uint8 [n]; None if they cannot be read.

        No more is read than the file is long, however many tensors claim the same bytes.
        """
        count = entry.end - entry.begin
        if count > self._unread_bytes:
            return None
        self._unread_bytes -= count
        data = np.empty(count, np.uint8)
        try:
            self._file.seek(entry.begin)
            done = 0
            while done < count:
                step = self._file.readinto(data[done:].data)  # type: ignore[attr-defined]
                if not step:
                    return None
                done += step
        except OSError:  # a bad sector: what is told is that these values are lost
            return None
        return data

    def _read_header(self, kind: str, version: int) -> tuple[dict[str, str], dict[str, Entry]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        text = self._file.read(min(length, MAX_HEADER_BYTES))
        fields = _parsed(text) if len(text) == length and length else None
        if fields is None:
            # Ours begins with its kind, so that what is left of a damaged header tells whose it is.
            if kind.encode() in text[:200]:
                raise SessionError(
                    f"{self._name} is a session whose beginning is damaged or cut off, so that "
                    "nothing of it can be read: restore a copy, or use another name (it is left as "
                    "it is)"
                )
            raise self._foreign("is empty" if not size else "is no session file")
        metadata = fields.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != kind:
            raise self._foreign("is a safetensors file, perhaps a model's, but no session")
        self._require_version(metadata.get("version"), version)
        metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
        self._unread_bytes = size - 8 - length
        found = ((name, _entry(value, 8 + length, size)) for name, value in fields.items())
        return metadata, {name: entry for name, entry in found if entry is not None}

    def _require_version(self, said: object, version: int) -> None:
        if said == str(version):
            return
        # A short number: Python takes none of thousands of digits.
        is_number = isinstance(said, str) and said.isascii() and said.isdigit() and len(said) < 9
        if is_number and int(str(said)) > version:
            raise SessionError(
                f"{self._name} was written by a newer fastvlm (session version {said}, this one "
                f"reads {version}): update fastvlm-mlx (the file is left as it is)"
            )
        raise SessionError(
            f"{self._name} does not say which version it is, so it is damaged: restore a copy, or "
            "use another name (it is left as it is)"
        )

    def _foreign(self, what: str) -> SessionError:
        return SessionError(f"{self._name} {what}: give another name (it is left as it is)")


def write_tensor_file(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int,
    metadata: Mapping[str, str],
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Iterable[np.ndarray],
) -> None:
    """Write a file of `kind`, mode 0600, in the place of nothing, an empty file or one of `kind`.

    `specs` are each tensor's dtype, as MLX spells it, and shape; `values` gives their bytes in that
    order, one in memory at a time. The file appears whole, or what was there stays. A symbolic link
    stays one: its target is replaced. Raises SessionError, naming `path`.
    """
    tensors = ((name, dtype, shape) for name, (dtype, shape) in specs.items())
    header = file_head({"format": kind, "version": str(version), **metadata}, tensors)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise SessionError(
            f"{printed(path)}: the conversation's text is longer than the {MAX_HEADER_BYTES >> 20} "
            "MiB that a session file takes"
        )
    try:
        place = Path(os.path.realpath(expanded(path)))
        if is_taken(place):
            TensorFile(path, kind=kind, version=version).close()
        remove_stale(place.parent)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise unsaved(path, error) from error
    try:
        with replacing(place) as file:
            file.write(header)
            for data in values:
                file.write(data.data)
    except OSError as error:
        raise unsaved(path, error) from error


def _parsed(text: bytes) -> dict[str, Any] | None:
    """Return a header's JSON object; None if it is none.

    A wrong byte inside a string is read as some character: its digest tells that it is wrong.
    """
    try:
        fields = json.loads(text.decode(errors="replace"), strict=False)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _entry(value: object, data_begin: int, size: int) -> Entry | None:
    """Return one tensor's place, None unless dtype, shape and offsets agree and are in the file."""
    if not isinstance(value, dict):
        return None
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in _ITEM_BYTES and _counts(shape, 8)):
        return None
    if not (_counts(offsets, 2) and len(offsets) == 2):
        return None
    begin, end = (data_begin + offset for offset in offsets)
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype] or not begin <= end <= size:
        return None
    return Entry(dtype, tuple(shape), begin, end)


def _counts(value: Any, longest: int) -> bool:
    """Whether `value` is a short list of sizes: whole numbers from 0, no larger than any file."""
    return (
        isinstance(value, list)
        and len(value) <= longest
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
