"""Tensors into *.safetensors files one at a time, so that memory holds one tensor, not a model.

Knows the file format (github.com/huggingface/safetensors, README "Format") and the sharding that
mlx-vlm and mlx-swift-lm read. Knows no layout, no model and nothing of where the values come from.
The bytes depend on names and values only: no insertion order, no time, no version.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from fastvlm_mlx.checkpoint.safetensors_format import (
    CODES,
    dtype_name,
    file_head,
    item_bytes,
    stored_bits,
)
from fastvlm_mlx.errors import CheckpointError

_SLICE_BYTES = 16 << 20  # between two calls of `progress`
_CHECK_ITEMS = 1 << 18  # looked at in one go for values that are not finite: stays in the CPU cache


# The bit pattern of +inf: without the sign, every pattern from it upwards is inf or NaN (IEEE 754;
# bfloat16 is float32's upper half). Integers have none.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What will be written: a name, a shape, a dtype as MLX spells it (bfloat16, uint32 …).

    Raises ValueError for a dtype that no artifact has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(f"{self.name}: {self.dtype} is not written, only {', '.join(CODES)}")

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file and the tensors in it, sorted by name."""

    file_name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values; the file has a header besides."""
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(
    specs: Iterable[TensorSpec], *, max_shard_bytes: int = 5 * 10**9
) -> tuple[Shard, ...]:
    """Return the files for `specs`, filled in the order of names to at most `max_shard_bytes`.

    One is `model.safetensors`, several are `model-00001-of-0000N.safetensors`; a tensor larger than
    a shard gets one of its own. Raises ValueError for two tensors of one name, and for none at all.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    if not ordered:
        raise ValueError("no tensors to write")
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise ValueError(f"{one.name} is planned twice")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in ordered:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    return tuple(
        Shard(
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors",
            tuple(group),
        )
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json: bytes of all values, file by name."""
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {spec.name: shard.file_name for shard in shards for spec in shard.specs},
    }


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    arrays: Iterable[tuple[str, mx.array]],
    *,
    progress: Callable[[int], None],
) -> None:
    """Write every shard into `folder`, taking from `arrays` one tensor at a time.

    `arrays` yields each planned tensor by sorted name. It is evaluated, checked, written and let go
    before the next is asked for; a generator should not keep the last one either. `progress` hears
    the bytes of values written so far, some 16 MB apart. Raises CheckpointError for values that are
    not finite, OSError as the disk gives it (`place.new_folder` explains it), and ValueError for
    arrays that are not those planned, which is a bug of the caller's.
    """
    source = iter(arrays)
    done_bytes = 0
    for shard in shards:
        with (folder / shard.file_name).open("xb") as file:
            tensors = ((spec.name, spec.dtype, spec.shape) for spec in shard.specs)
            file.write(file_head({"format": "mlx"}, tensors))
            for spec in shard.specs:
                for written in _write_next(file, spec, source):
                    done_bytes += written
                    progress(done_bytes)
                # What MLX keeps for reuse counts in this process too, up to most of the memory.
                mx.clear_cache()
    extra = next(source, None)
    if extra is not None:
        raise ValueError(f"{extra[0]} was given but not planned")


def _write_next(
    file: BinaryIO, spec: TensorSpec, source: Iterator[tuple[str, mx.array]]
) -> Iterator[int]:
    """Write the next tensor in slices of its own memory, each checked; yield each one's bytes.

    Nothing here outlives the generator, so the tensor is let go when it ends.
    """
    bits = stored_bits(_take(spec, source))
    step = _SLICE_BYTES // bits.itemsize
    for begin in range(0, bits.size, step):
        piece = bits[begin : begin + step]
        _check_finite(spec.name, piece, spec.dtype)
        file.write(piece.data)
        yield piece.nbytes


def check_finite(name: str, array: mx.array) -> None:
    """Raise CheckpointError if a tensor holds inf or NaN; integers never do."""
    _check_finite(name, stored_bits(array), dtype_name(array))


def _check_finite(name: str, bits: np.ndarray, dtype: str) -> None:
    infinity = _INFINITY.get(dtype)
    if infinity is not None and not _is_finite(bits, infinity):
        why = "the source is damaged"
        if dtype == "float16":
            why += ", or they are beyond float16's 65504, which bfloat16 holds"
        raise CheckpointError(f"{name} has values that are not finite (inf or NaN): {why}")


def _take(spec: TensorSpec, source: Iterator[tuple[str, mx.array]]) -> mx.array:
    """Return the next tensor, which is the one planned."""
    name, array = next(source, ("", None))
    if array is None:
        raise ValueError(f"{spec.name} was planned but not given")
    given = (name, tuple(array.shape), array.dtype)
    if given != (spec.name, spec.shape, getattr(mx, spec.dtype)):
        raise ValueError(f"{name} {array.shape} {array.dtype} was given, {spec} was planned")
    return array


def _is_finite(bits: np.ndarray, infinity: int) -> bool:
    """Whether no value is inf or NaN, by its bits: numpy has no bfloat16."""
    without_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return all(
        int((bits[begin : begin + _CHECK_ITEMS] & without_sign).max()) < infinity
        for begin in range(0, bits.size, _CHECK_ITEMS)
    )
