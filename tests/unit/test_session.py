"""A chat computes only what is new, and answers as if it had computed everything."""

from __future__ import annotations

import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.generate.loop import generate_ids
from fastvlm_mlx.prompt.template import Message
from tests.unit.patchwork import picture


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo")


def cold_ids(engine: fv.Engine, messages: tuple[Message, ...], pictures: list[np.ndarray], n: int):
    """Greedy ids of the last turn, computed from nothing."""
    pipeline = engine.pipeline
    prompt = pipeline.processor.prompt(messages)
    embeddings = pipeline.embed(prompt, [engine.encode(p) for p in pictures])
    steps = generate_ids(
        pipeline.model.decoder,
        embeddings,
        pipeline.model.decoder.make_cache(),
        sampling=fv.Sampling(),
        max_tokens=n,
        stop_ids=pipeline.stop_ids,
    )
    return tuple(step.token_id for step in steps)


Turn = tuple[str, list[np.ndarray]]

CONVERSATIONS: dict[str, list[Turn]] = {
    "same picture asked again": [("What is this?", [picture(1)]), ("Which colour?", [])],
    "a new picture next turn": [("What is this?", [picture(1)]), ("And this?", [picture(2)])],
    "the same picture given twice": [("What is this?", [picture(1)]), ("Again?", [picture(1)])],
    "two pictures, then text": [("Compare.", [picture(1), picture(2)]), ("Why?", []), ("So?", [])],
    "text first": [("Hello", []), ("What is this?", [picture(3)]), ("Where?", [])],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_warm_answers_equal_cold_ones(engine: fv.Engine, name: str) -> None:
    """Ports count reuse in token ids though a picture is 256 positions, and trim real entries."""
    chat = engine.chat()
    pictures: list[np.ndarray] = []
    for text, images in CONVERSATIONS[name]:
        pictures += images
        warm = chat.ask(text, images, max_tokens=10)
        assert warm.token_ids == cold_ids(engine, chat.messages[:-1], pictures, 10)


def test_a_later_turn_prefills_only_what_is_new(engine: fv.Engine) -> None:
    chat = engine.chat()
    first = chat.ask("What is this?", [picture(1)], max_tokens=10)
    second = chat.ask("Which colour is it?", max_tokens=10)
    assert first.stats.reused_tokens == 0
    # All of the first prompt stays, the picture included.
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    assert second.stats.prompt_tokens - second.stats.reused_tokens < 32


def test_another_picture_in_the_same_place_is_not_the_same_prefix(engine: fv.Engine) -> None:
    """With one key for every picture the second answer would be about the first picture."""
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    chat.rewind()
    other = chat.ask("What is this?", [picture(2)], max_tokens=5)
    before_picture = engine.pipeline.processor.prompt([*chat.messages[:1]])
    assert other.stats.reused_tokens <= len(before_picture.text_ids) + 2
    assert other.token_ids == cold_ids(engine, chat.messages[:-1], [picture(2)], 5)


def test_a_question_edited_or_asked_again_is_answered_as_if_first(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    first = chat.ask("Which colour is it?", max_tokens=6)
    chat.rewind()
    assert chat.ask("Which colour is it?", max_tokens=6).token_ids == first.token_ids
    chat.rewind()
    edited = chat.ask("Which shape is it?", max_tokens=6)
    assert edited.token_ids == cold_ids(engine, chat.messages[:-1], [picture(1)], 6)
    assert edited.stats.reused_tokens > 16
    chat.rewind(2)
    assert len(chat.messages) == 1
    with pytest.raises(PromptError, match="has 0"):
        chat.rewind()


def test_two_answers_at_once_are_refused(engine: fv.Engine) -> None:
    """Interleaved, both would write into one cache."""
    chat = engine.chat()
    first = chat.stream("Hello", max_tokens=8)
    next(first)
    with pytest.raises(PromptError, match="still being read"):
        chat.ask("And you?")
    first.close()
    after = chat.ask("And you?", max_tokens=6)
    assert after.token_ids == cold_ids(engine, chat.messages[:-1], [], 6)


def test_a_stream_left_at_its_end_and_closed_late_changes_nothing(engine: fv.Engine) -> None:
    chat = engine.chat()
    late = chat.stream("What is this?", [picture(1)], max_tokens=6)
    for event in late:
        if isinstance(event, fv.Finished):
            break
    chat.ask("Which colour?", max_tokens=6)
    late.close()
    third = chat.ask("Where?", max_tokens=6)
    assert third.token_ids == cold_ids(engine, chat.messages[:-1], [picture(1)], 6)


def test_a_cancelled_answer_leaves_the_last_whole_turn(engine: fv.Engine) -> None:
    chat = engine.chat()
    before = chat.messages
    events = list(chat.stream("Hello", max_tokens=8, cancelled=lambda: True))
    assert isinstance(events[-1], fv.Finished)
    assert events[-1].finish_reason == "cancelled"
    assert chat.messages == before


def test_a_picture_stays_in_the_turn_where_it_was_given(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=4)
    chat.ask("And?", max_tokens=4)
    with_pictures = [m for m in chat.messages if any(not isinstance(p, str) for p in m.content)]
    assert with_pictures == [chat.messages[1]]


def test_a_turn_cut_short_leaves_the_transcript_and_the_next_answer_right(
    engine: fv.Engine,
) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    before = chat.messages
    stream = chat.stream("Tell me more.", max_tokens=20)
    next(stream)
    stream.close()
    assert chat.messages == before
    after = chat.ask("Which colour?", max_tokens=8)
    assert after.token_ids == cold_ids(engine, chat.messages[:-1], [picture(1)], 8)
    assert after.stats.reused_tokens > 16


def test_a_failed_turn_rolls_back(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    before = chat.messages
    with pytest.raises(ImageError):
        chat.ask("And this?", ["/no/such/picture.png"])
    limit = engine.config.decoder.max_positions
    with pytest.raises(PromptError):
        chat.ask("word " * limit)
    assert chat.messages == before
    after = chat.ask("Which colour?", max_tokens=8)
    assert after.token_ids == cold_ids(engine, chat.messages[:-1], [picture(1)], 8)


def test_sampling_and_system_are_the_sessions(engine: fv.Engine) -> None:
    chat = engine.chat(system="Answer briefly.", sampling=fv.Sampling(temperature=2, seed=3))
    assert chat.messages == (Message("system", ("Answer briefly.",)),)
    again = engine.chat(system="Answer briefly.", sampling=fv.Sampling(temperature=2, seed=3))
    assert chat.ask("Hello", max_tokens=9).token_ids == again.ask("Hello", max_tokens=9).token_ids
