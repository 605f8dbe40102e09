"""Answers computed from nothing, and what may be reused, without the session's own means.

Knows the network, and the pictures of the pool by their numbers: features straight through the
tower, one pass over all positions, an empty cache. Which positions are the same is worked out on
(picture of the pool, row): there is no digest here that could be wrong. Knows no sessions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from session_operations import DEFAULT_SIDE, MAX_TOKENS, POOL, drawn

import fastvlm_mlx as fv
from fastvlm_mlx.generate.loop import generate_ids, logprobs_along
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.prompt.processor import TextIds
from fastvlm_mlx.prompt.template import IM_START, Message

# What one position is: a token id, or (picture of the pool, row).
Position = int | tuple[int, int]


class Reference:
    """Answers computed from nothing, each once."""

    def __init__(self, engine: fv.Engine, kv_bits: int | None = None) -> None:
        self.engine = engine
        self.kv_bits = kv_bits
        # Pictures whose features the engine has.
        self.known: set[int] = set()
        self._features: dict[int, mx.array] = {}
        self._ids: dict[Any, tuple[int, ...]] = {}
        self._pixels: dict[int, np.ndarray] = {}

    def pixels(self, index: int) -> np.ndarray:
        """Return what the tower should see of a picture of the pool."""
        if index not in self._pixels:
            processor = self.engine.pipeline.processor
            self._pixels[index] = processor.pixels(drawn(index), size=side_of(index))
        return self._pixels[index]

    def features(self, index: int) -> mx.array:
        """Return the picture's features, by the network alone: no cache, no digest."""
        if index not in self._features:
            found = self.engine.pipeline.model.encode_image(mx.array(self.pixels(index))[None])[0]
            mx.eval(found)
            self._features[index] = found
        return self._features[index]

    def positions(
        self,
        messages: Sequence[Message],
        pictures: Sequence[int],
        *,
        generation_prompt: bool = True,
    ) -> list[Position]:
        """Return what each position of the prompt is."""
        found: list[Position] = []
        remaining = iter(pictures)
        processor = self.engine.pipeline.processor
        for segment in processor.prompt(messages, generation_prompt=generation_prompt).segments:
            if isinstance(segment, TextIds):
                found += segment.ids
            else:
                index = next(remaining)
                rows = side_of(index) // 64
                found += [(index, row) for row in range(rows**2)]
        assert next(remaining, None) is None
        return found

    def certain(self, positions: Sequence[Position]) -> int:
        """Return how many positions of a prompt no text of its last question can change.

        The text is tokenized with what comes before it in its message, back to a picture.
        """
        start = self.engine.pipeline.processor.tokenizer.control_id(IM_START.token)
        starts = [at for at, position in enumerate(positions) if position == start]
        rows = [at for at, position in enumerate(positions) if isinstance(position, tuple)]
        return max([starts[-2], *rows]) + 1

    def ids(
        self, messages: Sequence[Message], pictures: Sequence[int], sampling: fv.Sampling
    ) -> tuple[int, ...]:
        """Return the first MAX_TOKENS ids of the answer."""
        key = (tuple(messages), tuple(pictures), sampling)
        if key not in self._ids:
            decoder = self.engine.pipeline.model.decoder
            steps = generate_ids(
                decoder,
                self._embeddings(messages, pictures),
                decoder.make_cache(self.kv_bits),
                prompt_ids=self.engine.pipeline.processor.prompt(messages).text_ids,
                sampling=sampling,
                max_tokens=MAX_TOKENS,
                stop_ids=self.engine.pipeline.stop_ids,
            )
            self._ids[key] = tuple(step.token_id for step in steps)
        return self._ids[key]

    def margin(
        self, messages: Sequence[Message], pictures: Sequence[int], ids: Sequence[int]
    ) -> float:
        """Return how far the most likely id is before the next one after the prompt and `ids`."""
        decoder = self.engine.pipeline.model.decoder
        rows = logprobs_along(decoder, self._embeddings(messages, pictures), [*ids, 0])
        last = np.sort(np.array(list(rows)[-1][-1]))
        return float(last[-1] - last[-2])

    def _embeddings(self, messages: Sequence[Message], pictures: Sequence[int]) -> mx.array:
        remaining = iter(pictures)
        return self.engine.pipeline.model.embed(
            [
                segment.ids if isinstance(segment, TextIds) else self.features(next(remaining))
                for segment in self.engine.pipeline.processor.prompt(messages).segments
            ]
        )


def side_of(index: int) -> int:
    """Return the side in pixels of what the tower sees of a picture of the pool."""
    return POOL[index].side or DEFAULT_SIDE


def common(held: Sequence[Position], wanted: Sequence[Position]) -> int:
    """Return how many positions may be reused: equal ones, not the last, no part of a picture."""
    shared = 0
    while shared < min(len(held), len(wanted) - 1) and held[shared] == wanted[shared]:
        shared += 1
    while isinstance(at := wanted[shared], tuple) and at[1] > 0:
        shared -= 1
    return shared


@dataclass(slots=True)
class Work:
    """What the network was made to do: positions through the decoder, pictures to the tower."""

    positions: int = 0
    pictures: int = 0


@contextmanager
def watched() -> Iterator[Work]:
    """Count the network's work."""
    work = Work()
    real_hidden, real_tower = Decoder.hidden, FastViTHD.__call__

    def hidden(self: Decoder, embeddings: mx.array, cache: Any, **how: Any) -> mx.array:
        work.positions += embeddings.shape[1]
        return real_hidden(self, embeddings, cache, **how)

    def tower(self: FastViTHD, pixels: mx.array) -> mx.array:
        work.pictures += pixels.shape[0]
        return real_tower(self, pixels)

    Decoder.hidden, FastViTHD.__call__ = hidden, tower  # type: ignore[method-assign]
    try:
        yield work
    finally:
        Decoder.hidden, FastViTHD.__call__ = real_hidden, real_tower  # type: ignore[method-assign]
