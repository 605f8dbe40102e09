"""`fastvlm preview`: the pixels a model sees of a picture, as a PNG. Needs no weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command, chosen_model, image_options, model_option, option
from fastvlm_mlx.config import ImageMode
from fastvlm_mlx.errors import FastVLMError

if TYPE_CHECKING:
    from PIL import Image


@click.command("preview", cls=Command, short_help="Write the pixels a model sees of a picture.")
@click.argument("image")
@option("Output", "-o", "--output", required=True, metavar="OUT.png", help="The PNG to write.")
@option("Output", "--overwrite", is_flag=True, help="Replace OUT.png if it exists.")
@image_options
@model_option
@click.pass_obj
def command(
    console: Console,
    image: str,
    output: str,
    overwrite: bool,
    background: tuple[int, int, int],
    image_mode: ImageMode | None,
    resolution: int | None,
    model: str | None,
) -> None:
    """Write what a model sees of a picture: turned upright, fitted into its square, resized.

    \b
    fastvlm preview photo.jpg -o seen.png --model apple/FastVLM-0.5B
    fastvlm preview photo.jpg -o seen.png --resolution 1024 --image-mode crop

    IMAGE is a file, an http(s) URL, a data: URI, or - for standard input. Of the model only
    config.json is read, and with --resolution and --image-mode not even that.
    """
    from PIL import Image

    from fastvlm_mlx.prompt.image import fit, open_image

    path = _checked(Path(output), overwrite=overwrite)
    console.start("Reading the picture")
    opened = open_image(image, background=background)
    if resolution is None or image_mode is None:
        size, mode = _picture_form(chosen_model(model, console))
        resolution, image_mode = resolution or size, image_mode or mode
    _write(path, Image.fromarray(fit(opened, resolution, image_mode)))
    console.close()
    how = "padded" if image_mode == "pad" else "cropped"
    click.echo(f"{path}: {resolution}x{resolution}, {how} from {opened.width}x{opened.height}")


def _checked(path: Path, *, overwrite: bool) -> Path:
    if path.suffix.lower() != ".png":
        raise FastVLMError(f"{path} would be a PNG: name it {path.with_suffix('.png').name}")
    if path.is_dir():
        raise FastVLMError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise FastVLMError(f"{path} exists: --overwrite replaces it")
    if not path.parent.is_dir():
        raise FastVLMError(f"{path} cannot be written: there is no folder {path.parent}")
    return path


def _picture_form(model: str) -> tuple[int, ImageMode]:
    from fastvlm_mlx.checkpoint.hub import resolve_config
    from fastvlm_mlx.checkpoint.source_config import read_picture_form
    from fastvlm_mlx.checkpoint.tensors import read_json

    return read_picture_form(read_json(resolve_config(model) / "config.json"))


def _write(path: Path, picture: Image.Image) -> None:
    """Write beside `path` and rename, so that nobody sees half a picture."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with beside.open("xb") as file:
                picture.save(file, format="PNG")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise FastVLMError(f"{path} cannot be written: {error.strerror or error}") from error
