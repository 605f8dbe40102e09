"""`fastvlm export-app`: any checkpoint to the folder that Apple's app is built with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.cli.artifacts import (
    TYPED,
    artifact_options,
    common,
    interruptible,
    print_artifact,
)
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command, option

if TYPE_CHECKING:
    from fastvlm_mlx.convert.app import VisionPrecision


@click.command("export-app", cls=Command, short_help="Write the model folder of Apple's app.")
@artifact_options
@option("Numbers", "--bits", type=click.Choice(["16", "8", "4"]), required=True,
        help="Bits a weight of decoder and projector; 16 is float16.")  # fmt: skip
@option(
    "Numbers",
    "--vision-precision",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="What Core ML computes the tower in; Apple ships float32. In float16 the last stage, "
    "where activations overflow, stays float32: 362 MB in place of 491.",
)
@click.pass_context
def command(
    context: click.Context,
    source: str,
    destination: Path,
    vision_from: str | None,
    overwrite: bool,
    bits: str,
    vision_precision: VisionPrecision,
) -> None:
    """Write the folder that Apple's FastVLM app for iOS and macOS is built with.

    \b
    fastvlm export-app apple/FastVLM-0.5B app/FastVLM/model --bits 8

    SRC is a float model in any layout, a hub name, or demo, and is never changed. The vision tower
    becomes fastvithd.mlpackage, straight from the weights: no torch and no Mac, but the app extra
    (pip install 'fastvlm-mlx[app]'). All of decoder and projector is packed alike, which is what
    the app reads. The app itself takes only towers of Apple's size, which the demo's is not.
    """
    from fastvlm_mlx.convert.app import PACKAGE, export_app

    console: Console = context.obj
    with interruptible(console, destination):
        artifact = export_app(
            source,
            destination,
            bits=int(bits),
            vision_precision=vision_precision,
            vision_from=vision_from,
            overwrite=overwrite,
            **common(console, context.meta[TYPED]),
        )
    console.close()
    print_artifact(artifact)
    package = destination / PACKAGE
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    click.echo(f"{PACKAGE}: {readable_bytes(size)}, computes in {vision_precision}")
