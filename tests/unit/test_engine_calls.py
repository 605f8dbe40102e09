"""What one call of the engine asks of the decoder and of the host, counted from path to answer.

`test_loop.py` counts the loop alone; here nothing between it and the user may add a pass or a wait.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.graph_trace import host_calls
from fastvlm_mlx.bench.results import STAGES
from fastvlm_mlx.engine import Engine, load
from fastvlm_mlx.events import Finished
from fastvlm_mlx.generate import pipeline
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.fastvlm import pixel_sample
from tests.parity import frozen

QUESTION = "What is in the picture?"
# `item` reads a token that is already being computed; everything else here stops until it is.
WAITS = {"eval", "item", "tolist", "synchronize", "__bool__", "__int__", "__float__", "__iter__"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("demo", feature_cache_bytes=0)  # each call is to run the tower


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The decoder's calls in order, each with the number of positions it was given."""
    log: list[tuple[str, int]] = []
    for name in ("hidden", "logits"):
        real = getattr(Decoder, name)

        def watched(self, states, *rest, _name=name, _real=real, **how):  # type: ignore[no-untyped-def]
            log.append((_name, states.shape[1]))
            return _real(self, states, *rest, **how)

        monkeypatch.setattr(Decoder, name, watched)
    yield log


def picture(seed: int = 1) -> np.ndarray:
    return frozen.picture(200, 256, seed)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_prompt_is_one_decoder_pass_with_the_head_on_one_position(
    engine: Engine, passes: list[tuple[str, int]], images: int
) -> None:
    """mlx-vlm computes logits for every position of a prompt it does not chunk; mlx-lm and
    mlx-vlm prefill all but one position and then run the decoder again for the last."""
    pictures = [picture(seed) for seed in range(images)]
    answer = engine.generate(QUESTION, images=pictures, max_tokens=4)
    assert passes[:2] == [("hidden", answer.stats.prompt_tokens), ("logits", 1)]
    assert passes[2:] == [("hidden", 1), ("logits", 1)] * (len(answer.token_ids) - 1)
    assert answer.stats.prompt_tokens > 16 * images


def test_nothing_waits_between_the_picture_and_the_first_token(engine: Engine) -> None:
    """mlx-vlm evaluates twice and reads token ids back (item, tolist) to place a picture."""
    with host_calls() as calls:
        stream = engine.stream(QUESTION, images=[picture()], max_tokens=4)
        next(stream)
    # Features dispatched, the prompt dispatched, the next step dispatched, the first id read.
    assert calls == ["async_eval", "async_eval", "async_eval", "item"]
    stream.close()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_whole_answer_costs_one_dispatch_and_one_read_a_token(
    engine: Engine, images: int
) -> None:
    pictures = [picture(seed) for seed in range(images)]
    with host_calls() as calls:
        events = list(engine.stream(QUESTION, images=pictures, max_tokens=6))
    assert isinstance(events[-1], Finished)
    tokens = events[-1].stats.generated_tokens
    ahead = events[-1].finish_reason == "stop"  # one step was under way behind the stop id
    assert tokens >= 2
    assert calls.count("item") == tokens
    assert calls.count("async_eval") == images + tokens + ahead
    # The last eval settles the cache, which is computed by then.
    assert [name for name in calls if name in WAITS] == ["item"] * tokens + ["eval"]
    assert calls[-1] == "eval"


def test_an_encoded_picture_costs_nothing_again(engine: Engine) -> None:
    encoded = engine.encode(picture())
    with host_calls() as calls:
        stream = engine.stream(QUESTION, images=[encoded], max_tokens=4)
        next(stream)
    assert calls == ["async_eval", "async_eval", "item"]
    stream.close()


def test_a_profiled_call_is_the_one_that_waits(engine: Engine) -> None:
    with host_calls() as calls:
        stream = engine.stream(QUESTION, images=[picture()], max_tokens=4, profile=True)
        next(stream)
    assert calls[: calls.index("async_eval")] == ["eval", "eval"]
    stream.close()


def test_pixels_reach_the_tower_as_bytes(engine: Engine) -> None:
    """Other ports upload float32 pixels, four times the bytes, and transpose them back there."""
    seen: list[tuple[tuple[int, ...], mx.Dtype]] = []
    tower = type(engine.pipeline.model.vision)
    real = tower.__call__

    def watched(self, pixels: mx.array) -> mx.array:  # type: ignore[no-untyped-def]
        seen.append((tuple(pixels.shape), pixels.dtype))
        return real(self, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "__call__", watched)
        engine.encode(picture())
    assert seen == [((1, 256, 256, 3), mx.uint8)]


def test_a_new_picture_is_dispatched_before_it_is_hashed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing 3 MB came first and held the tower up for 3 to 5 ms."""
    order: list[str] = []
    dispatch, digest = mx.async_eval, pipeline.pixel_digest
    monkeypatch.setattr(mx, "async_eval", lambda *a: (order.append("tower"), dispatch(*a))[1])
    monkeypatch.setattr(pipeline, "pixel_digest", lambda p: (order.append("hash"), digest(p))[1])
    engine.encode(picture(7))
    assert order == ["tower", "hash"]


def test_a_picture_whose_sample_is_known_is_hashed_first_and_compared_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remembering = load("demo")
    first = np.zeros((256, 256, 3), np.uint8)
    other = first.copy()
    other[1, 1] = 255  # between the pixels of the sample
    assert pixel_sample(first) == pixel_sample(other)
    encoded = [remembering.encode(pixels) for pixels in (first, other, first)]
    assert encoded[0].digest == encoded[2].digest != encoded[1].digest
    assert not mx.allclose(encoded[0].features, encoded[1].features)
    cache = remembering.image_features
    assert (cache.hits, cache.misses, len(cache)) == (1, 2, 2)


def test_stages_of_a_profiled_call_come_in_order_and_each_is_waited_for(engine: Engine) -> None:
    stats = engine.generate(QUESTION, images=[picture()], max_tokens=2, profile=True).stats
    assert all(getattr(stats, stage) > 0 for stage in STAGES)
    with host_calls() as calls:
        stream = engine.stream(QUESTION, images=[picture()], max_tokens=2, profile=True)
        next(stream)
    # vision, projector, prompt, prefill; the head's one wait is for the token's id
    assert calls.count("eval") == 4
    stream.close()
