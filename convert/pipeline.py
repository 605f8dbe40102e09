"""A checkpoint in any layout to the native folder: planned, streamed, read back, moved.

Knows the order of things and when to refuse. What the tensors are is `parts.py`'s, what lies beside
them `small_files.py`'s, where they go `place.py`'s, and what consumers want `verify.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastvlm_mlx.checkpoint.hub import resolve
from fastvlm_mlx.checkpoint.load import check_tower, decide_tied, nothing_cached
from fastvlm_mlx.checkpoint.store import FLOATS, Checkpoint, open_checkpoint
from fastvlm_mlx.checkpoint.tensors import TensorReader, find_tensors, read_json
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.keys import TOWER
from fastvlm_mlx.convert.parts import Part, arrays_in_order, native_parts
from fastvlm_mlx.convert.place import check_destination, new_folder, require_space
from fastvlm_mlx.convert.safetensors_writer import (
    TensorSpec,
    check_finite,
    index_json,
    plan_shards,
    write_shards,
)
from fastvlm_mlx.convert.small_files import write_native_files
from fastvlm_mlx.convert.verify import require
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.quantize.recipes import Recipe, Setting, group_of, plan_modules, quant_config

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]

DTYPES = ("bfloat16", "float16", "float32")
_NATIVE_CONSUMERS = ("native", "mlx-vlm", "mlx-swift-lm")


class MakeRecipe(Protocol):
    """`make_recipe` with all but the decoder's layers given, as by functools.partial."""

    def __call__(self, *, num_layers: int) -> Recipe: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an artifact is made of: the checkpoint, its config.json as it stands, its name."""

    name: str
    checkpoint: Checkpoint
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder: the model's sizes, the floats' dtype, the weights' bytes and how many bits that is
    a weight, scales and all; the consumers it does for, and those whose code has another tower's
    sizes in it, so that they load no model as small as this one.
    """

    folder: Path
    config: ModelConfig
    dtype: str
    weight_bytes: int
    bits_per_weight: float
    consumers: tuple[str, ...]
    unable: tuple[str, ...] = ()


