"""Tokenizer, template and pictures behind one face: messages to a `Prompt`, sources to pixels.

Knows which size and fitting its model was trained on. Refuses to know the model: a prompt holds
slots, and joining slots with pictures' features, counting both, is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastvlm_mlx.config import ImageMode
from fastvlm_mlx.prompt.image import ImageSource, fit, open_image
from fastvlm_mlx.prompt.template import Control, ImageMark, Message, render
from fastvlm_mlx.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextIds:
    """A run of token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of one picture's features, in the order the pictures are given."""


Segment = TextIds | ImageSlot


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, in order. There is no sentinel id: a slot is a segment of its own."""

    segments: tuple[Segment, ...]

    @property
    def slot_count(self) -> int:
        """How many pictures the prompt has room for."""
        return sum(isinstance(segment, ImageSlot) for segment in self.segments)

    @property
    def text_ids(self) -> tuple[int, ...]:
        """All token ids in order, the slots left out."""
        return tuple(
            i for segment in self.segments if isinstance(segment, TextIds) for i in segment.ids
        )


# Texts whose ids are remembered: the turns of a conversation that outgrows any context.
_TEXTS_REMEMBERED = 1024


class Processor:
    """Prepares prompts and pictures for one model.

    Remembers the ids of the latest texts, since a chat renders its whole transcript each turn.
    """

    def __init__(self, tokenizer: Tokenizer, image_size: int, image_mode: ImageMode) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image_mode = image_mode
        self._ids = lru_cache(_TEXTS_REMEMBERED)(lambda text: tuple(tokenizer.encode(text)))

    @classmethod
    def from_folder(cls, folder: Path, *, image_size: int, image_mode: ImageMode) -> Processor:
        """Read the folder's tokenizer. Raises CheckpointError if it has none that is whole."""
        return cls(Tokenizer.from_folder(folder), image_size, image_mode)

    def prompt(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> Prompt:
        """Render and tokenize; the text on each side of a picture is tokenized separately.

        Raises PromptError for no messages or text that is not Unicode.
        """
        segments: list[Segment] = []
        ids: list[int] = []
        for part in render(messages, generation_prompt=generation_prompt):
            if isinstance(part, ImageMark):
                if ids:
                    segments.append(TextIds(tuple(ids)))
                segments.append(ImageSlot())
                ids = []
            elif isinstance(part, Control):
                ids.append(self.tokenizer.control_id(part.token))
            else:
                ids += self._ids(part)
        if ids:
            segments.append(TextIds(tuple(ids)))
        return Prompt(tuple(segments))

    def pixels(
        self,
        source: ImageSource,
        *,
        size: int | None = None,
        mode: ImageMode | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
    ) -> np.ndarray:
        """Return uint8 [size, size, 3]; size and mode default to the model's own.

        Raises ImageError or FetchError, naming the source.
        """
        return self.fit(open_image(source, background=background), size=size, mode=mode)

    def fit(
        self, image: Image.Image, *, size: int | None = None, mode: ImageMode | None = None
    ) -> np.ndarray:
        """Return uint8 [size, size, 3] of an RGB image, as `pixels` does."""
        return fit(image, self.image_size if size is None else size, mode or self.image_mode)
