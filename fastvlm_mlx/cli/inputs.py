"""The prompt and the pictures of a command line, checked before any model is looked at.

Knows files, standard input and what people get wrong with them; knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import click

from fastvlm_mlx.errors import ImageError, PromptError

log = logging.getLogger("fastvlm_mlx")


def read_prompt(prompt: str | None, file: str | None, *, has_images: bool) -> str | None:
    """Return the prompt given, None if it is to be the default one."""
    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --prompt-file are two prompts: give one")
    if file is not None:
        prompt = _text_of(Path(file))
    if prompt is None and not has_images:
        raise click.UsageError("give a picture, or a question with -p")
    if prompt is not None and not prompt.strip():
        raise PromptError(f"{file} is empty" if file is not None else "the prompt is empty")
    return prompt


def _text_of(file: Path) -> str:
    """Return a text file's content without its last line's end."""
    try:
        return file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise PromptError(f"{file} cannot be read: {reason}") from error


def read_pictures(
    sources: Sequence[str], background: tuple[int, int, int], *, asked: bool
) -> list[bytes]:
    """Return the encoded bytes of each picture, each decoded once to see that it can be.

    The engine decodes them again, so that its time to the first token includes that.
    """
    if not sources:
        return []
    from fastvlm_mlx.prompt.image import open_image
    from fastvlm_mlx.prompt.sources import read_bytes, source_name

    if sources.count("-") > 1:
        raise click.UsageError("standard input (-) holds one picture")
    pictures = []
    for source in sources:
        log.info("reading %s", source_name(source))
        try:
            data = read_bytes(source)
        except ImageError as error:
            if not asked and " " in source.strip():
                raise ImageError(f"{error}; if it is the question, put -p before it") from error
            raise
        open_image(data, background=background, name=source_name(source))
        pictures.append(data)
    return pictures
