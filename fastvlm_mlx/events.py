"""What a generation reports: text as it appears, the end and why, the time it took.

Plain values without arrays, so they may cross threads and be serialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Times in milliseconds, sizes in bytes, counts in embedding positions (prompt) or tokens.

    The stage times are None unless the call was profiled (each stage is then fenced, which slows
    the whole down): reading and decoding the pictures, fitting them to the model's size, tower,
    projector, rendering and splicing the prompt, the decoder's layers over it, and its head with
    the choice of the first token. `ttft_ms` is from the call to the first token id on the host,
    unfenced; it is None in a profiled run or if no token came, and in a process's first call it
    includes warm-up. `decode_tps` is tokens per second after the first. `prompt_tokens` counts the
    whole prompt, of which the first `reused_tokens` were in the KV cache already; `encoded_images`
    counts the pictures that went through the tower, those reused by digest left out. A beam search
    knows its first token only at its end: `ttft_ms` and `prefill_ms` are then the whole search's,
    `first_token_ms` is 0 and `decode_tps` None.
    """

    image_decode_ms: float | None
    preprocess_ms: float | None
    vision_ms: float | None
    projector_ms: float | None
    prompt_ms: float | None
    prefill_ms: float | None
    first_token_ms: float | None
    ttft_ms: float | None
    decode_tps: float | None
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    encoded_images: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """One token's id and the text that became certain with it: whole characters, often none."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnsDropped:
    """Before the answer: the conversation outgrew the context, and its oldest turns go.

    `turns` counts questions with their answers, `images` the pictures in them. They are gone once
    this answer is part of the conversation, and still there if it is cancelled or fails.
    """

    turns: int
    images: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation."""

    finish_reason: FinishReason
    stats: Stats


GenerationEvent = TextDelta | Finished
ChatEvent = TextDelta | TurnsDropped | Finished


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. `text` excludes stop tokens and stop strings; `token_ids` is every id
    generated, the stop id included; `logprobs` is empty unless asked for; `dropped_turns` is how
    many of a conversation's oldest turns had to go."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[float, ...] = ()
    dropped_turns: int = 0
