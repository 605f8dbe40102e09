"""The options of `fastvlm bench`, and values as people write them: `256,512`, `short,long`.

Knows click and what goes with what. Imports nothing heavy before a value is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from fastvlm_mlx.cli.options import Resolution, option

_Function = TypeVar("_Function", bound=Callable[..., Any])

SWEEPS = ("resolution", "prompt", "images", "quantization")
SIZES = ("0.5b", "1.5b", "7b", "demo")
MLX_VLM = "mlx-vlm"


class Several(click.ParamType):
    """Values of one type with commas between them, each once."""

    def __init__(self, kind: click.ParamType, name: str) -> None:
        self.kind = kind
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        found = [self.kind.convert(word.strip(), param, ctx) for word in value.split(",")]
        return tuple(dict.fromkeys(found))


class Prompt(click.ParamType):
    """A pinned prompt's name, or how many words it is to have."""

    name = "prompt"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from fastvlm_mlx.bench.inputs import prompt_text
        from fastvlm_mlx.errors import FastVLMError

        try:
            prompt_text(value)
        except FastVLMError as error:
            self.fail(str(error), param, ctx)
        return str(value)


_OPTIONS = (
    option("Model", "--size", type=click.Choice(SIZES),
           help="Instead of --model: random weights of this size, made in memory."),
    option("Model", "--bits", type=click.Choice(["16", "8", "4"]),
           help="With --size: bits a decoder weight; a CPU unpacks them without --keep-quantized.  "
           "[default: 16]"),
    option("Model", "--seed", type=int,
           help="With --size: which random weights.  [default: 0]"),
    option("Work", "--resolution", type=Several(Resolution(), "pixels"), metavar="PIXELS,…",
           help="Sides of the pictures, multiples of 64.  [default: the model's]"),
    option("Work", "--prompt", type=Several(Prompt(), "prompts"), metavar="NAME,…",
           help='Pinned prompts: short, medium, long or "N words".  [default: short]'),
    option("Work", "--images", type=Several(click.IntRange(1, 64), "numbers"), metavar="N,…",
           help="How many pictures.  [default: 1]"),
    option("Work", "--max-tokens", type=click.IntRange(min=1), metavar="N", default=64,
           show_default=True, help="Length of the answer, which nothing else ends."),
    option("Work", "--photo", is_flag=True,
           help="Give every picture as a 12-megapixel JPEG, as a phone takes it."),
    option("Work", "--sweep", type=click.Choice(SWEEPS),
           help="Vary this over a wide range, or over the values given; quantization needs --size "
           "and stays packed."),
    option("Runs", "--runs", type=click.IntRange(min=1), metavar="N", default=10,
           show_default=True, help="How often each case is measured."),
    option("Runs", "--warm-up", type=click.IntRange(min=0), metavar="N", default=2,
           show_default=True, help="How often before that, left out."),
    option("Runs", "--cold", type=click.IntRange(min=1), metavar="N",
           help="Also start so many fresh processes and time each to its first token."),
    option("Runs", "--cold-files", is_flag=True,
           help="With --cold: have Linux forget the weights' files before each start and load."),
    option("Compare", "--compare", metavar="mlx-vlm|FILE",
           help="The same work in mlx-vlm, in turn with ours; or the ratios to a saved result."),
    option("Compare", "--peer-python", metavar="PATH",
           type=click.Path(exists=True, dir_okay=False, path_type=Path),
           help="The Python that has mlx-vlm.  [default: this one]"),
    option("Compare", "--check", metavar="FILE",
           help="Exit with 1 if a figure is worse than in this saved result."),
    option("Compare", "--tolerance", metavar="SHARE", type=click.FloatRange(min=0),
           help="With --check: how much worse is allowed, beyond noise.  [default: 0.1]"),
    option("Output", "--json", "as_json", is_flag=True,
           help="Print one JSON object instead of the table."),
    option("Output", "--save", metavar="FILE",
           help="Write that object to a file, for --check and --compare."),
    option("Output", "--csv", metavar="FILE", help="Write a line a case and figure."),
    option("Output", "--plots", metavar="FOLDER",
           help="Write PNGs: stages of TTFT, latency against resolution, the comparison."),
)  # fmt: skip


def bench_options(function: _Function) -> _Function:
    """Add all options but the model's shared ones."""
    for add in reversed(_OPTIONS):
        function = add(function)
    return function


def require_sense(context: click.Context) -> None:
    """Raise click.UsageError for options that do not go together, before anything is done."""
    given = context.params
    for message in _nonsense(context):
        raise click.UsageError(message, context)
    written = [Path(given[name]).resolve() for name in ("save", "csv") if given[name] is not None]
    if len(written) > len(set(written)):
        raise click.UsageError("--save and --csv name the same file", context)
    if given["check"] is not None and Path(given["check"]).resolve() in written:
        raise click.UsageError("--save would replace the baseline that --check reads", context)


def _nonsense(context: click.Context) -> Iterator[str]:
    """Yield what is wrong with the options as given."""
    given = context.params
    chosen = context.get_parameter_source("model") == click.core.ParameterSource.COMMANDLINE
    if given["size"] is None:
        if given["bits"] is not None:
            yield "--bits needs --size: a model's own bits are in its files"
        if given["seed"] is not None:
            yield "--seed needs --size: a model's weights are not random"
        if given["sweep"] == "quantization":
            yield "--sweep quantization needs --size: it makes the weights itself"
    elif chosen or given["vision_from"] is not None:
        yield f"--size makes weights itself: leave out {'--model' if chosen else '--vision-from'}"
    if given["sweep"] == "quantization":
        for other in ("bits", "check", "compare"):
            if given[other] is not None:
                yield f"--sweep quantization measures several models: leave out --{other}"
    if given["cold_files"]:
        yield from _no_cold_files(given)
    if given["compare"] == MLX_VLM:
        for other in ("vision_from", "memory_limit"):
            if given[other] is not None:
                yield _not_theirs(other)
        for other in ("paired_heads", "low_memory", "keep_quantized"):
            if given[other]:
                yield _not_theirs(other)
        if given["check"] is not None:
            yield (
                f"--check is of our engine alone, and --compare {MLX_VLM} measures it otherwise: "
                "leave out one of them"
            )
    if given["compare"] == "":
        yield "--compare needs mlx-vlm or a saved result"
    if given["compare"] == MLX_VLM.replace("-", "_") and not Path(given["compare"]).exists():
        yield f"--compare {given['compare']}: no such file; did you mean {MLX_VLM}?"
    if given["peer_python"] is not None and given["compare"] != MLX_VLM:
        yield f"--peer-python needs --compare {MLX_VLM}"
    if given["tolerance"] is not None and given["check"] is None:
        yield "--tolerance needs --check"
    if given["check"] is not None:
        from fastvlm_mlx.bench.baseline import FEWEST_RUNS

        if given["runs"] < FEWEST_RUNS:
            yield f"--check needs --runs {FEWEST_RUNS} or more: fewer show no noise"


def _no_cold_files(given: dict[str, Any]) -> Iterator[str]:
    if given["cold"] is None:
        yield "--cold-files needs --cold"
    if given["compare"] == MLX_VLM:
        yield f"--cold-files is not done with --compare {MLX_VLM}, where all load from memory"
    if not hasattr(os, "posix_fadvise"):
        yield "--cold-files needs Linux: no other system can be asked to forget files"


def _not_theirs(name: str) -> str:
    return f"{MLX_VLM} knows no such option, so nothing is compared: leave out --" + name.replace(
        "_", "-"
    )
