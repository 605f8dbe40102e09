"""The folder that Apple's FastVLM app is built with: decoder, projector, tokenizer, Core ML tower.

Knows what the app's one-setting quantization allows (FORMATS.md, B3) and that its tower comes from
`fastvithd.mlpackage`; the rest is the pipeline's. Sources: apple/ml-fastvlm `app/FastVLM` and
`model_export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.convert.coreml import require_coremltools, write_tower_package
from fastvlm_mlx.convert.parts import app_parts
from fastvlm_mlx.convert.pipeline import (
    Artifact,
    Progress,
    Say,
    check_places,
    open_source,
    plan_artifact,
    plan_quantization,
    write_artifact,
)
from fastvlm_mlx.convert.small_files import write_app_files
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.quantize.recipes import DEFAULT_GROUP_SIZE, Setting, make_recipe

VisionPrecision = Literal["float32", "float16"]

PACKAGE = "fastvithd.mlpackage"
"""The name that Xcode makes the class `fastvithd` of."""

_DTYPE = "float16"


def export_app(
    source: str | Path,
    destination: Path,
    *,
    bits: int,
    vision_precision: VisionPrecision = "float32",
    vision_from: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    say: Say | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the model folder of Apple's app: 8 or 4 `bits` in groups of 64, or 16 for float16.

    Needs coremltools (extra `app`), but no Mac: the package is built from the weights as stored,
    computed in `vision_precision`. A tied head stays tied, which the app takes and which is smaller
    than Apple's own exports. The other arguments and the errors are `convert`'s.
    """
    if bits not in (16, 8, 4):
        raise ConfigError(f"the app's folder has 16, 8 or 4 bits, not {bits}")
    require_coremltools()
    say = say or (lambda _: None)
    found = open_source(source, vision_from, None, say, progress)
    checkpoint = found.checkpoint
    if checkpoint.config.projector.kind == "linear":
        raise ConfigError("Apple's app knows no projector of one linear layer")
    check_places(destination, checkpoint, overwrite=overwrite)
    settings: dict[str, Setting] = {}
    config = checkpoint.config
    if bits == 16:
        if config.quant is not None:
            raise ConfigError(f"{found.name} is quantized already: start from the float model")
    else:
        recipe = make_recipe(
            "uniform",
            bits=bits,
            num_layers=config.decoder.num_layers,
            group_size=DEFAULT_GROUP_SIZE,
            projector=bits,
        )
        settings, config = plan_quantization(found, recipe, say)
    parts = app_parts(checkpoint, _DTYPE, settings)
    artifact = plan_artifact(destination, found, config, _DTYPE, parts, ("app",))
    original = checkpoint.tower or checkpoint

    def write_files(folder: Path) -> None:
        write_app_files(
            folder,
            source_folder=checkpoint.folder,
            config=config,
            raw=found.raw,
            dtype=_DTYPE,
            source_name=found.name,
            command=command,
            bits_per_weight=artifact.bits_per_weight,
        )
        if progress is not None:
            progress(0, 0, f"Building {PACKAGE}")
        write_tower_package(folder / PACKAGE, checkpoint, precision=vision_precision)

    def check(folder: Path) -> None:
        again = open_checkpoint(folder, vision_from=original.folder).config
        if (again.decoder, again.projector, again.quant) != (
            config.decoder,
            config.projector,
            config.quant,
        ):
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
