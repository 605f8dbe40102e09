"""The engine on the demo model: splicing, slots, events, reuse, limits."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.bench.results import STAGES
from fastvlm_mlx.errors import ConfigError, FastVLMError, MemoryLimitError, PromptError
from fastvlm_mlx.generate.clock import Clock
from fastvlm_mlx.generate.options import ImageOptions
from fastvlm_mlx.model.fastvlm import pixel_digest
from fastvlm_mlx.prompt.processor import ImageSlot, Prompt, TextIds
from fastvlm_mlx.prompt.template import IMAGE, Message, user_message


def picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    return blocks.repeat(16, axis=0).repeat(16, axis=1)


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo", feature_cache_bytes=0)  # each call is to run the tower


def greedy(engine: fv.Engine, prompt: str, *pictures: object, tokens: int = 12) -> tuple[int, ...]:
    return engine.generate(prompt, images=list(pictures), max_tokens=tokens).token_ids


def test_an_encoded_image_answers_like_the_picture_itself(engine: fv.Engine) -> None:
    encoded = engine.encode(picture(1))
    hidden = engine.config.decoder.hidden_size
    assert encoded.features.shape == (16, hidden)
    assert greedy(engine, "What is this?", encoded) == greedy(engine, "What is this?", picture(1))


def test_the_digest_names_pixels_and_shape(engine: fv.Engine) -> None:
    assert engine.encode(picture(1)).digest == engine.encode(Image.fromarray(picture(1))).digest
    assert engine.encode(picture(1)).digest != engine.encode(picture(2)).digest
    assert engine.encode(picture(1)).digest != engine.encode(picture(1), image_mode="crop").digest
    flat = np.zeros((2, 8, 3), np.uint8)
    assert pixel_digest(flat) != pixel_digest(flat.reshape(4, 4, 3))


@pytest.mark.parametrize(
    "content",
    [
        ("just text",),
        (IMAGE, "\ntext"),
        ("text before ", IMAGE),
        (IMAGE, IMAGE),
        (IMAGE, "\n", IMAGE, "\ntext"),
        ("a", IMAGE, "b", IMAGE, "c", IMAGE, "d"),
    ],
)
def test_every_slot_gets_its_own_picture_at_its_own_place(
    engine: fv.Engine, content: tuple[object, ...]
) -> None:
    """A port used split sizes as positions: its second picture landed one token late."""
    pipeline = engine.pipeline
    prompt = pipeline.processor.prompt([Message("user", content)])  # type: ignore[arg-type]
    images = [engine.encode(picture(seed)) for seed in range(prompt.slot_count)]
    embeddings = np.array(pipeline.embed(prompt, images)[0])
    at, seen = 0, 0
    for segment in prompt.segments:
        if isinstance(segment, ImageSlot):
            expected = np.array(images[seen].features)
            seen += 1
        else:
            expected = np.array(pipeline.model.decoder.embed(mx.array([segment.ids]))[0])
        assert np.array_equal(embeddings[at : at + len(expected)], expected)
        at += len(expected)
    assert at == len(embeddings)
    assert seen == content.count(IMAGE)


def test_slots_and_pictures_must_be_as_many(engine: fv.Engine) -> None:
    """Ports drop the surplus picture, or the surplus slot, without a word."""
    prompt = Prompt((TextIds((1, 2)), ImageSlot(), ImageSlot()))
    with pytest.raises(PromptError, match=r"2 image slots, 1 images"):
        engine.pipeline.embed(prompt, [engine.encode(picture(1))])


def test_features_of_another_model_are_refused(engine: fv.Engine) -> None:
    foreign = fv.EncodedImage(mx.zeros((16, 999)), "digest")
    with pytest.raises(PromptError, match="not of this model"):
        engine.generate("What is this?", images=[foreign])


def test_pictures_are_encoded_one_by_one_as_in_a_batch(engine: fv.Engine) -> None:
    pixels = [engine.pipeline.processor.pixels(picture(seed)) for seed in (1, 2)]
    batch = engine.pipeline.model.encode_image(mx.array(np.stack(pixels)))
    for row, single in zip(batch, (engine.encode(picture(s)) for s in (1, 2)), strict=True):
        assert mx.allclose(row, single.features, atol=1e-5).item()


def test_streamed_text_joins_to_the_whole_answer(engine: fv.Engine) -> None:
    events = list(engine.stream("What is this?", images=[picture(1)], max_tokens=20))
    whole = engine.generate("What is this?", images=[picture(1)], max_tokens=20)
    deltas = [event for event in events if isinstance(event, fv.TextDelta)]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(i for delta in deltas for i in delta.token_ids) == whole.token_ids
    assert isinstance(events[-1], fv.Finished)


def test_finish_reasons(engine: fv.Engine) -> None:
    short = engine.generate("What is this?", images=[picture(1)], max_tokens=1)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 1)
    seen: list[int] = []

    def cancelled() -> bool:
        seen.append(1)
        return len(seen) == 3  # asked before the prompt and after each token

    stopped = engine.generate("What is this?", images=[picture(1)], cancelled=cancelled)
    assert (stopped.finish_reason, len(stopped.token_ids)) == ("cancelled", 2)


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: fv.Engine) -> None:
    """Ports accept stop strings and ignore them, or match them inside one token only."""
    whole = engine.generate("What is this?", images=[picture(1)], max_tokens=20)
    assert len(whole.text) > 4
    stop = whole.text[2:5]
    cut = engine.generate("What is this?", images=[picture(1)], max_tokens=20, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_text_alone_takes_the_same_path(engine: fv.Engine) -> None:
    answer = engine.generate("Hello", max_tokens=5)
    ids = engine.pipeline.processor.prompt([user_message("Hello", 0)]).text_ids
    assert answer.stats.prompt_tokens == len(ids)
    assert answer.token_ids


def test_logprobs_are_those_of_score(engine: fv.Engine) -> None:
    answer = engine.generate("What is this?", images=[picture(1)], max_tokens=6, logprobs=True)
    assert len(answer.logprobs) == len(answer.token_ids)
    assert all(value <= 0 for value in answer.logprobs)
    scored = engine.score("What is this?", [picture(1)], answer.text)
    tokenizer = engine.pipeline.processor.tokenizer
    shown = [i for i in answer.token_ids if i not in engine.pipeline.stop_ids]
    assert tokenizer.encode(answer.text) == shown
    assert np.allclose(scored, answer.logprobs[: len(shown)], atol=1e-4)


def test_a_seed_repeats_and_another_differs(engine: fv.Engine) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        sampling = fv.Sampling(temperature=3.0, seed=seed)
        return engine.generate("Hello", max_tokens=16, sampling=sampling).token_ids

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_stats_without_and_with_profile(engine: fv.Engine) -> None:
    plain = engine.generate("What is this?", images=[picture(1)], max_tokens=4).stats
    assert plain.ttft_ms is not None
    assert plain.ttft_ms > 0
    fenced = engine.generate("What is this?", images=[picture(1)], max_tokens=4, profile=True).stats
    assert fenced.ttft_ms is None
    for stage in STAGES:
        assert getattr(plain, stage) is None
        assert getattr(fenced, stage) > 0, stage
    assert plain.prompt_tokens == fenced.prompt_tokens > 16
    assert plain.generated_tokens <= 4
    assert plain.peak_bytes > 0


def test_a_prompt_beyond_the_context_is_refused_not_cut(engine: fv.Engine) -> None:
    """The reference cuts the tail, and with it the assistant header, in silence."""
    limit = engine.config.decoder.max_positions
    with pytest.raises(PromptError, match=f"the model has {limit}"):
        engine.generate("word " * limit)


def test_an_answer_ends_where_the_context_ends(engine: fv.Engine) -> None:
    limit = engine.config.decoder.max_positions
    words = limit
    while len(engine.pipeline.processor.prompt([user_message("a " * words, 0)]).text_ids) >= limit:
        words -= 1 + words // 50
    filler = "a " * words
    answer = engine.generate(filler, max_tokens=10_000)
    assert answer.stats.prompt_tokens + len(answer.token_ids) <= limit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "sampling": fv.Sampling(temperature=1)}, "temperature"),
        ({"num_beams": 2, "logprobs": True}, "log-probabilities"),
        ({"resolution": 100, "images": [picture(1)]}, "multiple of 64"),
        ({"resolution": 0, "images": [picture(1)]}, "multiple of 64"),
        ({"image_mode": "stretch", "images": [picture(1)]}, "not pad or crop"),
        ({"images": "photo.jpg"}, "list of pictures"),
        ({"images": picture(1)}, "list of pictures"),
        ({"stop": "xyz"}, "list of strings"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    engine: fv.Engine, options: dict[str, object], said: str
) -> None:
    with pytest.raises(FastVLMError, match=said):
        engine.generate("What is this?", **options)  # type: ignore[arg-type]


def test_any_resolution_on_the_grid_works(engine: fv.Engine) -> None:
    assert engine.encode(picture(1), resolution=128).features.shape[0] == 4
    assert engine.encode(picture(1), resolution=384).features.shape[0] == 36
    with pytest.raises(ConfigError):
        engine.encode(picture(1), resolution=-64)


def test_beams_give_an_answer_that_ends(engine: fv.Engine) -> None:
    answer = engine.generate("What is this?", images=[picture(1)], num_beams=3, max_tokens=20)
    assert answer.token_ids
    assert answer.finish_reason in ("stop", "length")
    assert answer.stats.decode_tps is None  # the ids come all at once


def test_load_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match="unknown dtype 'int4'"):
        fv.load("demo", dtype="int4")
    with pytest.raises(FastVLMError, match="does not exist"):
        fv.load(tmp_path / "nothing")
    with pytest.raises(MemoryLimitError, match="memory limit"):
        fv.load("demo", memory_limit=1000)


def test_a_bfloat16_model_computes_in_bfloat16() -> None:
    engine = fv.load("demo", dtype="bfloat16")
    assert engine.encode(picture(1)).features.dtype == mx.bfloat16
    assert greedy(engine, "What is this?", picture(1), tokens=3)


def test_an_engine_may_live_in_any_one_thread() -> None:
    """Arrays belong to the thread that made them: all of a model's life fits in a worker."""
    answers: list[str] = []

    def work() -> None:
        engine = fv.load("demo")
        answers.append(engine.generate("Hello", max_tokens=3).text)
        # MLX 0.32.4 on Linux may abort the process at exit if a thread leaves its streams behind.
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(answers) == 1


