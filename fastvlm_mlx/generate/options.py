"""What a caller may choose about pictures and answers: value objects, checked when they are made.

Knows no model; what depends on one (the grid, the context) is checked where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from fastvlm_mlx.config import ImageMode
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.model.fastvlm import ShownImage
from fastvlm_mlx.prompt.image import ImageSource, is_source
from fastvlm_mlx.sampling import GREEDY, Sampling

Picture = ImageSource | ShownImage


def listed(images: Sequence[Picture]) -> tuple[Picture, ...]:
    """Return the pictures; raise ImageError for one given by itself, whose parts look like many."""
    if isinstance(images, ShownImage) or is_source(images):
        raise ImageError("images takes a list of pictures: write images=[...]")
    return tuple(images)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How a picture becomes pixels; None takes the model's own size in pixels and mode.

    `reduced_jpeg` decodes a large JPEG at a half, a quarter or an eighth of its size: quicker, and
    other pixels than the reference's.
    """

    resolution: int | None = None
    image_mode: ImageMode | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    reduced_jpeg: bool = False

    def __post_init__(self) -> None:
        if self.image_mode not in (None, *get_args(ImageMode)):
            raise ConfigError(f"image mode {self.image_mode!r} is not pad or crop")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How an answer is generated. `cancelled` is asked before each pass of the prompt and
    after each token.

    Raises FastVLMError for options that make no sense, alone or together.
    """

    sampling: Sampling = GREEDY
    max_tokens: int = 256
    stop: Sequence[str] = ()
    logprobs: bool = False
    num_beams: int = 1
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise FastVLMError(f"max_tokens must be >= 1, not {self.max_tokens}")
        if isinstance(self.stop, str):
            raise FastVLMError("stop takes a list of strings: write stop=[...]")
        if self.num_beams < 1:
            raise FastVLMError(f"num_beams must be >= 1, not {self.num_beams}")
        if self.num_beams > 1 and not self.sampling.greedy:
            raise FastVLMError("beam search takes no temperature: leave out one of the two")
        if self.num_beams > 1 and self.sampling != replace(GREEDY, seed=self.sampling.seed):
            raise FastVLMError("beam search takes no sampling options")
        if self.num_beams > 1 and self.logprobs:
            raise FastVLMError("beam search gives no log-probabilities per token")
