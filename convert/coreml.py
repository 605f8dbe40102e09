"""The vision tower as `fastvithd.mlpackage` for Apple's app, written without torch or a Mac.

Knows how coremltools turns a MIL program into a package, and how to make its bytes depend on the
weights alone. Knows no network (`mil_tower.py`) and nothing of the folder around the package.
coremltools is the extra `app`, imported on use by these two modules only.

What it cannot know: Core ML itself, which runs on Apple's systems only. Contract: FORMATS.md B3, C.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import logging
import math
import os
import platform
import shutil
import stat
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx import __version__
from fastvlm_mlx.checkpoint.fuse import module_paths, reparameterize_module
from fastvlm_mlx.checkpoint.load import check_tower, module_tensors
from fastvlm_mlx.checkpoint.store import Checkpoint, target_dtype
from fastvlm_mlx.checkpoint.tensors import TensorReader
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.convert.mil_tower import (
    INPUT_NAME,
    OUTPUT_NAME,
    Arrays,
    build_program,
    op_prefix,
)
from fastvlm_mlx.convert.place import require_space
from fastvlm_mlx.errors import BackendError, CheckpointError
from fastvlm_mlx.model.memory import nothing_cached

Precision = Literal["float32", "float16"]

# What coremltools imports when it finds it, for conversions that are not made here.
_UNUSED = ("torch", "torchvision", "torchaudio", "torchao", "executorch", "transformers",
           "tensorflow", "sklearn", "scipy", "xgboost", "libsvm")  # fmt: skip
_MODEL_FILE = Path("Data/com.apple.CoreML/model.mlmodel")
# When coremltools fails to write and less than this is free, the disk was full: no array is larger.
_FULL_BYTES = 2**26


def write_tower_package(
    path: Path, checkpoint: Checkpoint, *, precision: Precision = "float32"
) -> None:
    """Write the checkpoint's vision tower as the Core ML package `path` (`*.mlpackage`, a folder).

    An ML program for iOS 16 and later: input `images` float32 [1,3,S,S], RGB, 0 to 1, S the
    config's image_size; output `image_features` float32 [1,(S/64)^2,2C], before the projector.
    The same weights give the same bytes. On an error `path` may hold a part of a package.

    `precision` is that of weights and activations. In "float16" everything from the second position
    encoding on stays float32, as in `store.target_dtype`: there another project measured
    activations of 60,928 and NaN after them (float16 ends at 65,504). The stages before it run in
    float16, with its rounding.

    Real size: 10 s, 0.9 GB of memory (float16 1.2), 0.49 GB on disk and again while it is written,
    beside `path`. Raises BackendError without coremltools, CheckpointMismatch for a tower that does
    not fit, CheckpointError for a file that cannot be read, values that are not finite or a disk
    with too little room, OSError if `path` exists or cannot be written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    check_tower(checkpoint)
    require_space(path, 2 * _weight_bytes(checkpoint))
    with _quiet_coremltools() as ct, _temporary_files_in(path.parent), _disk_errors(path):
        _convert(ct, path, checkpoint, precision)
        _make_reproducible(ct, path, checkpoint.config.vision)
        _open_rights(path)
    gc.collect()  # a program's operations and variables refer to each other


def require_coremltools() -> None:
    """Import coremltools. Raises BackendError, one line, if it is missing or lacks its library."""
    with _quiet_coremltools():
        pass


