"""Options that several subcommands share, values as people write them, and help in sections.

Knows click and spellings ("8GB", "white"); imports nothing heavy before a value is given.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fastvlm_mlx.cli.console import Console

MODEL_VARIABLE = "FASTVLM_MODEL"
DEMO_NOTICE = (
    "fastvlm: using the demo model, which knows coloured shapes and short numbers; for photos: "
    f"--model apple/FastVLM-0.5B, or set {MODEL_VARIABLE}"
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Size(click.ParamType):
    """Bytes as people write them: 8GB, 500 MB, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)B?", value.strip().upper())
        nbytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if nbytes <= 0:
            self.fail(f"{value!r} is no size: write it like 8GB or 500MB", param, ctx)
        return nbytes


class Colour(click.ParamType):
    """A colour by name or #rrggbb, as three bytes."""

    name = "colour"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        if value == "white":  # the default
            return 255, 255, 255
        from PIL import ImageColor  # 20 ms that most runs need not pay

        try:
            red, green, blue, *_ = ImageColor.getrgb(value)
        except ValueError:
            self.fail(f"{value!r} is no colour: write it like white or #ffcc00", param, ctx)
        return red, green, blue


class Resolution(click.ParamType):
    """A side in pixels on the tower's grid."""

    name = "pixels"
    largest = 4096

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from fastvlm_mlx.config import VisionConfig

        size: int = click.INT.convert(value, param, ctx)
        step = VisionConfig().stride
        if size % step or not 0 < size <= self.largest:
            self.fail(f"{size} is no multiple of {step} up to {self.largest}", param, ctx)
        return size


class Option(click.Option):
    """An option with the section of the help it stands in."""

    def __init__(self, *names: Any, section: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


class Command(click.Command):
    """A command with -v whose help lists its options by section, in the order of the source."""

    def __init__(self, *names: Any, **settings: Any) -> None:
        super().__init__(*names, **settings)
        verbose_option()(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                title = getattr(parameter, "section", "Options")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def option(section: str, *names: str, **settings: Any) -> Callable[[_Function], _Function]:
    """`click.option` in a section of the help."""
    return click.option(*names, cls=Option, section=section, **settings)


def verbose_option() -> Callable[[_Function], _Function]:
    """-v, before or after the subcommand."""

    def hear(_ctx: click.Context, _param: click.Parameter, verbose: bool) -> None:
        if verbose:
            logging.getLogger("fastvlm_mlx").setLevel(logging.DEBUG)

    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=hear,
        help="Say on stderr what is being done.",
    )


def image_options(function: _Function) -> _Function:
    """Add --resolution, --image-mode and --background: how a picture becomes pixels."""
    section = "Picture"
    for add in (
        option(
            section,
            "--background",
            type=Colour(),
            default="white",
            show_default=True,
            help="What transparent pixels are laid on: a name or #rrggbb.",
        ),
        option(
            section,
            "--image-mode",
            type=click.Choice(["pad", "crop"]),
            help="Fit the whole picture on a black square, or cut out its middle."
            "  [default: the model's]",
        ),
        option(
            section,
            "--resolution",
            type=Resolution(),
            metavar="PIXELS",
            help="Side of the square the model sees, a multiple of 64.  [default: the model's]",
        ),
    ):
        function = add(function)
    return function


def model_option(function: _Function) -> _Function:
    """Add --model; `chosen_model` reads it."""
    return option(
        "Model",
        "--model",
        metavar="NAME|FOLDER",
        envvar=MODEL_VARIABLE,
        help="A folder, a name on the Hugging Face hub (apple/FastVLM-0.5B, with @revision), "
        f"or demo.  [env {MODEL_VARIABLE}; default: demo]",
    )(function)


def chosen_model(model: str | None, console: Console) -> str:
    """Return the model to use; when none was chosen it is the demo model, and this says so."""
    if model is None:
        console.line(DEMO_NOTICE)
        return "demo"
    return model
