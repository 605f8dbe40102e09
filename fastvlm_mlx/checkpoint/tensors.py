"""The tensors stored in a folder: names, shapes and dtypes at once, values one at a time.

Knows safetensors (single, or sharded with an index) and torch's `.bin` files, and reads only
headers until a value is asked for. Knows no layout and no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.checkpoint.safetensors_format import DTYPES
from fastvlm_mlx.checkpoint.torch_file import TorchFile, TorchTensor
from fastvlm_mlx.errors import CheckpointError, one_line


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: `shape`, `dtype` as MLX spells it, the file it is in."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    torch: TorchTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * getattr(mx, self.dtype).size


class TensorReader:
    """Hands out values, each once, so that nothing but the caller keeps them alive."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, mx.array]] = {}

    def take(self, tensor: StoredTensor) -> mx.array:
        """Return the tensor's array, unread until MLX evaluates it. Raises CheckpointError."""
        if tensor.torch is not None:
            values = mx.array(tensor.torch.read())
            return values.view(mx.bfloat16) if tensor.dtype == "bfloat16" else values
        if tensor.file not in self._files:
            try:
                self._files[tensor.file] = mx.load(str(tensor.file))  # type: ignore[assignment]
            except RuntimeError as error:
                raise CheckpointError(
                    f"{tensor.file} cannot be read: {one_line(str(error))}"
                ) from error
        return self._files[tensor.file].pop(tensor.name)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file. Raises CheckpointError in one line."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: no model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the folder's weight files, by name.

    Safetensors come first (by the index where there is one), `pytorch_model*.bin` otherwise.
    Raises CheckpointError for missing, truncated or corrupt files, a tensor stored twice, and
    folders that hold only an adapter or a projector.
    """
    files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        stored = _bin_header(file) if file.suffix == ".bin" else _safetensors_header(file)
        for tensor in stored:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}"
                )
            tensors[tensor.name] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).exists():
            return _indexed(folder / index)
        files = sorted(p for p in folder.glob(pattern) if not p.name.startswith("adapter_"))
        if files:
            return files
    if list(folder.glob("adapter_*")) or (folder / "mm_projector.bin").exists():
        raise CheckpointError(
            f"{folder} holds only an adapter or a projector: merge it into its base model first"
        )
    raise CheckpointError(f"{folder} has no *.safetensors and no pytorch_model*.bin")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    odd = [name for name in weight_map.values() if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{index}: weight_map has {odd[0]!r} where a file's name belongs")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent:
            raise CheckpointError(f"{index} points outside its folder: {file.name}")
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing, but {index.name} names it: download it again"
            )
    return files


def _safetensors_header(file: Path) -> Iterable[StoredTensor]:
    tensors = []
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file}: {name} has dtype {part.get_dtype()}, which is not supported"
                    )
                tensors.append(StoredTensor(name, tuple(part.get_shape()), dtype, file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({one_line(str(error))}): download it again"
        ) from error
    return tensors


def _bin_header(file: Path) -> Iterable[StoredTensor]:
    return [
        StoredTensor(
            tensor.name,
            tensor.shape,
            "bool_" if tensor.dtype == "bool" else tensor.dtype,
            file,
            tensor,
        )
        for tensor in TorchFile(file).values()
    ]
