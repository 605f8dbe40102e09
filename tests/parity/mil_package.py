"""A saved Core ML package (`*.mlpackage`, ML program) as plain operations and numpy arrays.

Knows the protobuf messages of `Model.proto` and `MIL.proto` (coremltools' generated classes) and
the bytes of `weight.bin` (coremltools' `MILBlob/Blob/StorageFormat.hpp`): a header of 64 bytes,
then for each array a record of 64 bytes and its data, all on 64-byte borders. Evaluates nothing
and knows nothing of fastvlm_mlx.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# MIL.proto's DataType, and StorageFormat.hpp's BlobDataType.
_MIL_DTYPES = {1: np.bool_, 2: np.str_, 10: np.float16, 11: np.float32, 23: np.int32}
_BLOB_DTYPES = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8}
_SENTINEL = 0xDEADBEEF


@dataclass(frozen=True)
class Tensor:
    """A variable: its name, shape and numpy dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]


@dataclass(frozen=True)
class Operation:
    """`inputs` maps each parameter to the names it is bound to; constants have a `value`."""

    kind: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[Tensor, ...]
    value: Array | None = None


@dataclass(frozen=True)
class Package:
    """The one function of an ML program, and what the package says about itself."""

    specification_version: int
    opset: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    spec: Any

    def counts(self) -> dict[str, int]:
        """How many operations of each kind there are, constants left out."""
        kinds = [op.kind for op in self.operations if op.kind != "const"]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def read_package(path: Path) -> Package:
    """Read a package with one function, found through its manifest. Raises ValueError if odd."""
    from coremltools.proto import Model_pb2

    manifest = json.loads((path / "Manifest.json").read_text())
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    spec = Model_pb2.Model()
    spec.ParseFromString((path / "Data" / root["path"]).read_bytes())
    if spec.WhichOneof("Type") != "mlProgram" or list(spec.mlProgram.functions) != ["main"]:
        raise ValueError(f"{path} is no ML program with one function main")
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    blobs = Blobs(path / "Data/com.apple.CoreML")
    declared = {given.name: _tensor(given) for given in function.inputs}
    operations = tuple(_operation(op, blobs) for op in block.operations)
    for op in operations:
        declared |= {tensor.name: tensor for tensor in op.outputs}
    described = spec.description
    inputs = tuple(_described(feature, declared) for feature in described.input)
    outputs = tuple(_described(feature, declared) for feature in described.output)
    if [tensor.name for tensor in outputs] != list(block.outputs):
        raise ValueError(f"{path} describes other outputs than its block returns")
    return Package(spec.specificationVersion, function.opset, inputs, outputs, operations, spec)


def _described(feature: Any, declared: Mapping[str, Tensor]) -> Tensor:
    """Return what the model's description says of an input or output; the program must agree."""
    array = feature.type.multiArrayType
    dtypes = {65568: np.float32, 65552: np.float16}  # ArrayFeatureType.ArrayDataType
    tensor = Tensor(feature.name, tuple(array.shape), dtypes[array.dataType])
    if declared[feature.name] != tensor:
        raise ValueError(f"described as {tensor}, but the program has {declared[feature.name]}")
    return tensor


def _tensor(named: Any) -> Tensor:
    kind = named.type.tensorType
    shape = tuple(dimension.constant.size for dimension in kind.dimensions)
    return Tensor(named.name, shape, _MIL_DTYPES[kind.dataType])


def _operation(op: Any, blobs: Blobs) -> Operation:
    if op.blocks:
        raise ValueError(f"{op.type} has blocks inside")
    outputs = tuple(_tensor(output) for output in op.outputs)
    if op.type == "const":
        return Operation("const", {}, outputs, _constant(op.attributes["val"], outputs[0], blobs))
    inputs = {}
    for parameter, argument in op.inputs.items():
        if any(binding.WhichOneof("binding") != "name" for binding in argument.arguments):
            raise ValueError(f"{op.type}: {parameter} is bound to a value, not to a name")
        inputs[parameter] = tuple(binding.name for binding in argument.arguments)
    return Operation(op.type, inputs, outputs)


def _constant(value: Any, tensor: Tensor, blobs: Blobs) -> Array:
    if value.WhichOneof("value") == "blobFileValue":
        array = blobs.read(value.blobFileValue.fileName, value.blobFileValue.offset)
        if array.dtype != tensor.dtype:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, its blob {array.dtype}")
        return array.reshape(tensor.shape)
    immediate = value.immediateValue.tensor
    kind = immediate.WhichOneof("value")
    if kind == "bytes":
        return np.frombuffer(immediate.bytes.values, tensor.dtype).reshape(tensor.shape)
    return np.array(list(getattr(immediate, kind).values), tensor.dtype).reshape(tensor.shape)


class Blobs:
    """The arrays of the weight files under `folder`, which stands for `@model_path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, NDArray[np.uint8]] = {}

    def read(self, name: str, offset: int) -> Array:
        """Return the flat array whose record is at `offset`. Raises ValueError for bad bytes."""
        if name not in self._files:
            file = np.memmap(self.folder / name.removeprefix("@model_path/"), np.uint8, "r")
            count, version = struct.unpack("<II", file[:8].tobytes())
            if version != 2 or count == 0 or file[8:64].any():
                raise ValueError(f"{name}: odd header, {count} blobs of version {version}")
            self._files[name] = file
        file = self._files[name]
        record = struct.unpack("<IIQQ", file[offset : offset + 24].tobytes())
        sentinel, dtype, size, start = record
        if sentinel != _SENTINEL or dtype not in _BLOB_DTYPES or start % 64:
            raise ValueError(f"{name}: no blob record at {offset}: {record}")
        if start + size > file.size:
            raise ValueError(f"{name}: blob at {offset} ends behind the file")
        return file[start : start + size].view(_BLOB_DTYPES[dtype])
