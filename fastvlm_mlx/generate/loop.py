"""Prefill and decode: embeddings in, token ids out, one step ahead of the reader.

Knows the decoder's face, KV caches and stop ids. Knows no text, no pictures and no chat turns.

The prompt is one pass with the head on its last position, or ceil(n / prefill_step) passes if it
is longer than `prefill_step`. Step n+1 is dispatched before token n is read on the host, which is
the only synchronisation a token costs.

What the cache holds. Let `start` be its length before the call, n the prompt's positions and k
the tokens yielded so far:
- ended by a stop id, or closed by the consumer after k >= 1 tokens, k < max_tokens: every layer
  holds start + n + k positions (the step in flight had taken the k-th token in) and is evaluated;
- ended by max_tokens: start + n + k - 1, as no step follows the last token;
- never advanced: start, untouched;
- cancelled during prefill, so ended with k = 0: start + the chunks that were done, evaluated;
- an exception inside (Ctrl-C): all layers have one length; the first start + n + k - 1 positions
  are right (the first `start` if k is 0), a later one may not be.
So start + n + k - 1 positions may always be kept once a token was seen: `rewind(cache, that)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.generate.samplers import Chooser, normalise
from fastvlm_mlx.model.decoder import Decoder, KVLayer
from fastvlm_mlx.sampling import Sampling

# A growing cache leaves buffers of every size it has had in MLX's pool; mlx-lm empties it as often.
_TOKENS_PER_CLEAR = 256
# Positions whose logits `logprobs_along` holds at once: 128 x 152k x float32 is 78 MB.
_SCORED_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token; `logprob` is its float32 log-probability, or None if not asked for."""

    token_id: int
    logprob: float | None = None


class Cancelled(Exception):
    """Prefill was told to stop between two passes."""


def generate_ids(
    decoder: Decoder,
    embeddings: mx.array,
    cache: list[KVLayer],
    *,
    prompt_ids: Sequence[int] = (),
    sampling: Sampling,
    max_tokens: int,
    stop_ids: Collection[int],
    prefill_step: int = 2048,
    logprobs: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    prefilled: Callable[[mx.array], None] = lambda _hidden: None,
) -> Generator[Step, None, None]:
    """Continue `cache` with embeddings [1,n,H]; yield tokens up to and including a stop id.

    `prompt_ids` feed the repetition penalty only. `cancelled` is asked before each pass of the
    prompt; if it says so, no token comes. `prefilled` gets the last state [1,1,H], lazy, before
    the head runs on it. Nothing runs before the first `next`. Advance and close the generator in
    one thread; the module's docstring says what `cache` then holds.
    Raises FastVLMError if `max_tokens` is below 1, PromptError if there is nothing to prefill.
    """
    if max_tokens < 1:
        raise FastVLMError(f"max_tokens must be >= 1, not {max_tokens}")
    _check(embeddings, prefill_step)

    def steps() -> Generator[Step, None, None]:
        chooser = Chooser(
            sampling,
            vocab_size=decoder.config.vocab_size,
            prompt_ids=prompt_ids,
            logprobs=logprobs,
        )
        try:
            try:
                hidden = prefill(decoder, embeddings, cache, step=prefill_step, cancelled=cancelled)
            except Cancelled:
                return
            prefilled(hidden)
            token, logprob = _choose(decoder, chooser, hidden)
            for count in range(1, max_tokens + 1):
                this, this_logprob = token, logprob
                if count < max_tokens:
                    hidden = decoder.hidden(decoder.embed(token[:, None]), cache)
                    token, logprob = _choose(decoder, chooser, hidden)
                token_id = cast(int, this.item())
                # Evaluated along with its token, so this reads without waiting.
                value = None if this_logprob is None else cast(float, this_logprob.item())
                yield Step(token_id, value)
                if token_id in stop_ids:
                    return
                if count % _TOKENS_PER_CLEAR == 0:
                    mx.clear_cache()
        finally:
            _settle(cache)

    return steps()


