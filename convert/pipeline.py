"""A checkpoint in any layout to the native folder: planned, streamed, read back, moved.

Knows the order of things, for the native folder and for the app's. What the tensors are is
`parts.py`'s, what lies beside them `small_files.py`'s, where they go `place.py`'s, and what
consumers want `verify.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.checkpoint.tensors import TensorReader, find_tensors
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.keys import CLIP_HEAD, TOWER
from fastvlm_mlx.convert.parts import Part, arrays_in_order, native_parts
from fastvlm_mlx.convert.place import new_folder, require_space
from fastvlm_mlx.convert.safetensors_writer import (
    TensorSpec,
    check_finite,
    index_json,
    plan_shards,
    write_shards,
)
from fastvlm_mlx.convert.small_files import write_native_files
from fastvlm_mlx.convert.sources import (
    DTYPES,
    Progress,
    Say,
    Source,
    float_modules,
    open_source,
    plan_quantization,
    stored_dtype,
)
from fastvlm_mlx.convert.verify import require
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.model.memory import nothing_cached
from fastvlm_mlx.quantize.recipes import Recipe, Setting

log = logging.getLogger("fastvlm_mlx")


class MakeRecipe(Protocol):
    """`make_recipe` with all but the decoder's layers given, as by functools.partial."""

    def __call__(self, *, num_layers: int) -> Recipe: ...


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
    float_only: bool = False,
    vision_from: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the native folder of a checkpoint: mlx-vlm's keys, complete metadata, not fused.

    `dtype` of the floats is bfloat16, float16 or float32, by default the source's own. `recipe`
    says what is packed how, as `partial(make_recipe, "balanced", bits=4)` does, and wants a float
    source; without it a quantized source keeps its codes, unless `float_only` refuses it.
    `vision_from` holds the tower of a source without one. `command` goes into the model card. The
    folder appears at `destination` only when it is whole and checked; `overwrite` replaces a model
    folder there. Sources are never changed.

    Raises CheckpointError, CheckpointMismatch, ConfigError or FetchError, each one line.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if recipe is not None:
        recipe(num_layers=1)  # numbers that cannot be packed are said before a download
    found = open_source(
        source,
        vision_from=vision_from,
        float_only=float_only or recipe is not None,
        destination=destination,
        overwrite=overwrite,
        say=say,
        progress=progress,
    )
    checkpoint, config = found.checkpoint, found.checkpoint.config
    dtype = dtype or stored_dtype(checkpoint)
    settings: dict[str, Setting] = {}
    if recipe is not None:
        made = recipe(num_layers=config.decoder.num_layers)
        settings, config = plan_quantization(found, made, say)
    floats = float_modules(checkpoint, settings) if config.quant else ()
    consumers: tuple[str, ...] = ("native", "mlx-vlm", "mlx-swift-lm")
    if config.projector.kind == "linear":
        say("its projector is one linear layer: checked for this engine only")
        consumers = ("native",)
    return write_artifact(
        found,
        destination,
        native_parts(checkpoint, dtype, settings),
        config=config,
        dtype=dtype,
        consumers=consumers,
        write_files=partial(write_native_files, float_modules=floats),
        read_config=lambda folder: open_checkpoint(folder).config,
        overwrite=overwrite,
        command=command,
        progress=progress,
    )


def write_artifact(
    source: Source,
    destination: Path,
    parts: tuple[Part, ...],
    *,
    config: ModelConfig,
    dtype: str,
    consumers: tuple[str, ...],
    write_files: Callable[..., object],
    read_config: Callable[[Path], ModelConfig],
    overwrite: bool,
    command: str,
    progress: Progress | None,
) -> Artifact:
    """Stream the parts and the files beside them into a new folder, read it back, then move it.

    `write_files` takes the folder and `write_native_files`' arguments, `read_config` reads the
    folder's config back. Peak memory is that of the largest module and what it is made of.
    """
    specs = tuple(spec for part in parts for spec in part.specs)
    shards = plan_shards(specs)
    weight_bytes = sum(spec.nbytes for spec in specs)
    bits = _bits_per_weight(source, specs)

    def report(what: str) -> Callable[[int], None]:
        return lambda done: progress(done, weight_bytes, what) if progress else None

    with new_folder(destination, overwrite=overwrite, source=source.checkpoint.folder) as folder:
        log.debug("writing %d tensors, %d files of weights", len(specs), len(shards))
        require_space(destination, weight_bytes)
        with nothing_cached():
            write_shards(folder, shards, arrays_in_order(parts), progress=report("Writing"))
            log.debug("reading them back")
            _check_written(folder, specs, progress=report("Checking"))
        index = json.dumps(index_json(shards), indent=4) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        write_files(
            folder,
            source_folder=source.checkpoint.folder,
            source_name=source.name,
            tower_folder=source.checkpoint.tower_folder,
            tower_name=source.tower_name,
            config=config,
            raw=source.raw,
            dtype=dtype,
            command=command,
            bits_per_weight=bits,
        )
        log.debug("checking the folder for %s", ", ".join(consumers))
        again = read_config(folder)
        # The ids to stop at are the tokenizer's there, whatever the source's config says.
        if again != dataclasses.replace(config, eos_ids=again.eos_ids):
            raise CheckpointError("what was written reads back as another model: is it a new kind?")
        met = tuple(name for name in consumers if require(folder, name))
    return Artifact(
        folder=destination,
        config=config,
        dtype=dtype,
        weight_bytes=weight_bytes,
        bits_per_weight=bits,
        consumers=met,
        unable=tuple(name for name in consumers if name not in met),
    )


def _bits_per_weight(source: Source, specs: Iterable[TensorSpec]) -> float:
    """Return stored bits over weights, without the CLIP head, which is no part of the model."""
    used = [spec for spec in specs if spec.name != CLIP_HEAD]
    shapes = source.checkpoint.shapes.items()
    rest = (shape for name, shape in shapes if not name.startswith("vision."))
    tower = (spec.shape for spec in used if spec.name.startswith(TOWER))
    weights = sum(math.prod(shape) for shape in (*rest, *tower))
    return 8 * sum(spec.nbytes for spec in used) / weights


def _check_written(
    folder: Path, specs: Iterable[TensorSpec], *, progress: Callable[[int], None]
) -> None:
    """Read the weights back: every name, shape and dtype as planned, every value finite."""
    planned = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    stored = find_tensors(folder)
    if {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} != planned:
        raise CheckpointError("the weights read back differently: is the disk failing?")
    reader, done = TensorReader(), 0
    for tensor in stored.values():
        check_finite(tensor.name, reader.take(tensor))
        done += tensor.nbytes
        progress(done)
