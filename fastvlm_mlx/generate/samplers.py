"""From logits to the next token id: penalty, filters and the draw, all lazy.

Knows `Sampling` and which of mlx-lm's functions does what. Knows no model, no text and no loop;
never evaluates an array, so that the next step can be dispatched before this one is read.

The order is mlx-lm's: repetition penalty on the logits, normalised float32 log-probabilities,
top-p, min-p, top-k, then the temperature and the draw. (transformers applies the temperature
before the filters, so the same top-p keeps another set there when the temperature is not 1.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from fastvlm_mlx.model.mlx_lm_parts import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
)
from fastvlm_mlx.sampling import Sampling

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]

# Below this the draw is the most likely token anyway, and 1 / temperature would leave float32.
_SMALLEST_TEMPERATURE = 1e-30


def make_parts(sampling: Sampling, vocab_size: int) -> tuple[Sampler, list[Processor]]:
    """Return the draw (scores [1,V] to ids [1]) and the logits processors (ids [n], [1,V]).

    Greedy takes the largest of whatever scores it is given, logits or log-probabilities; every
    other draw expects normalised float32 log-probabilities. A `top_k` of `vocab_size` or more
    keeps every token, as it says; mlx-lm's own function would raise.

    With a seed, the draws depend on nothing else and leave MLX's global random state alone; they
    equal mlx-lm's after `mx.random.seed(seed)`. Without one they come from that global state,
    of which MLX keeps one a thread.
    """
    penalty = None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
    processors = make_logits_processors(
        repetition_penalty=penalty, repetition_context_size=sampling.repetition_context
    )
    if sampling.greedy:
        return _most_likely, processors
    return _make_draw(sampling, vocab_size), processors


def _most_likely(scores: mx.array) -> mx.array:
    return mx.argmax(scores, axis=-1)


def _make_draw(sampling: Sampling, vocab_size: int) -> Sampler:
    key = None if sampling.seed is None else mx.random.key(sampling.seed)
    inverse = 1 / max(sampling.temperature, _SMALLEST_TEMPERATURE)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < vocab_size:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        if key is None:
            return mx.random.categorical(logprobs * inverse)
        # The same split as MLX's global state does for each draw.
        pair = mx.random.split(key)
        key = pair[0]
        return mx.random.categorical(logprobs * inverse, key=pair[1])

    return draw


class Chooser:
    """Chooses one token after another for one answer; remembers the latest ids for the penalty.

    `prompt_ids` are the text ids before the answer; pictures have none and are not penalised.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocab_size: int,
        prompt_ids: Sequence[int] = (),
        logprobs: bool = False,
    ) -> None:
        self._draw, self._processors = make_parts(sampling, vocab_size)
        self._greedy = sampling.greedy
        self._logprobs = logprobs
        self._context = sampling.repetition_context
        self._latest = mx.array(list(prompt_ids[-self._context :]), dtype=mx.uint32)

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """Take logits [1,V]; return the id [1] and its float32 log-probability [1] or None.

        The log-probability is the model's, after the penalty, before filters and temperature.
        Greedy normalises nothing unless log-probabilities are wanted.
        """
        scores = logits
        if self._processors:
            # mlx-lm's processors write into the array they are given.
            scores = mx.array(scores.astype(mx.float32))
            for process in self._processors:
                scores = process(self._latest, scores)
        if not self._greedy or self._logprobs:
            scores = normalise(scores)
        token = self._draw(scores)
        if self._processors:
            self._latest = mx.concatenate([self._latest, token])[-self._context :]
        if not self._logprobs:
            return token, None
        return token, mx.take_along_axis(scores, token[:, None], axis=-1)[:, 0]


def normalise(logits: mx.array) -> mx.array:
    """Logits [...,V] of any float dtype to float32 log-probabilities [...,V]."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
