"""`fastvlm convert`: any checkpoint to the folder that MLX runtimes load."""

from __future__ import annotations

from pathlib import Path

import click

from fastvlm_mlx.cli.artifacts import (
    TYPED,
    artifact_options,
    common,
    dtype_option,
    interruptible,
    print_artifact,
)
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command


@click.command("convert", cls=Command, short_help="Turn any checkpoint into an MLX folder.")
@artifact_options
@dtype_option
@click.pass_context
def command(
    context: click.Context,
    source: str,
    destination: Path,
    vision_from: str | None,
    overwrite: bool,
    dtype: str | None,
) -> None:
    """Write a checkpoint as a folder that this engine, mlx-vlm and mlx-swift-lm load.

    \b
    fastvlm convert apple/FastVLM-0.5B FastVLM-0.5B-bf16
    fastvlm convert ./llava-fastvithd_7b_stage3 FastVLM-7B-f16 --dtype float16
    fastvlm convert apple/FastVLM-7B-int4 FastVLM-7B-int4 --vision-from apple/FastVLM-7B

    SRC is a folder in any layout, a hub name, or demo, and is never changed. A quantized SRC keeps
    its quantization. DST appears when it is whole, read back, and checked for each runtime.
    Licence and notice files are copied; the model card names the licence and this command.
    """
    from fastvlm_mlx.convert.pipeline import convert

    console: Console = context.obj
    with interruptible(console, destination):
        artifact = convert(
            source,
            destination,
            dtype=dtype,
            vision_from=vision_from,
            overwrite=overwrite,
            **common(console, context.meta[TYPED]),
        )
    console.close()
    print_artifact(artifact)
