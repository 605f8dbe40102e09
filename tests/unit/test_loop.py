from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.generate import loop
from fastvlm_mlx.generate.loop import generate_ids, prefill, rewind, score_ids
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.mlx_lm_parts import KVCache
from fastvlm_mlx.sampling import Sampling
from tests.unit.tiny_decoder import GREEDY, PROMPTS, embed, make_decoder

GREEDY_SAMPLING = Sampling()
LENGTH = len(PROMPTS[1])
EXPECTED: list[int] = GREEDY[1]["ids"]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def start(
    decoder: Decoder, cache: list[KVCache] | None = None, **options: Any
) -> Iterator[loop.Step]:
    """Generate after the longer prompt; by default greedily, 24 tokens, without stop ids."""
    options = {"sampling": GREEDY_SAMPLING, "max_tokens": 24, "stop_ids": (), **options}
    ids = options.pop("ids", PROMPTS[1])
    return generate_ids(decoder, embed(decoder, ids), cache or decoder.make_cache(), **options)


def ids_of(steps: Iterator[loop.Step]) -> list[int]:
    return [step.token_id for step in steps]


def offsets(cache: list[KVCache]) -> set[int]:
    return {layer.offset for layer in cache}


class Calls:
    """What was asked of the decoder and of the host, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Any]] = []
        for name in ("hidden", "logits"):
            self._wrap(monkeypatch, Decoder, name, lambda args: args[1].shape[1])
        for name in ("eval", "async_eval", "synchronize", "clear_cache"):
            self._wrap(monkeypatch, mx, name, lambda args: len(tree_flatten(args)))
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__iter__", "__index__"):
            if hasattr(mx.array, name):
                self._wrap(monkeypatch, mx.array, name, lambda args: None)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Any) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.log.append((name, note(args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    def lengths(self, name: str) -> list[int]:
        return [length for kind, length in self.log if kind == name]

    def host(self) -> list[str]:
        return [kind for kind, _ in self.log if kind not in ("hidden", "logits")]


# What comes out


@pytest.mark.parametrize("index", [0, 1])
def test_greedy_ids_and_logprobs_equal_transformers(decoder: Decoder, index: int) -> None:
    steps = list(start(decoder, ids=PROMPTS[index], logprobs=True))
    assert [step.token_id for step in steps] == GREEDY[index]["ids"]
    found = [step.logprob for step in steps]
    assert found == pytest.approx(GREEDY[index]["logprobs"], abs=1e-4)


def test_no_logprob_is_given_unless_asked_for(decoder: Decoder) -> None:
    assert {step.logprob for step in start(decoder, max_tokens=3)} == {None}


def test_half_precision_logprobs_are_of_its_own_choices(decoder: Decoder) -> None:
    half = make_decoder(dtype=mx.bfloat16)
    steps = list(start(half, max_tokens=4, logprobs=True))
    assert all(step.logprob is not None and step.logprob <= 0 for step in steps)
    assert [s.token_id for s in steps] == ids_of(start(half, max_tokens=4))


@pytest.mark.parametrize("step", [1, 7, 20, 39, 40, 41])
def test_a_chunked_prefill_equals_a_whole_one(decoder: Decoder, step: int) -> None:
    whole = decoder.logits(prefill(decoder, embed(decoder, PROMPTS[1]), decoder.make_cache()))
    cache = decoder.make_cache()
    chunked = decoder.logits(prefill(decoder, embed(decoder, PROMPTS[1]), cache, step=step))
    assert chunked.shape == (1, 1, 211)
    assert mx.abs(whole - chunked).max().item() <= 1e-5
    assert offsets(cache) == {LENGTH}
    assert ids_of(start(decoder, prefill_step=step)) == EXPECTED


def test_a_stop_id_is_the_last_token_yielded(decoder: Decoder) -> None:
    for stop in (EXPECTED[0], EXPECTED[5]):
        found = ids_of(start(decoder, stop_ids=frozenset({stop, 999})))
        assert found == EXPECTED[: EXPECTED.index(stop) + 1]


@pytest.mark.parametrize("max_tokens", [1, 2, 24])
def test_it_ends_after_max_tokens(decoder: Decoder, max_tokens: int) -> None:
    assert ids_of(start(decoder, max_tokens=max_tokens)) == EXPECTED[:max_tokens]


def test_impossible_requests_are_refused_before_anything_runs(decoder: Decoder) -> None:
    with pytest.raises(FastVLMError, match=r"^max_tokens must be >= 1, not 0$"):
        start(decoder, max_tokens=0)
    with pytest.raises(FastVLMError, match=r"^the prefill step must be >= 1, not 0$"):
        start(decoder, prefill_step=0)
    nothing = mx.zeros((1, 0, 64))
    with pytest.raises(PromptError, match="prompt is empty"):
        generate_ids(
            decoder, nothing, decoder.make_cache(), sampling=Sampling(), max_tokens=1, stop_ids=()
        )
    with pytest.raises(PromptError, match="prompt is empty"):
        score_ids(decoder, nothing, [1])


# Sampling


def test_a_seed_reproduces_an_answer_and_another_seed_does_not(decoder: Decoder) -> None:
    def sample(seed: int) -> list[int]:
        return ids_of(start(decoder, sampling=Sampling(temperature=1.5, seed=seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_two_seeded_answers_side_by_side_do_not_disturb_each_other(decoder: Decoder) -> None:
    """With MLX's global random state, each would eat the other's draws."""
    one, two = (Sampling(temperature=1.5, seed=seed) for seed in (1, 2))
    alone = ids_of(start(decoder, sampling=one))
    pairs = zip(start(decoder, sampling=one), start(decoder, sampling=two), strict=True)
    assert [first.token_id for first, _ in pairs] == alone


def test_the_repetition_penalty_sees_the_prompt_ids(decoder: Decoder) -> None:
    strong = Sampling(repetition_penalty=50.0)
    first, second = np.argsort(-first_logits(decoder))[:2].tolist()
    assert first == EXPECTED[0]
    without = ids_of(start(decoder, sampling=strong, max_tokens=1))
    seen = ids_of(start(decoder, sampling=strong, max_tokens=1, prompt_ids=[first]))
    assert (without, seen) == ([first], [second])
    free = ids_of(start(decoder, sampling=Sampling(repetition_penalty=50.0, repetition_context=24)))
    assert len(set(free)) == 24


def first_logits(decoder: Decoder) -> np.ndarray:
    hidden = prefill(decoder, embed(decoder, PROMPTS[1]), decoder.make_cache())
    return np.array(decoder.logits(hidden))[0, 0]


# What it costs


def test_the_prompt_is_one_pass_with_the_head_on_its_last_position(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm and mlx-vlm prefill all but one position, synchronise, and pass the last alone."""
    calls = Calls(monkeypatch)
    assert ids_of(start(decoder, max_tokens=1)) == EXPECTED[:1]
    assert calls.lengths("hidden") == [LENGTH]
    assert calls.lengths("logits") == [1]