def convert(
    source: str | Path,
    destination: Path,
    *,
    dtype: str | None = None,
    recipe: MakeRecipe | None = None,
    vision_from: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    say: Say | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the native folder of a checkpoint: mlx-vlm's keys, complete metadata, not fused.

    `dtype` of the floats is bfloat16, float16 or float32, by default the source's own. `recipe`
    says what is packed how, as `partial(make_recipe, "balanced", bits=4)` does; without it a float
    source stays float and a quantized one keeps its codes. `vision_from` holds the tower of a
    source without one. `command` goes into the model card. The folder appears at `destination` only
    when it is whole and checked; `overwrite` replaces a model folder there. Sources are never
    changed.

    Raises CheckpointError, CheckpointMismatch, ConfigError or FetchError, each one line.
    """
    say = say or (lambda _: None)
    found = open_source(source, vision_from, dtype, say, progress)
    checkpoint = found.checkpoint
    check_places(destination, checkpoint, overwrite=overwrite)
    dtype = dtype or stored_dtype(checkpoint)
    settings: dict[str, Setting] = {}
    config = checkpoint.config
    if recipe is not None:
        settings, config = plan_quantization(
            found, recipe(num_layers=config.decoder.num_layers), say
        )
    parts = native_parts(checkpoint, dtype, settings)
    artifact = plan_artifact(destination, found, config, dtype, parts, _NATIVE_CONSUMERS)
    floats = float_modules(checkpoint, settings) if config.quant else ()

    def write_files(folder: Path) -> None:
        write_native_files(
            folder,
            source_folder=checkpoint.folder,
            config=config,
            raw=found.raw,
            dtype=dtype,
            float_modules=floats,
            source_name=found.name,
            command=command,
            bits_per_weight=artifact.bits_per_weight,
        )

    def check(folder: Path) -> None:
        again = open_checkpoint(folder).config
        # The ids to stop at are the tokenizer's there, whatever the source's config says.
        if again != dataclasses.replace(config, eos_ids=again.eos_ids):
            raise CheckpointError(f"{folder}: config.json reads back as another model's")

    return write_artifact(
        found,
        artifact,
        parts,
        write_files=write_files,
        check=check,
        overwrite=overwrite,
        progress=progress,
    )


def open_source(
    name: str | Path,
    vision_from: str | Path | None,
    dtype: str | None,
    say: Say,
    progress: Progress | None,
) -> Source:
    """Find a source, downloaded if need be, and check all that can be checked without reading it.

    The head is read where one is stored, to drop it if it is the embedding's copy.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")

    def downloading(done: int, total: int, file: str) -> None:
        if progress is not None:
            progress(done, total, f"Downloading {file}")

    folder = resolve(name, say=say, progress=downloading)
    tower = None
    if vision_from is not None:
        tower = resolve(vision_from, say=say, progress=downloading)
    checkpoint = open_checkpoint(folder, vision_from=tower)
    check_tower(checkpoint)
    raw = read_json(folder / "config.json")
    return Source(name=str(name), checkpoint=decide_tied(checkpoint), raw=raw)


def check_places(destination: Path, checkpoint: Checkpoint, *, overwrite: bool) -> None:
    """Raise CheckpointError if the destination is taken, or is in the way of a source."""
    for source in (checkpoint, checkpoint.tower):
        if source is not None:
            check_destination(destination, overwrite=overwrite, source=source.folder)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most of the decoder's floats are stored in; float64 is float32."""
    stored: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        kind = tensor.stored.dtype
        if kind in FLOATS and not name.startswith("vision."):
            stored[kind] = stored.get(kind, 0) + tensor.stored.nbytes
    most = max(stored, key=lambda kind: stored[kind])
    return most if most in DTYPES else "float32"


def plan_quantization(
    source: Source, recipe: Recipe, say: Say
) -> tuple[dict[str, Setting], ModelConfig]:
    """Return the setting of each module and the config that says so.

    Raises ConfigError if the source is quantized already: its losses would add to ours.
    """
    checkpoint = source.checkpoint
    if checkpoint.config.quant is not None:
        raise ConfigError(f"{source.name} is quantized already: start from the float model")
    settings, indivisible = plan_modules(recipe, checkpoint.shapes)
    if indivisible:
        say(
            f"{len(indivisible)} modules stay float, groups do not divide their width: "
            f"{indivisible[0]} and the like"
        )
    quant = quant_config(recipe, settings)
    return settings, dataclasses.replace(checkpoint.config, quant=quant)


def float_modules(checkpoint: Checkpoint, settings: Mapping[str, Setting]) -> tuple[str, ...]:
    """Return the canonical paths of the modules that could be packed and are not."""
    paths = (name.rpartition(".")[0] for name in checkpoint.shapes if name.endswith(".weight"))
    packed = {*checkpoint.quantized_paths, *settings}
    return tuple(path for path in paths if group_of(path) is not None and path not in packed)


def plan_artifact(
    destination: Path,
    source: Source,
    config: ModelConfig,
    dtype: str,
    parts: tuple[Part, ...],
    consumers: tuple[str, ...],
) -> Artifact:
    """Return what the folder will be, before any consumer's requirements are checked."""
    shapes = source.checkpoint.shapes
    rest = (shape for name, shape in shapes.items() if not name.startswith("vision."))
    tower = (spec.shape for part in parts for spec in part.specs if spec.name.startswith(TOWER))
    weights = sum(math.prod(shape) for shape in (*rest, *tower))
    nbytes = sum(spec.nbytes for part in parts for spec in part.specs)
    return Artifact(
        folder=destination,
        config=config,
        dtype=dtype,
        weight_bytes=nbytes,
        bits_per_weight=8 * nbytes / weights,
        consumers=consumers,
    )


def write_artifact(
    source: Source,
    artifact: Artifact,
    parts: tuple[Part, ...],
    *,
    write_files: Callable[[Path], None],
    check: Callable[[Path], None],
    overwrite: bool,
    progress: Progress | None,
) -> Artifact:
    """Stream the parts and the files beside them into a new folder, read it back, then move it.

    Peak memory is that of the largest module and what it is made of.
    """
    specs = tuple(spec for part in parts for spec in part.specs)
    shards = plan_shards(specs)

    def report(what: str) -> Callable[[int], None]:
        def count(done: int) -> None:
            if progress is not None:
                progress(done, artifact.weight_bytes, what)

        return count

    original = source.checkpoint.folder
    with new_folder(artifact.folder, overwrite=overwrite, source=original) as folder:
        require_space(artifact.folder, artifact.weight_bytes)
        with nothing_cached():
            write_shards(folder, shards, arrays_in_order(parts), progress=report("Writing"))
        index = json.dumps(index_json(shards), indent=4) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        write_files(folder)
        check_written(folder, specs, progress=report("Checking"))
        check(folder)
        met = tuple(name for name in artifact.consumers if require(folder, name))
    unable = tuple(name for name in artifact.consumers if name not in met)
    return dataclasses.replace(artifact, consumers=met, unable=unable)


def check_written(
    folder: Path, specs: Iterable[TensorSpec], *, progress: Callable[[int], None]
) -> None:
    """Read the weights back: every name, shape and dtype as planned, every value finite."""
    planned = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    stored = find_tensors(folder)
    if {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} != planned:
        raise CheckpointError(f"{folder}: the weights read back differently: is the disk failing?")
    reader, done = TensorReader(), 0
    for tensor in stored.values():
        check_finite(tensor.name, reader.take(tensor))
        done += tensor.nbytes
        progress(done)