def prefill(
    decoder: Decoder,
    embeddings: mx.array,
    cache: list[KVLayer],
    *,
    step: int = 2048,
    cancelled: Callable[[], bool] = lambda: False,
) -> mx.array:
    """Run embeddings [B,n,H] through the layers into `cache`; return the last state [B,1,H], lazy.

    One pass if n <= step; else chunks, each evaluated before the next is built, so that the
    activations of one chunk only are alive. Raises PromptError if n is 0, Cancelled if `cancelled`
    says so before a pass: the passes before it are in the cache.
    """
    _check(embeddings, step)
    length = embeddings.shape[1]
    last = (length - 1) // step * step
    for start in range(0, last, step):
        if cancelled():
            raise Cancelled
        decoder.hidden(embeddings[:, start : start + step], cache)
        _evaluate(cache)
        mx.clear_cache()
    if cancelled():
        raise Cancelled
    return decoder.hidden(embeddings[:, last:], cache, last_only=True)


def logprobs_along(
    decoder: Decoder,
    embeddings: mx.array,
    continuation_ids: Sequence[int],
    *,
    prefill_step: int = 2048,
) -> Iterator[mx.array]:
    """Yield the float32 log-probabilities [m,V] that precede each id after embeddings [1,n,H].

    Row i of all rows is log p(· | prompt, the first i ids), natural logarithms. The head runs over
    the continuation's positions only, `_SCORED_AT_ONCE` at a time: m is at most that.
    Raises PromptError if there is nothing to prefill.
    """
    _check(embeddings, prefill_step)
    if not continuation_ids:
        return
    cache = decoder.make_cache()
    states = [prefill(decoder, embeddings, cache, step=prefill_step)]
    inputs = list(continuation_ids[:-1])
    for start in range(0, len(inputs), prefill_step):
        ids = mx.array([inputs[start : start + prefill_step]])
        states.append(decoder.hidden(decoder.embed(ids), cache))
        mx.eval(states[-1])
    hidden = mx.concatenate(states, axis=1)
    for start in range(0, len(continuation_ids), _SCORED_AT_ONCE):
        yield normalise(decoder.logits(hidden[:, start : start + _SCORED_AT_ONCE]))[0]


def score_ids(
    decoder: Decoder,
    embeddings: mx.array,
    continuation_ids: Sequence[int],
    *,
    prefill_step: int = 2048,
) -> list[float]:
    """Return log p(id | prompt, ids before it) for each id after the prompt embeddings [1,n,H].

    Natural logarithms of float32 probabilities; the sum is the continuation's log-probability.
    Raises PromptError if there is nothing to prefill.
    """
    scores: list[float] = []
    for rows in logprobs_along(decoder, embeddings, continuation_ids, prefill_step=prefill_step):
        targets = mx.array(list(continuation_ids[len(scores) : len(scores) + len(rows)]))
        chosen = mx.take_along_axis(rows, targets[:, None], axis=-1).reshape(-1)
        scores += cast(list[float], chosen.tolist())
    return scores


def rewind(cache: Sequence[KVLayer], positions: int) -> None:
    """Keep the first `positions` positions of every layer; later ones are forgotten, not freed.

    Raises ValueError if a layer holds fewer.
    """
    if any(layer.offset < positions for layer in cache):
        held = min(layer.offset for layer in cache)
        raise ValueError(f"the cache holds {held} positions, not {positions}")
    for layer in cache:
        layer.trim(layer.offset - positions)


def _choose(
    decoder: Decoder, chooser: Chooser, hidden: mx.array
) -> tuple[mx.array, mx.array | None]:
    """Choose after state [1,1,H] and start computing the choice; nothing is waited for."""
    token, logprob = chooser(decoder.logits(hidden)[:, -1])
    mx.async_eval(token if logprob is None else (token, logprob))
    return token, logprob


def _check(embeddings: mx.array, step: int) -> None:
    if embeddings.shape[1] == 0:
        raise PromptError("the prompt is empty: there is nothing to answer")
    if step < 1:
        raise FastVLMError(f"the prefill step must be >= 1, not {step}")


def _evaluate(cache: Sequence[KVLayer]) -> None:
    mx.eval([layer.state for layer in cache])


def _settle(cache: Sequence[KVLayer]) -> None:
    """Leave no half-built step: all layers equally long (Ctrl-C may part them) and evaluated."""
    rewind(cache, min(layer.offset for layer in cache))
    _evaluate(cache)
