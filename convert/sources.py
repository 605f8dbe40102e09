"""What an artifact is made of: a checkpoint found, opened, and checked as far as headers tell.

Knows what may be refused before anything is read or written, and what a recipe makes of a source's
modules. Writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.hub import Progress, Say, model_folder
from fastvlm_mlx.checkpoint.load import check_tower, decide_tied
from fastvlm_mlx.checkpoint.store import FLOATS, Checkpoint, open_checkpoint
from fastvlm_mlx.checkpoint.tensors import read_json
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.place import check_destination
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.quantize.recipes import Recipe, Setting, group_of, plan_modules, quant_config

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint, its config.json as it stands, and the names that it was asked for by."""

    name: str
    tower_name: str | None
    checkpoint: Checkpoint
    raw: Mapping[str, Any]


def open_source(
    name: str | Path,
    *,
    vision_from: str | Path | None,
    float_only: bool,
    destination: Path,
    overwrite: bool,
    say: Say,
    progress: Progress | None,
) -> Source:
    """Find a source, downloaded if need be, and refuse now what would fail after hours of work.

    With `float_only` a quantized source is refused: its losses would add to new ones. Of weights
    only a stored head is read, to drop it if it is the embedding's copy. Raises CheckpointError,
    CheckpointMismatch, ConfigError or FetchError.
    """

    # Before a download too.
    check_destination(destination, overwrite=overwrite, source=None)
    folder = model_folder(name, say=say, progress=progress)
    tower = None
    if vision_from is not None:
        tower = model_folder(vision_from, say=say, progress=progress)
    checkpoint = open_checkpoint(folder, vision_from=tower)
    check_tower(checkpoint)
    if float_only and checkpoint.quantized_paths:
        raise ConfigError(f"{name} is quantized already: start from the float model")
    for read in (folder, *((tower,) if tower else ())):
        check_destination(destination, overwrite=overwrite, source=read)
    return Source(
        name=str(name),
        tower_name=None if vision_from is None else str(vision_from),
        checkpoint=decide_tied(_only_used_settings(checkpoint)),
        raw=read_json(folder / "config.json"),
    )


def _only_used_settings(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out settings of modules that are stored float, which a config may have all the same."""
    quant = checkpoint.config.quant
    if quant is None:
        return checkpoint
    packed = set(checkpoint.quantized_paths)
    used = {path: setting for path, setting in quant.overrides.items() if path in packed}
    kept = dataclasses.replace(quant, overrides=used) if packed else None
    config = dataclasses.replace(checkpoint.config, quant=kept)
    return dataclasses.replace(checkpoint, config=config)


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
    """Return the setting of each module of a float source, and the config that says so."""
    checkpoint = source.checkpoint
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
