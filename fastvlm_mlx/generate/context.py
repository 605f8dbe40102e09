"""A transcript in embedding positions: what each one is, which turns still fit, what is left to do.

Knows prompts, pictures' sizes and the context's limit. Knows no KV arrays and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastvlm_mlx.errors import ContextFull
from fastvlm_mlx.generate.cache import Position
from fastvlm_mlx.generate.transcript import Turn
from fastvlm_mlx.model.fastvlm import ShownImage
from fastvlm_mlx.prompt.processor import ImageSlot, Processor, Prompt, Segment, TextIds
from fastvlm_mlx.prompt.template import IM_START

Overflow = Literal["refuse", "drop"]

# Room kept for an answer, and what is used once turns have been dropped, as shares of the context:
# dropping a quarter at once makes the prefill of all the rest rare.
_ANSWER_SHARE = 1 / 4
_USED_AFTER_DROP = 3 / 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """The turns that are read, the prompt they make, and what each of its positions is."""

    turns: tuple[Turn, ...]
    prompt: Prompt
    positions: list[Position]

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """All pictures, in order."""
        return tuple(image for turn in self.turns for image in turn.images)


def lay_out(
    processor: Processor, turns: Sequence[Turn], *, generation_prompt: bool = True
) -> Fitted:
    """Return the prompt of all turns, position by position."""
    prompt = processor.prompt([turn.message for turn in turns], generation_prompt=generation_prompt)
    positions: list[Position] = []
    images = (image for turn in turns for image in turn.images)
    for segment in prompt.segments:
        if isinstance(segment, TextIds):
            positions += segment.ids
        else:
            image = next(images)
            positions += [(image.digest, row) for row in range(image.positions)]
    return Fitted(tuple(turns), prompt, positions)


def fit(
    processor: Processor, turns: Sequence[Turn], *, limit: int, max_tokens: int, overflow: Overflow
) -> Fitted:
    """Return the turns that fit `limit` positions: all of them, or none but the latest dropped.

    `turns` are the system's, then questions and answers in pairs, then the new question. With
    overflow "drop", room for `max_tokens` (at most a quarter of the context) is made by leaving
    out the oldest pairs, whole, down to three quarters of the context if the question leaves that
    much. With "refuse" an answer needs one position of room. Raises ContextFull if there is none.
    """
    whole = lay_out(processor, turns)
    used = len(whole.positions)
    answer = min(max_tokens, int(limit * _ANSWER_SHARE))
    pairs = (len(turns) - 2) // 2
    if overflow == "drop" and used + answer > limit and pairs:
        starts = _message_starts(processor, whole.positions)
        # An empty system message is not rendered.
        first = len(starts) - (len(turns) - 1)
        freed = [starts[first + 2 * n] - starts[first] for n in range(1, pairs + 1)]
        wanted = used + answer - limit * _USED_AFTER_DROP
        if freed[-1] < wanted:  # the question alone is longer: keep what can be kept
            wanted = min(used + answer - limit, freed[-1])
        dropped = 1 + next(n for n, positions in enumerate(freed) if positions >= wanted)
        whole = lay_out(processor, (turns[0], *turns[1 + 2 * dropped :]))
    used = len(whole.positions)
    if used >= limit:
        raise ContextFull(_no_room(whole, used, limit, overflow))
    return whole


def certain_length(processor: Processor, fitted: Fitted) -> int:
    """Return how many positions no text of the last question can change.

    They end with its last picture, or with the token that begins its message: what follows is
    tokenized together with the text.
    """
    rows = (at for at, p in enumerate(fitted.positions) if isinstance(p, tuple))
    return max(_message_starts(processor, fitted.positions)[-1], *rows, 0) + 1


def _message_starts(processor: Processor, positions: Sequence[Position]) -> list[int]:
    """Return where each message begins, by its control token, which no typed text can hold.

    Where the answer begins is none of them.
    """
    start = processor.tokenizer.control_id(IM_START.token)
    return [i for i, position in enumerate(positions) if position == start][:-1]


def no_room(used: int, limit: int) -> str:
    """Say that a prompt does not fit, and what would help."""
    return (
        f"the prompt takes {used} positions, the model has {limit}: "
        "shorten it, or give fewer pictures or a lower resolution"
    )


def _no_room(whole: Fitted, used: int, limit: int, overflow: Overflow) -> str:
    if len(whole.turns) <= 2:
        return no_room(used, limit)
    advice = "go back some turns, drop a picture"
    if overflow == "refuse":
        advice += ", or let the oldest turns be dropped (overflow drop)"
    return f"the conversation takes {used} positions with this question, of {limit}: {advice}"


def after(fitted: Fitted, start: int) -> tuple[Prompt, tuple[ShownImage, ...]]:
    """Return the prompt's segments from position `start` on, and the pictures among them.

    `start` is not inside a picture.
    """
    segments: list[Segment] = []
    kept: list[ShownImage] = []
    images = iter(fitted.images)
    at = 0
    for segment in fitted.prompt.segments:
        if isinstance(segment, ImageSlot):
            image = next(images)
            if at >= start:
                segments.append(segment)
                kept.append(image)
            at += image.positions
        else:
            ids = segment.ids[max(0, start - at) :]
            if ids:
                segments.append(replace(segment, ids=ids))
            at += len(segment.ids)
    return Prompt(tuple(segments)), tuple(kept)
