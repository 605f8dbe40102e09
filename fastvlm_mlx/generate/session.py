"""A conversation that computes nothing twice: turns, and the KV cache of what they share.

Each turn renders the whole transcript and compares it, position by position, with what the cache
holds; only what comes after the longest common prefix is prefilled. Positions are compared as
what they are: a token id, or one row of a picture with a given digest. So a picture counts as its
256 positions, another picture in its place is no match, and warm answers equal cold ones.

Knows no terminal and no files. The transcript changes only at the end of a whole turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.events import Finished, Generation, GenerationEvent
from fastvlm_mlx.generate.loop import rewind
from fastvlm_mlx.generate.options import AnswerOptions, ImageOptions, Picture, listed
from fastvlm_mlx.generate.pipeline import Pipeline
from fastvlm_mlx.model.fastvlm import EncodedImage
from fastvlm_mlx.prompt.processor import ImageSlot, Prompt, Segment, TextIds
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message
from fastvlm_mlx.sampling import GREEDY, Sampling

# What one embedding position is: a token id, or (digest, row) of a picture.
Position = int | tuple[str, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and the pictures in its slots."""

    message: Message
    images: tuple[EncodedImage, ...] = ()


class ChatSession:
    """One conversation. Use it from one thread, one answer at a time."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sampling: Sampling = GREEDY,
        system: str = DEFAULT_SYSTEM,
    ) -> None:
        self.sampling = sampling
        self._pipeline = pipeline
        self._turns: tuple[Turn, ...] = (Turn(Message("system", (system,))),)
        self._cache = pipeline.model.decoder.make_cache()
        self._held: list[Position] = []
        self._answering = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The transcript: the system message, then whole turns of question and answer."""
        return tuple(turn.message for turn in self._turns)

    def rewind(self, turns: int = 1) -> None:
        """Forget the last questions and their answers; what stays is not computed again.

        Raises PromptError if there are fewer.
        """
        past = len(self._turns) // 2
        if not 0 <= turns <= past:
            raise PromptError(f"cannot go back {turns} turns: the conversation has {past}")
        self._turns = self._turns[: len(self._turns) - 2 * turns]

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
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[GenerationEvent, None, None]:
        """Yield the answer to `text` and `images` after the turns so far.

        `sampling` overrides the session's for this turn. If the answer is cancelled, the generator
        closed early or an error raised, the transcript stays at the last whole turn. Raises
        PromptError if the conversation no longer fits the model's context, or while another answer
        of this session is being read; ImageError or FetchError for a picture.
        """
        if self._answering:
            raise PromptError("this conversation's last answer is still being read: close it first")
        options = AnswerOptions(
            sampling=sampling or self.sampling,
            max_tokens=max_tokens,
            stop=stop,
            cancelled=cancelled,
        )
        pictures = listed(images)
        pipeline, finished = self._pipeline, None
        self._answering = True
        generated: list[int] = []
        answer = ""
        try:
            clock = pipeline.start_clock(profile=profile)
            encoded = tuple(pipeline.encode(p, ImageOptions(), clock) for p in pictures)
            turn = Turn(user_message(text, len(encoded)), encoded)
            all_images = [image for t in (*self._turns, turn) for image in t.images]
            prompt = pipeline.processor.prompt([*self.messages, turn.message])
            positions = _positions(prompt, all_images)
            pipeline.require_room(len(positions))
            reused = self._rewind_to_common(positions)
            embeddings = pipeline.embed(*_after(prompt, all_images, reused))
            for event in pipeline.answer(
                embeddings, self._cache, prompt, options, clock, reused, generated.append
            ):
                if isinstance(event, Finished):
                    finished = event
                else:
                    answer += event.text
                    yield event
        finally:
            # One token fewer than were seen is certainly in the cache (see `loop.py`).
            if generated:
                self._held = [*positions, *generated[:-1]]
            rewind(self._cache, len(self._held))
            self._answering = False
        assert finished is not None
        if finished.finish_reason != "cancelled":
            self._turns = (*self._turns, turn, Turn(Message("assistant", (answer,))))
        yield finished

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
