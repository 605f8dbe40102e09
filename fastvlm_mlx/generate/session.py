"""A conversation that computes nothing twice: turns, and the KV cache of what they share.

Each turn renders the whole transcript and compares it, position by position, with what the cache
holds; only what comes after the longest common prefix is prefilled. Positions are compared as
what they are: a token id, or one row of a picture with a given digest. So a picture counts as its
256 positions, another picture in its place is no match, and warm answers equal cold ones.

Knows no terminal and no files. State changes only at the end of a whole turn.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from fastvlm_mlx.events import Finished, Generation, GenerationEvent, TextDelta
from fastvlm_mlx.generate.loop import rewind
from fastvlm_mlx.generate.pipeline import AnswerOptions, Clock, ImageOptions, Picture, Pipeline
from fastvlm_mlx.model.fastvlm import EncodedImage
from fastvlm_mlx.prompt.processor import ImageSlot, Prompt, Segment, TextIds
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message
from fastvlm_mlx.sampling import GREEDY, Sampling

# What one embedding position is: a token id, or (digest, row) of a picture.
Position = int | tuple[str, int]


class ChatSession:
    """One conversation. Use it from one thread; it is not shared.

    `messages` is the transcript so far, whole turns only.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sampling: Sampling = GREEDY,
        system: str = DEFAULT_SYSTEM,
    ) -> None:
        self.sampling = sampling
        self.messages: tuple[Message, ...] = (Message("system", (system,)),)
        self._pipeline = pipeline
        self._images: tuple[EncodedImage, ...] = ()
        self._cache = pipeline.model.decoder.make_cache()
        self._held: list[Position] = []

    def ask(
        self,
        text: str,
        images: Sequence[Picture] = (),
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Answer one turn whole; the arguments and errors are `stream`'s."""
        return collect(
            self.stream(text, images, max_tokens=max_tokens, sampling=sampling, stop=stop)
        )

    def stream(
        self,
        text: str,
        images: Sequence[Picture] = (),
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        profile: bool = False,
    ) -> Generator[GenerationEvent, None, None]:
        """Yield the answer to `text` and `images` after the turns so far.

        `sampling` overrides the session's for this turn. If the generator is closed early or an
        error is raised, the transcript stays at the last whole turn. Raises PromptError if the
        conversation no longer fits the model's context.
        """
        clock = Clock(profile)
        pipeline = self._pipeline
        encoded = tuple(pipeline.encode(picture, ImageOptions(), clock) for picture in images)
        turn, all_images = user_message(text, len(encoded)), (*self._images, *encoded)
        prompt = pipeline.processor.prompt([*self.messages, turn])
        positions = _positions(prompt, all_images)
        pipeline.require_room(len(positions))
        reused = self._rewind_to_common(positions)
        suffix, suffix_images = _after(prompt, all_images, reused)
        options = AnswerOptions(
            sampling=sampling or self.sampling, max_tokens=max_tokens, stop=tuple(stop)
        )
        generated: list[int] = []
        answer = ""
        try:
            for event in pipeline.answer(
                pipeline.embed(suffix, suffix_images),
                self._cache,
                prompt,
                options,
                clock,
                reused=reused,
                on_token=generated.append,
            ):
                if isinstance(event, TextDelta):
                    answer += event.text
                else:
                    self.messages = (*self.messages, turn, Message("assistant", (answer,)))
                    self._images = all_images
                yield event
        finally:
            # One token fewer than were seen is certainly in the cache (see `loop.py`).
            if generated:
                self._held = [*positions, *generated[:-1]]
            rewind(self._cache, len(self._held))

    def _rewind_to_common(self, positions: Sequence[Position]) -> int:
        """Cut the cache to the prefix it shares with `positions`, less one; return its length."""
        shared = 0
        # At least one position must be prefilled, for its logits.
        for held, wanted in zip(self._held, positions[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        # A picture is spliced whole: never resume inside one.
        while _inside_picture(positions[shared]):
            shared -= 1
        self._held = self._held[:shared]
        rewind(self._cache, shared)
        return shared


def _inside_picture(position: Position) -> bool:
    return isinstance(position, tuple) and position[1] > 0


def collect(events: Generator[GenerationEvent, None, None]) -> Generation:
    """Run a stream to its end and return the whole answer."""
    text = ""
    ids: list[int] = []
    logprobs: list[float] = []
    for event in events:
        if isinstance(event, Finished):
            return Generation(
                text, tuple(ids), event.finish_reason, event.stats, logprobs=tuple(logprobs)
            )
        text += event.text
        ids += event.token_ids
        logprobs += event.logprobs
    raise RuntimeError("a generation ended without Finished")


def _positions(prompt: Prompt, images: Sequence[EncodedImage]) -> list[Position]:
    """Return what each embedding position of the prompt is."""
    positions: list[Position] = []
    remaining = iter(images)
    for segment in prompt.segments:
        if isinstance(segment, TextIds):
            positions += segment.ids
        else:
            image = next(remaining)
            positions += [(image.digest, row) for row in range(image.features.shape[0])]
    return positions


def _after(
    prompt: Prompt, images: Sequence[EncodedImage], start: int
) -> tuple[Prompt, tuple[EncodedImage, ...]]:
    """Return the prompt's segments from position `start` on, and the pictures among them."""
    segments: list[Segment] = []
    kept: list[EncodedImage] = []
    remaining = iter(images)
    at = 0
    for segment in prompt.segments:
        if isinstance(segment, ImageSlot):
            image = next(remaining)
            if at >= start:
                segments.append(segment)
                kept.append(image)
            at += image.features.shape[0]
        else:
            ids = segment.ids[max(0, start - at) :]
            if ids:
                segments.append(replace(segment, ids=ids))
            at += len(segment.ids)
    return Prompt(tuple(segments)), tuple(kept)
