"""`fastvlm quantize`: any checkpoint to a smaller MLX folder, and what that costs."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from fastvlm_mlx.cli.options import Command, option
from fastvlm_mlx.config import QUANT_MODES
from fastvlm_mlx.errors import FastVLMError

if TYPE_CHECKING:
    from fastvlm_mlx.quantize.pictures import Examined
    from fastvlm_mlx.quantize.recipes import Policy, RecipeName


class PolicyType(click.ParamType):
    """A number of bits, or float."""

    name = "bits"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if isinstance(value, int) or value == "float":
            return value
        if not value.isdecimal():
            self.fail(f"{value!r} is no number of bits: use one, or float", param, ctx)
        return int(value)


@click.command("quantize", cls=Command, short_help="Make a model smaller, and say what it costs.")
@artifact_options
@option(
    "Numbers",
    "--bits",
    type=int,
    help="Bits a weight: 2, 3, 4, 5, 6 or 8; 16 is float16, nothing packed.  "
    "[default: 4, or the mode's own]",
)
@option("Numbers", "--mode", type=click.Choice(list(QUANT_MODES)), default="affine",
        show_default=True, help="How groups of weights are packed.")  # fmt: skip
@option("Numbers", "--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  "
        "[default: 64, or the mode's own]")  # fmt: skip
@option(
    "Numbers",
    "--recipe",
    type=click.Choice(["uniform", "balanced"]),
    default="balanced",
    show_default=True,
    help="All modules alike, or some kept wider: embeddings, and some layers' q/k/v and down "
    "projections, in 6 bits beside 4.",
)
@option("Numbers", "--embeddings", type=PolicyType(), metavar="BITS|float",
        help="Embeddings and head.  [default: the recipe's]")  # fmt: skip
@option("Numbers", "--projector", type=PolicyType(), metavar="BITS|float", default="float",
        show_default=True, help="The projector.")  # fmt: skip
@dtype_option
@option("Report", "--report", is_flag=True, help="Measure what was lost; write report.json too.")
@option(
    "Report",
    "--report-picture",
    "pictures",
    multiple=True,
    metavar="IMAGE",
    help="Measure on this picture instead of the bundled ones; may be repeated.",
)
@option(
    "Report",
    "--report-prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="What to ask about it; may be repeated.  [default: Describe the image.]",
)
@click.pass_context
def command(
    context: click.Context,
    source: str,
    destination: Path,
    vision_from: str | None,
    overwrite: bool,
    bits: int | None,
    mode: str,
    group_size: int | None,
    recipe: RecipeName,
    embeddings: Policy | None,
    projector: Policy,
    dtype: str | None,
    report: bool,
    pictures: tuple[str, ...],
    prompts: tuple[str, ...],
) -> None:
    """Write a checkpoint with its decoder packed into fewer bits. The vision tower stays float.

    \b
    fastvlm quantize apple/FastVLM-0.5B FastVLM-0.5B-4bit --bits 4 --report
    fastvlm quantize ./FastVLM-7B-bf16 FastVLM-7B-mxfp4 --mode mxfp4
    fastvlm quantize ./FastVLM-7B-bf16 FastVLM-7B-f16 --bits 16

    SRC is a float model in any layout, a hub name, or demo, and is never changed. DST is what
    `fastvlm convert` writes, quantized. --report runs both models, one after the other, on real
    answers and compares each next token's probabilities.
    """
    from fastvlm_mlx.convert.pipeline import convert
    from fastvlm_mlx.quantize.recipes import make_recipe

    console: Console = context.obj
    if pictures and not report:
        raise click.UsageError("--report-picture needs --report", context)
    if prompts and not pictures:
        raise click.UsageError("--report-prompt needs --report-picture", context)
    examined = _examined(pictures, prompts)
    make = None
    if bits == 16:
        _refuse_packing(context)
        dtype = "float16"
    else:
        make = partial(
            make_recipe,
            recipe,
            bits=bits if bits is not None else _default_bits(mode),
            mode=mode,
            group_size=group_size,
            embeddings=embeddings,
            projector=projector,
        )
    with interruptible(console, destination):
        artifact = convert(
            source,
            destination,
            dtype=dtype,
            recipe=make,
            float_only=True,
            vision_from=vision_from,
            overwrite=overwrite,
            **common(console, context.meta[TYPED]),
        )
    console.close()
    print_artifact(artifact)
    if report:
        try:
            _report(console, source, destination, vision_from, examined)
        except (KeyboardInterrupt, FastVLMError):
            console.line(f"fastvlm: {destination} is whole; only its report is missing")
            raise


def _report(
    console: Console,
    source: str,
    destination: Path,
    vision_from: str | None,
    pictures: tuple[Examined, ...] | None,
) -> None:
    """Compare both models, print the table and put report.json into the folder."""
    from fastvlm_mlx import load
    from fastvlm_mlx.checkpoint.hub import resolve
    from fastvlm_mlx.quantize.report import measure

    def progress(done: int, total: int, model: str) -> None:
        console.report(0, 0, f"{model}: {done} of {total} questions")

    console.start("Loading the unquantized model")
    report = measure(
        lambda: load(source, vision_from=vision_from),
        lambda: load(destination.absolute()),  # a folder named demo is not the demo model
        pictures=pictures,
        vision_from=None if vision_from is None else resolve(vision_from),
        progress=progress,
    )
    unfinished = destination / ".report.json"
    unfinished.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    unfinished.replace(destination / "report.json")
    console.close()
    click.echo()
    click.echo(f"{'':<22}{'unquantized':<18}quantized")
    for what, before, after in report.rows():
        click.echo(f"{what:<22}{before:<18}{after}".rstrip())
    click.echo(
        f"along the unquantized model's answers: questions {report.questions}, "
        f"pictures {report.pictures}, tokens {report.positions}; on {report.device}"
    )
    for note in report.notes:
        click.echo(f"not measured: {note}")


def _examined(pictures: tuple[str, ...], prompts: tuple[str, ...]) -> tuple[Examined, ...] | None:
    """Open a user's pictures now: one that cannot be opened is said before hours of work."""
    from fastvlm_mlx.prompt.image import open_image
    from fastvlm_mlx.quantize.pictures import DESCRIBE, own_pictures

    if not pictures:
        return None
    opened = own_pictures(pictures, questions=prompts or (DESCRIBE,))
    return tuple(dataclasses.replace(one, source=open_image(one.source)) for one in opened)


def _default_bits(mode: str) -> int:
    return 4 if mode == "affine" else QUANT_MODES[mode][0][0]


def _refuse_packing(context: click.Context) -> None:
    """Refuse options that say how to pack where nothing is packed."""
    for name in ("mode", "group_size", "recipe", "embeddings", "projector", "dtype"):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            given = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"--bits 16 is float16, nothing packed: leave out {given}", context
            )
