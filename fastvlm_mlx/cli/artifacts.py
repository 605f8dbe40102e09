"""What the commands that write an artifact share: where from, where to, and what is said after.

Knows options and lines of text; the work is `fastvlm_mlx.convert`'s.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import option

if TYPE_CHECKING:
    from fastvlm_mlx.convert.pipeline import Artifact

TYPED = "fastvlm.typed"
"""Where the context's `meta` keeps the command line as it was typed, quoted for a shell."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def artifact_options(function: _Function) -> _Function:
    """Add SRC, DST, --vision-from and --overwrite."""
    for add in (
        option(
            "Files",
            "--overwrite",
            is_flag=True,
            help="Replace DST if it is a model folder. It stays until the new one is whole.",
        ),
        option(
            "Files",
            "--vision-from",
            metavar="NAME|FOLDER",
            help="Where the vision tower is, for exports for Apple's app, which hold none.",
        ),
        click.argument("destination", metavar="DST", callback=_named),
        click.argument("source", metavar="SRC"),
    ):
        function = add(function)
    return function


def _named(_ctx: click.Context, _param: click.Parameter, value: str) -> Path:
    """Refuse the empty name that an unset shell variable leaves: it would mean this folder."""
    if not value:
        raise click.BadParameter("the name of the destination is empty")
    return Path(value)


def dtype_option(function: _Function) -> _Function:
    """Add --dtype."""
    return option(
        "Numbers",
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="What floats are stored in; a float16 tower keeps its last stage in float32, where "
        "activations overflow.  [default: SRC's]",
    )(function)


def common(console: Console, typed: str) -> dict[str, Any]:
    """Return what every artifact's writer is given: the command line, the console's callbacks."""
    console.start("Reading the source")
    say = lambda line: console.line(f"fastvlm: {line}")  # noqa: E731 (one expression)
    return {"command": typed, "say": say, "progress": console.report}


@contextmanager
def interruptible(console: Console, destination: Path) -> Iterator[None]:
    """Let `kill` clean up as Ctrl-C does, and say of that one what it leaves.

    Otherwise `kill` ends Python at once and leaves the half-made folder to the next run.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        console.line(f"fastvlm: interrupted: nothing half-made is left of {destination}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def print_artifact(artifact: Artifact) -> None:
    """Print what was written, and for whom it was checked."""
    click.echo(
        f"{artifact.folder}: {readable_bytes(artifact.weight_bytes)} of weights, "
        f"{_numbers(artifact)}"
    )
    if artifact.consumers:
        click.echo(f"checked for {', '.join(artifact.consumers)}")
    for name in artifact.unable:
        click.echo(f"{name} takes only towers of Apple's size; all else it requires is met")


def _numbers(artifact: Artifact) -> str:
    quant = artifact.config.quant
    if quant is None:
        return artifact.dtype
    others = sorted({f"{bits} {mode}" for bits, _, mode in quant.overrides.values()})
    some = f", {' and '.join(others)} in some modules" if others else ""
    return f"{quant.bits} bits {quant.mode} in groups of {quant.group_size}{some}"