def _convert(ct: Any, path: Path, checkpoint: Checkpoint, precision: Precision) -> None:
    config = checkpoint.config.vision
    reader = TensorReader()

    def read_module(module: str) -> Arrays:
        tensors = module_tensors(checkpoint, module)
        stored = {name: tensor.read(reader) for name, tensor in tensors.items()}
        arrays = reparameterize_module(module, stored)
        return {name: _numpy(f"vision.{module}.{name}", arrays.pop(name)) for name in list(arrays)}

    with nothing_cached():
        program = build_program(config, read_module)
    if precision == "float32":
        compute_precision = ct.precision.FLOAT32
    else:
        compute_precision = ct.transform.FP16ComputePrecision(_half_precision(config))
    ct.convert(
        program,
        convert_to="mlprogram",
        inputs=[ct.TensorType(INPUT_NAME, dtype=np.float32)],
        outputs=[ct.TensorType(OUTPUT_NAME, dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=compute_precision,
        compute_units=ct.ComputeUnit.CPU_AND_GPU,
        skip_model_load=True,
        package_dir=str(path),
    )


def _numpy(name: str, array: mx.array) -> NDArray[np.float32]:
    with mx.stream(mx.cpu):
        values = np.array(array.astype(mx.float32))
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} has values that are not finite: the source is damaged")
    return values


def _half_precision(config: VisionConfig) -> Any:
    """Return a predicate: may this operation run in float16? The tower's last stage may not."""
    wide = [
        op_prefix(path)
        for path in module_paths(config)
        if target_dtype(f"vision.{path}.", mx.float16) == mx.float32
    ]
    kept = (*wide, "tokens", OUTPUT_NAME)
    return lambda op: not op.name.startswith(kept)


def _make_reproducible(ct: Any, path: Path, config: VisionConfig) -> None:
    """Describe the model, and replace what differs between runs: map order and random ids."""
    model = ct.proto.Model_pb2.Model()
    model.ParseFromString((path / _MODEL_FILE).read_bytes())
    size, tokens = config.image_size, config.tokens(config.image_size, config.image_size)
    description = model.description
    description.input[0].shortDescription = f"RGB picture [1, 3, {size}, {size}], 0 to 1"
    description.output[
        0
    ].shortDescription = (
        f"features [1, {tokens}, {config.out_dim}] before the projector, row by row"
    )
    description.metadata.shortDescription = "FastViTHD, the vision tower of FastVLM"
    description.metadata.userDefined["source"] = (
        f"fastvlm-mlx {__version__}, coremltools {ct.__version__}"
    )
    (path / _MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))

    manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
    items = manifest["itemInfoEntries"]
    ids = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items.items()}
    manifest["itemInfoEntries"] = {ids[old]: item for old, item in items.items()}
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (path / "Manifest.json").write_text(text, encoding="utf-8")


def _open_rights(path: Path) -> None:
    """Give a package the rights of the folder it is in; coremltools makes it for one user only."""
    folder_mode = stat.S_IMODE(path.parent.stat().st_mode)
    for place in (path, *path.rglob("*")):
        place.chmod(folder_mode if place.is_dir() else folder_mode & 0o666)


@contextlib.contextmanager
def _quiet_coremltools() -> Iterator[Any]:
    """Yield the coremltools module; its warnings and progress bars are not shown meanwhile.

    On Linux it warns at import that Core ML's own library is missing; models are only run with
    that one. Errors are raised as ever.
    """
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield _import_coremltools()
    finally:
        log.setLevel(level)


def _import_coremltools() -> Any:
    try:
        with _hidden(_UNUSED):
            import coremltools
        import coremltools.libmilstoragepython
        import coremltools.libmodelpackage
    except ImportError as error:
        raise BackendError(
            f"writing a Core ML package needs coremltools{_where_it_is()}"
        ) from error
    return coremltools


def _where_it_is() -> str:
    """Say how to get coremltools, or where there are releases of it: as the extra's markers do."""
    if sys.version_info >= (3, 14):
        return ", which has no release for Python 3.14 yet: use Python 3.11 to 3.13"
    if sys.platform == "linux" and platform.machine() != "x86_64":
        return f", which has no release for {platform.machine()}: use x86_64 or a Mac"
    return ": pip install 'fastvlm-mlx[app]'"


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Make modules that are not imported yet look as if they were not installed."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not importable
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _weight_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the tower's weights in float32, which the package has at most."""
    return sum(4 * math.prod(s) for n, s in checkpoint.shapes.items() if n.startswith("vision."))


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise OSError where coremltools' writers, which are C++, say RuntimeError and no errno."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("[MIL FileWriter]", "filesystem error")):
            raise
        # What was written is still there: the exception holds the folder of the copy.
        full = shutil.disk_usage(path.parent).free < _FULL_BYTES
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Let coremltools write its copy of the weights here, where there must be room anyway.

    /tmp is small or in memory on many machines, and what a killed process leaves there stays.
    """
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