def test_the_tower_is_dispatched_before_the_prompt_is_tokenized(
    engine: fv.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    dispatch = mx.async_eval
    encode = type(engine.pipeline.processor.tokenizer).encode
    monkeypatch.setattr(mx, "async_eval", lambda *a: (order.append("dispatch"), dispatch(*a)))
    monkeypatch.setattr(
        type(engine.pipeline.processor.tokenizer),
        "encode",
        lambda self, text: (order.append("tokenize"), encode(self, text))[1],
    )
    engine.generate("A text never seen before?", images=[picture(1)], max_tokens=1)
    assert order[:2] == ["dispatch", "tokenize"]


def test_profiling_waits_and_not_profiling_does_not(engine: fv.Engine) -> None:
    clock = Clock(profile=True)
    engine.pipeline.encode(picture(1), ImageOptions(), clock)
    assert set(clock.stage_ms) == {"image_decode", "preprocess", "vision", "projector"}
    clock = Clock(profile=False)
    engine.pipeline.encode(picture(1), ImageOptions(), clock)
    assert clock.stage("vision") is None


def test_peak_memory_is_that_of_the_call(engine: fv.Engine) -> None:
    """A chat's first answer reported the peak of loading."""
    engine.encode(picture(1), resolution=512)
    once = engine.generate("What is this?", images=[picture(1)], max_tokens=2).stats.peak_bytes
    engine.encode(picture(1), resolution=512)
    chat = engine.chat().ask("What is this?", [picture(1)], max_tokens=2).stats.peak_bytes
    assert chat < 1.5 * once
