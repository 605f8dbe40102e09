"""The folder that Apple's FastVLM app is built with: decoder, projector, tokenizer, Core ML tower.

Knows what the app's one-setting quantization allows (FORMATS.md, B3) and that its tower comes from
`fastvithd.mlpackage`; the rest is the pipeline's. Sources: apple/ml-fastvlm `app/FastVLM` and
`model_export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.convert.coreml import require_coremltools, write_tower_package
from fastvlm_mlx.convert.parts import app_parts
from fastvlm_mlx.convert.pipeline import Artifact, write_artifact
from fastvlm_mlx.convert.small_files import write_app_files
from fastvlm_mlx.convert.sources import Progress, Say, open_source, plan_quantization
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.quantize.recipes import Setting, make_recipe

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
    say: Say = lambda _: None,
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
    found = open_source(
        source,
        vision_from=vision_from,
        float_only=True,
        destination=destination,
        overwrite=overwrite,
        say=say,
        progress=progress,
    )
    checkpoint, config = found.checkpoint, found.checkpoint.config
    if config.projector.kind == "linear":
        raise ConfigError("Apple's app knows no projector of one linear layer")
    settings: dict[str, Setting] = {}
    if bits < 16:
        layers = config.decoder.num_layers
        recipe = make_recipe("uniform", bits=bits, num_layers=layers, projector=bits)
        settings, config = plan_quantization(found, recipe, say)

    def write_files(folder: Path, **facts: Any) -> None:
        write_app_files(folder, **facts)
        if progress is not None:
            progress(0, 0, f"Building {PACKAGE}")
        write_tower_package(folder / PACKAGE, checkpoint, precision=vision_precision)

    return write_artifact(
        found,
        destination,
        app_parts(checkpoint, _DTYPE, settings),
        config=config,
        dtype=_DTYPE,
        consumers=("app",),
        write_files=write_files,
        read_config=lambda folder: (
            open_checkpoint(folder, vision_from=checkpoint.tower_folder).config
        ),
        overwrite=overwrite,
        command=command,
        progress=progress,
    )