@pytest.mark.parametrize("step", [1, 7, 20, 39, 40, 2048])
def test_a_long_prompt_takes_as_many_passes_as_it_has_chunks(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    calls = Calls(monkeypatch)
    ids_of(start(decoder, max_tokens=1, prefill_step=step))
    passes = math.ceil(LENGTH / step)
    assert len(calls.lengths("hidden")) == passes
    assert sum(calls.lengths("hidden")) == LENGTH
    assert calls.lengths("logits") == [1]
    before_the_first_token = calls.host()[: calls.host().index("async_eval")]
    assert before_the_first_token == ["eval", "clear_cache"] * (passes - 1)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_token_costs_one_dispatch_and_one_read(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, logprobs: bool
) -> None:
    """A log-probability is a second read, of a number computed along with its token."""
    calls = Calls(monkeypatch)
    sampling = Sampling(
        temperature=0.8, top_p=0.9, top_k=9, min_p=0.01, repetition_penalty=1.1, seed=3
    )
    options: dict[str, Any] = {"sampling": sampling, "prompt_ids": PROMPTS[1]}
    assert len(ids_of(start(decoder, max_tokens=10, logprobs=logprobs, **options))) == 10
    read = ["item"] * (2 if logprobs else 1)
    ahead = ["async_eval", *(["async_eval", *read] * 9), *read]
    # The last eval finds everything computed: it settles the cache.
    assert calls.host() == [*ahead, "eval"]
    assert set(calls.lengths("async_eval")) == {2 if logprobs else 1}


def test_the_next_step_is_dispatched_before_a_token_is_read(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    steps = start(decoder)
    next(steps)
    first = ["hidden", "logits", "async_eval"]
    assert [kind for kind, _ in calls.log] == [*first, *first, "item"]


def test_no_step_is_computed_after_the_last_of_max_tokens(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    ids_of(start(decoder, max_tokens=6))
    assert calls.lengths("hidden") == [LENGTH, 1, 1, 1, 1, 1]


def test_buffers_are_given_back_now_and_then(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_TOKENS_PER_CLEAR", 4)
    calls = Calls(monkeypatch)
    ids_of(start(decoder, max_tokens=13))
    assert calls.host().count("clear_cache") == 3


# What the cache holds afterwards


def test_a_generator_that_was_never_advanced_leaves_the_cache_alone(decoder: Decoder) -> None:
    cache = decoder.make_cache()
    start(decoder, cache).close()
    assert offsets(cache) == {0}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_closing_early_leaves_every_yielded_token_in_the_cache(
    decoder: Decoder, count: int
) -> None:
    cache = decoder.make_cache()
    steps = start(decoder, cache)
    found = ids_of(itertools.islice(steps, count))
    steps.close()
    assert found == EXPECTED[:count]
    assert offsets(cache) == {LENGTH + count}


def test_a_stop_id_is_in_the_cache_and_a_last_token_is_not(decoder: Decoder) -> None:
    cache = decoder.make_cache()
    ids_of(start(decoder, cache, stop_ids={EXPECTED[5]}))
    assert offsets(cache) == {LENGTH + EXPECTED.index(EXPECTED[5]) + 1}
    cache = decoder.make_cache()
    ids_of(start(decoder, cache, max_tokens=6))
    assert offsets(cache) == {LENGTH + 5}


@pytest.mark.parametrize("keep", [0, 4, 8])
def test_an_answer_closed_early_can_be_taken_up_anywhere(decoder: Decoder, keep: int) -> None:
    """Greedy warm equals greedy cold after rewinding to any token that was seen."""
    cache = decoder.make_cache()
    steps = start(decoder, cache)
    found = ids_of(itertools.islice(steps, 9))
    steps.close()
    rewind(cache, LENGTH + keep)
    again = start(decoder, cache, ids=[found[keep]])
    assert ids_of(itertools.islice(again, 24 - keep - 1)) == EXPECTED[keep + 1 :]


def test_a_new_turn_after_a_rewind_equals_a_fresh_start(decoder: Decoder) -> None:
    cache = decoder.make_cache()
    list(itertools.islice(start(decoder, cache), 5))
    rewind(cache, 20)
    warm = ids_of(start(decoder, cache, ids=PROMPTS[0]))
    assert warm == ids_of(start(decoder, ids=PROMPTS[1][:20] + PROMPTS[0]))
    assert warm != GREEDY[0]["ids"]


@pytest.mark.parametrize("at", range(1, 14))
def test_ctrl_c_anywhere_in_a_step_leaves_a_cache_that_can_go_on(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """An interrupt half-way through the layers leaves some of them one position longer."""
    cache = decoder.make_cache()
    steps = start(decoder, cache)
    found = ids_of(itertools.islice(steps, 3))
    countdown = itertools.count(1)
    norm = type(decoder.qwen2.model.norm)
    real = norm.__call__

    def interrupted(self: Any, x: mx.array) -> mx.array:
        if next(countdown) == at:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(norm, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for step in steps:
            found.append(step.token_id)
    monkeypatch.setattr(norm, "__call__", real)
    assert len(offsets(cache)) == 1
    kept = len(found) - 1
    rewind(cache, LENGTH + kept)
    again = ids_of(start(decoder, cache, ids=[found[-1]], max_tokens=24 - len(found)))
    assert found + again == EXPECTED


def test_the_cache_of_a_closed_answer_may_cross_threads(decoder: Decoder) -> None:
    """MLX refuses, in another thread, what this one has not evaluated."""
    cache = decoder.make_cache()
    steps = start(decoder, cache)
    next(steps)
    steps.close()
    results: list[Any] = []

    def read() -> None:
        try:
            results.append(sum(np.array(layer.keys).sum() for layer in cache))
        except Exception as error:
            results.append(error)
        mx.clear_streams()

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert isinstance(results[0], np.floating)


def test_rewinding_beyond_what_is_held_is_an_error(decoder: Decoder) -> None:
    cache = decoder.make_cache()
    prefill(decoder, embed(decoder, PROMPTS[0]), cache)
    with pytest.raises(ValueError, match="holds 7 positions, not 8"):
        rewind(cache, 8)
    rewind(cache, 7)
    assert offsets(cache) == {7}


# Scores


@pytest.mark.parametrize("prefill_step", [3, 2048])
@pytest.mark.parametrize("at_once", [5, 24, 128])
def test_scores_equal_transformers(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, prefill_step: int, at_once: int
) -> None:
    monkeypatch.setattr(loop, "_SCORED_AT_ONCE", at_once)
    prompt = embed(decoder, PROMPTS[1])
    scores = score_ids(decoder, prompt, EXPECTED, prefill_step=prefill_step)
    assert scores == pytest.approx(GREEDY[1]["logprobs"], abs=1e-4)


def test_scoring_runs_the_head_over_the_continuation_only(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_SCORED_AT_ONCE", 10)
    calls = Calls(monkeypatch)
    score_ids(decoder, embed(decoder, PROMPTS[1]), EXPECTED)
    assert calls.lengths("hidden") == [LENGTH, 23]
    assert calls.lengths("logits") == [10, 10, 4]


def test_scores_of_one_token_and_of_none(decoder: Decoder) -> None:
    prompt = embed(decoder, PROMPTS[1])
    logits = first_logits(decoder).astype(np.float64)
    expected = logits[7] - np.log(np.exp(logits).sum())
    assert score_ids(decoder, prompt, [7]) == pytest.approx([expected], abs=1e-5)
    assert score_ids(decoder, prompt, []) == []
