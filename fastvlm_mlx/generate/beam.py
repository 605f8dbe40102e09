"""Beam search, as transformers' `generate(num_beams=k, do_sample=False, early_stopping=False)`.

Knows one prompt, k beams, stop ids. Knows no sampling; nothing streams, since the best beam is
only known at the end.

The search, as transformers 5.23 (`GenerationMixin._beam_search`) defines it: in each step the best
continuations of all running beams are ranked by summed log-probability. Those that end (a stop
id, or max_tokens reached) enter the pool of finished answers if they rank among the first k, with
score sum / length^length_penalty, where length counts the generated tokens, the stop id included;
the pool keeps its best k. The best k that do not end run on. The search is over when the pool is
full and the best running beam, scored at its present length, does not beat the pool's worst.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generate.loop import prefill
from fastvlm_mlx.generate.samplers import normalise
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.mlx_lm_parts import KVCache


@dataclass(frozen=True, slots=True)
class _Beam:
    """Ids so far and their score: summed log-probability while running, per length^p after."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A running beam's index (`parent`), the token after it, and the sum with that token."""

    parent: int
    token_id: int
    score: float


def beam_search(
    decoder: Decoder,
    embeddings: mx.array,
    *,
    num_beams: int,
    max_tokens: int,
    stop_ids: Collection[int],
    length_penalty: float = 1.0,
    prefill_step: int = 2048,
) -> tuple[int, ...]:
    """Return the ids of the best answer to the prompt embeddings [1,n,H], its stop id included.

    The prompt is prefilled once; from then on a step runs `num_beams` rows over a cache whose
    rows follow their beams. Raises FastVLMError if `num_beams` is below 2 (1 is greedy, which is
    the loop's work) or too many for the vocabulary, or `max_tokens` below 1; PromptError if there
    is nothing to prefill.
    """
    # So many that, whatever ends, num_beams of them run on.
    width = num_beams * (1 + max(1, len(stop_ids)))
    _check(num_beams, max_tokens, width, decoder.config.vocab_size)
    cache = decoder.make_cache()
    hidden = prefill(decoder, embeddings, cache, step=prefill_step)
    running, finished = [_Beam((), 0.0)], list[_Beam]()
    for length in range(1, max_tokens + 1):
        logits = decoder.logits(hidden)[:, -1]
        candidates = _rank(logits, [beam.score for beam in running], width)
        ended, going = _part(candidates, stop_ids, num_beams, last=length == max_tokens)
        finished += [
            _Beam((*running[c.parent].ids, c.token_id), c.score / length**length_penalty)
            for c in ended
        ]
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        if not going or _settled(finished, going[0].score / length**length_penalty, num_beams):
            break
        running = [_Beam((*running[c.parent].ids, c.token_id), c.score) for c in going]
        _reorder(cache, [c.parent for c in going])
        tokens = mx.array([[c.token_id] for c in going])
        hidden = decoder.hidden(decoder.embed(tokens), cache)
    return finished[0].ids


def _check(num_beams: int, max_tokens: int, width: int, vocab_size: int) -> None:
    if num_beams < 2:
        raise FastVLMError(f"beam search needs 2 or more beams, not {num_beams}; 1 is greedy")
    if width > vocab_size:
        raise FastVLMError(f"{num_beams} beams are too many for {vocab_size} tokens; use fewer")
    if max_tokens < 1:
        raise FastVLMError(f"max_tokens must be >= 1, not {max_tokens}")


def _rank(logits: mx.array, scores: list[float], width: int) -> list[_Candidate]:
    """Return the best `width` continuations, best first. Logits [k,V], a running sum a row."""
    sums = normalise(logits) + mx.array(scores)[:, None]
    vocab_size = sums.shape[-1]
    sums = sums.reshape(-1)
    best = mx.argpartition(-sums, kth=width - 1)[:width]
    values = sums[best]
    mx.eval(best, values)
    indices, sums_kept = cast(list[int], best.tolist()), cast(list[float], values.tolist())
    ranked = sorted(zip(indices, sums_kept, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [_Candidate(index // vocab_size, index % vocab_size, value) for index, value in ranked]


def _part(
    candidates: list[_Candidate], stop_ids: Collection[int], num_beams: int, *, last: bool
) -> tuple[list[_Candidate], list[_Candidate]]:
    """Part ranked candidates into those that end among the first k, and the best k that go on."""
    ended = [c for c in candidates[:num_beams] if last or c.token_id in stop_ids]
    going = [c for c in candidates if not last and c.token_id not in stop_ids]
    return ended, going[:num_beams]


def _settled(finished: list[_Beam], best_running: float, num_beams: int) -> bool:
    """Say whether the pool is full and no running beam, scored as if it ended now, beats it."""
    return len(finished) == num_beams and best_running <= finished[-1].score


def _reorder(cache: list[KVCache], parents: list[int]) -> None:
    """Give row i of every layer the content of row parents[i]; the number of rows may change."""
    if parents == list(range(cache[0].keys.shape[0])):
        return
    rows = mx.array(parents)
    for layer in cache:
        layer.keys = mx.take(layer.keys, rows, axis=0)
        layer.values = mx.take(layer.values, rows, axis=0)
