"""The prompt and the pictures of a command line, checked before any model is looked at.

Knows files, standard input and what people get wrong with them. Of a model it knows the size and
fitting of its pictures, so that they are made while its weights are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastvlm_mlx.errors import ImageError, PromptError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from PIL import Image

    from fastvlm_mlx.config import ImageMode, ModelConfig

# Pictures decoded before the model is there: 36 MB each for 12 megapixels.
_AHEAD = 4

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


class Pictures:
    """A command line's pictures on their way to a model: read, decoded, fitted, each in time.

    Bytes are read at once, where Ctrl-C works. A thread decodes them while Python imports, and
    fits the first few while weights are read; both give up Python's lock. Of the others only the
    bytes are kept.
    """

    def __init__(
        self,
        sources: Sequence[str],
        background: tuple[int, int, int],
        *,
        asked: bool,
        ahead: bool = True,
        reduced_to: int | None = None,
    ) -> None:
        """Read the sources and begin to decode; only to check them, if nothing is made `ahead`.

        Raises UsageError, ImageError or FetchError.
        """
        self.encoded = [_read(source, asked=asked) for source in _checked(sources)]
        self._decoding: list[Future[Image.Image | None]] = []
        self._fitting: list[Future[np.ndarray]] = []
        if not sources:
            return
        from concurrent.futures import ThreadPoolExecutor

        from fastvlm_mlx.prompt.image import open_image
        from fastvlm_mlx.prompt.sources import source_name

        self._thread = ThreadPoolExecutor(1)
        for place, (source, data) in enumerate(zip(sources, self.encoded, strict=True)):
            name = source_name(source)
            decode = partial(
                open_image, data, background=background, name=name, reduced_to=reduced_to
            )
            work = decode if ahead and place < _AHEAD else partial(_check, decode)
            self._decoding.append(self._thread.submit(work))

    def check(self) -> None:
        """Wait for the decoding. Raises ImageError for the first picture that is none."""
        for decoding in self._decoding:
            decoding.result()

    def fit(self, config: ModelConfig, resolution: int | None, mode: ImageMode | None) -> None:
        """Begin to fit them to a model. Raises ConfigError for a resolution off its grid."""
        size = config.vision.image_size if resolution is None else resolution
        config.vision.tokens(size, size)
        if self._decoding:
            from fastvlm_mlx.prompt.image import fit

            for image in (decoding.result() for decoding in self._decoding[:_AHEAD]):
                assert image is not None  # only later ones are but checked
                self._fitting.append(
                    self._thread.submit(fit, image, size, mode or config.image_mode)
                )
            self._decoding.clear()  # a decoded picture goes when it is fitted
            self._thread.shutdown(wait=False)

    def pixels(self) -> list[np.ndarray | bytes]:
        """Return the pictures: uint8 [size, size, 3] if fitted, else encoded. Raises ImageError."""
        fitted = [fitting.result() for fitting in self._fitting]
        return [*fitted, *self.encoded[len(fitted) :]]


def _check(decode: Callable[[], object]) -> None:
    decode()


def _checked(sources: Sequence[str]) -> Sequence[str]:
    if sources.count("-") > 1:
        raise click.UsageError("standard input (-) holds one picture")
    return sources


def _read(source: str, *, asked: bool) -> bytes:
    from fastvlm_mlx.prompt.sources import read_bytes, source_name

    log.info("reading %s", source_name(source))
    try:
        return read_bytes(source)
    except ImageError as error:
        if not asked and " " in source.strip():
            raise ImageError(f"{error}; if it is the question, put -p before it") from error
        raise
