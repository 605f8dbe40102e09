"""Asking again, editing, dropping pictures, forking, overflowing: all reuse what is still right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ConfigError, ImageError, PromptError
from fastvlm_mlx.events import Generation, TurnsDropped
from fastvlm_mlx.generate.session import ChatSession, collect

LIMIT = 1024


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo")


def cold(engine: fv.Engine, chat: ChatSession, max_tokens: int, **options: object) -> Generation:
    """The last turn's answer from a fresh session with the transcript before it."""
    fresh = engine.chat(**options)
    before = chat.fork()
    before.rewind()
    fresh._transcript = before._transcript
    asked = chat._transcript.last_question
    return fresh.ask(asked.text, asked.images, max_tokens=max_tokens)


def cancel_after(count: int) -> Callable[[], bool]:
    """A `cancelled` that says yes when it is asked for the `count`-th time."""
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) >= count

    return cancelled


def test_a_retry_replaces_the_answer_and_computes_only_it(engine: fv.Engine) -> None:
    chat = engine.chat()
    first = chat.ask("What is this?", [picture(1)], max_tokens=6)
    again = collect(chat.retry(max_tokens=6))
    assert again.token_ids == first.token_ids
    assert again.stats.prompt_tokens - again.stats.reused_tokens == 1
    assert again.stats.encoded_images == 0
    hot = collect(chat.retry(max_tokens=6, sampling=fv.Sampling(temperature=3, seed=5)))
    assert hot.token_ids != first.token_ids
    assert chat.turn_count == 1
    assert chat.messages[-1].content == (hot.text,)


def test_a_retry_or_an_edit_that_fails_or_is_cancelled_leaves_the_turn(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    before = chat.messages
    collect(chat.retry(max_tokens=6, cancelled=cancel_after(3)))
    collect(chat.edit("Which colour?", cancelled=cancel_after(3)))
    chat.edit("Which colour?").close()
    with pytest.raises(ImageError):
        collect(chat.edit("And this?", ["/no/such/picture.png"]))
    with pytest.raises(PromptError, match="takes"):
        collect(chat.edit("word " * LIMIT))
    assert chat.messages == before
    assert [image.digest for image in chat.images] == [engine.encode(picture(1)).digest]


def test_nothing_to_ask_again_is_said(engine: fv.Engine) -> None:
    for again in (engine.chat().retry(), engine.chat().edit("x")):
        with pytest.raises(PromptError, match="nothing was asked yet"):
            next(again)


def test_an_edit_keeps_the_pictures_or_takes_others(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    collect(chat.edit("Which colour is it?", max_tokens=6))
    assert chat.last_question == "Which colour is it?"
    assert len(chat.images) == 1
    answer = collect(chat.edit("Which colour is it?", [picture(2), picture(3)], max_tokens=6))
    assert len(chat.images) == 2
    assert answer.token_ids == cold(engine, chat, 6).token_ids
    collect(chat.edit("Which colour is it?", [], max_tokens=6))
    assert chat.images == ()


def test_a_partial_answer_is_kept_by_choice(engine: fv.Engine) -> None:
    chat = engine.chat()
    ask = {"max_tokens": 20, "keep_partial": True}
    whole = chat.fork().ask("What is this?", [picture(1)], max_tokens=20).text
    partial = collect(chat.stream("What is this?", [picture(1)], cancelled=cancel_after(6), **ask))
    assert partial.finish_reason == "cancelled"
    assert whole.startswith(partial.text)
    assert chat.messages[-1].content == (partial.text,)
    stream = chat.stream("Which colour?", **ask)
    text = ""
    while not text:
        event = next(stream)
        assert isinstance(event, fv.TextDelta)
        text += event.text
    stream.close()
    assert chat.turn_count == 2
    assert chat.messages[-1].content == (text,)
    third = chat.ask("Where?", max_tokens=6)
    assert third.token_ids == cold(engine, chat, 6).token_ids


def test_an_answer_cancelled_before_its_first_token_leaves_nothing(engine: fv.Engine) -> None:
    """With `keep_partial` an empty answer would stand in the transcript."""
    chat = engine.chat()
    for asked in (1, 2):  # before the picture, before the prompt
        gone = collect(
            chat.stream(
                "Hi", [picture(50 + asked)], cancelled=cancel_after(asked), keep_partial=True
            )
        )
        assert gone.finish_reason == "cancelled"
        assert gone.stats.generated_tokens == 0
        assert gone.stats.ttft_ms is None
        assert gone.stats.encoded_images == asked - 1
    assert chat.turn_count == 0


def test_prefill_stops_between_two_passes_and_keeps_what_was_done(
    engine: fv.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastvlm_mlx.generate.loop.prefill.__kwdefaults__",
        {
            "step": 16,
            "cancelled": lambda: False,
        },
    )
    monkeypatch.setitem(fv.generate.loop.generate_ids.__kwdefaults__, "prefill_step", 16)
    chat = engine.chat()
    text = "word " * 60
    collect(chat.stream(text, cancelled=cancel_after(3)))
    after = chat.ask(text, max_tokens=4)
    assert after.stats.reused_tokens == 32
    assert after.token_ids == cold(engine, chat, 4).token_ids


def test_a_dropped_picture_leaves_its_question_and_all_before_it(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    chat.ask("Compare.", [picture(2), picture(3)], max_tokens=5)
    kept = chat.positions
    chat.drop_image(1)
    assert [i.digest for i in chat.images] == [engine.encode(picture(s)).digest for s in (1, 3)]
    assert kept - chat.positions == 17  # 16 rows and the line's end
    assert chat.last_question == "Compare."
    third = chat.ask("Which colour?", max_tokens=5)
    assert third.token_ids == cold(engine, chat, 5).token_ids
    assert third.stats.reused_tokens > 30
    with pytest.raises(PromptError, match="no picture 2"):
        chat.drop_image(2)


def test_a_fork_goes_its_own_way(engine: fv.Engine) -> None:
    """Layers that share an array object would be written to by both."""
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=6)
    twin = chat.fork()
    left = chat.ask("Which colour is it?", max_tokens=6)
    right = twin.ask("Where is the shape?", [picture(2)], max_tokens=6)
    assert left.stats.reused_tokens > 16
    assert right.stats.reused_tokens > 16
    for session, answer in ((chat, left), (twin, right)):
        assert answer.token_ids == cold(engine, session, 6).token_ids
    again = collect(chat.retry(max_tokens=6))
    assert again.token_ids == left.token_ids


def test_another_system_message_is_read_first(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    chat.set_system("Answer in one word.")
    second = chat.ask("Which colour?", max_tokens=5)
    assert chat.system == "Answer in one word."
    assert second.stats.reused_tokens < 8
    assert second.token_ids == cold(engine, chat, 5).token_ids


def test_what_changes_the_transcript_waits_for_the_answer(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=4)
    stream = chat.stream("Hello", max_tokens=8)
    next(stream)
    changes: Sequence[Callable[[], object]] = (
        chat.rewind,
        chat.fork,
        lambda: chat.drop_image(0),
        lambda: chat.set_system(""),
        lambda: chat.prepare([picture(2)]),
        lambda: next(chat.retry()),
    )
    for change in changes:
        with pytest.raises(PromptError, match="still being read"):
            change()
    stream.close()
    chat.rewind()


def fill(chat: ChatSession, until: int) -> None:
    count = 0
    while chat.positions < until:
        count += 1
        chat.ask(f"Number {count}: what is this?", [picture(count)], max_tokens=4)


def test_a_full_context_is_refused_and_says_what_to_do(engine: fv.Engine) -> None:
    """Ports cut the tail silently: the assistant's header is lost."""
    chat = engine.chat()
    fill(chat, LIMIT - 40)
    before = chat.messages
    with pytest.raises(PromptError, match=r"the conversation takes \d+ positions .* of 1024: go b"):
        chat.ask("And all of these?", [picture(98), picture(99)])
    assert chat.messages == before


def test_the_oldest_turns_are_dropped_whole_and_loudly(engine: fv.Engine) -> None:
    chat = engine.chat(overflow="drop")
    fill(chat, LIMIT - 100)
    before, pictures = chat.turn_count, len(chat.images)
    events = list(chat.stream("And this?", [picture(99)], max_tokens=128))
    dropped = events[0]
    assert isinstance(dropped, TurnsDropped)
    assert dropped.turns == dropped.images > 1
    assert chat.turn_count == before - dropped.turns + 1
    assert len(chat.images) == pictures - dropped.images + 1
    assert chat.messages[0].role == "system"
    assert chat.messages[1].content[-1] == f"Number {dropped.turns + 1}: what is this?"
    prompt = events[-1].stats.prompt_tokens  # type: ignore[union-attr]
    assert prompt + 128 <= LIMIT * 3 / 4
    # A quarter was freed at once, so the next turns drop nothing and stay warm.
    following = chat.ask("Which colour?", max_tokens=128)
    assert following.dropped_turns == 0
    assert following.stats.reused_tokens > prompt
    assert following.token_ids == cold(engine, chat, 128).token_ids


def test_dropped_turns_come_back_if_the_answer_is_cancelled(engine: fv.Engine) -> None:
    chat = engine.chat(overflow="drop")
    fill(chat, LIMIT - 100)
    before = chat.messages
    assert collect(chat.stream("And?", max_tokens=128, cancelled=cancel_after(2))).dropped_turns
    assert chat.messages == before


def test_a_question_too_long_by_itself_is_refused_in_either_mode(engine: fv.Engine) -> None:
    chat = engine.chat(overflow="drop")
    chat.ask("Hello", max_tokens=4)
    with pytest.raises(PromptError, match="the prompt takes"):
        chat.ask("word " * LIMIT)
    assert chat.turn_count == 1
    chat.overflow = "sideways"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="refuse or drop"):
        chat.ask("Hello")


def test_pictures_are_prefilled_while_the_question_is_typed(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    computed = chat.prepare([picture(2), picture(3)])
    assert computed > 2 * 16
    assert chat.prepare([picture(2), picture(3)]) == 0
    assert chat.prepare([]) == 0
    answer = chat.ask("Compare.", [picture(2), picture(3)], max_tokens=6)
    assert answer.stats.prompt_tokens - answer.stats.reused_tokens < 12
    assert answer.stats.encoded_images == 0
    assert answer.token_ids == cold(engine, chat, 6).token_ids
    chat.prepare([picture(4)])
    other = chat.ask("Which colour?", [picture(5)], max_tokens=6)
    assert other.token_ids == cold(engine, chat, 6).token_ids


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_kv_cache_is_smaller_and_as_warm_as_cold(engine: fv.Engine, bits: int) -> None:
    chat, whole = engine.chat(kv_bits=bits), engine.chat()
    for session in (chat, whole):
        session.ask("What is this?", [picture(1)], max_tokens=6)
    answer = chat.ask("Which colour is it?", max_tokens=6)
    assert answer.stats.reused_tokens > 16
    assert answer.token_ids == cold(engine, chat, 6, kv_bits=bits).token_ids
    # Codes of `bits` and a float32 scale and bias for each group of 32 values.
    assert chat.kv_bytes * 32 == whole.kv_bytes * (bits + 2)
    assert chat.fork().kv_bits == bits


def test_other_bits_are_refused(engine: fv.Engine) -> None:
    with pytest.raises(ConfigError, match="8 or 4 bits, not 3"):
        engine.chat(kv_bits=3)


def test_pictures_are_encoded_once_within_and_across_sessions() -> None:
    engine = fv.load("demo")
    first, second = engine.chat(), engine.chat()
    assert first.ask("What?", [picture(1)], max_tokens=2).stats.encoded_images == 1
    assert first.ask("Again?", [picture(1)], max_tokens=2).stats.encoded_images == 0
    assert second.ask("What?", [picture(1), picture(2)], max_tokens=2).stats.encoded_images == 1
    once = engine.generate("What?", images=[picture(2)], max_tokens=2).stats
    assert (once.encoded_images, once.reused_tokens) == (0, 0)
    assert len(engine.image_features) == 2
    off = fv.load("demo", feature_cache_bytes=0)
    for _ in range(2):
        assert off.generate("What?", images=[picture(1)], max_tokens=2).stats.encoded_images == 1


def test_warming_up_leaves_nothing_behind(engine: fv.Engine) -> None:
    kept = len(engine.image_features)
    assert engine.warm_up() > 0
    assert len(engine.image_features) == kept


def test_what_was_answered_is_prefilled_before_the_next_question_comes(engine: fv.Engine) -> None:
    chat = engine.chat()
    assert chat.prepare([]) > 0
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    chat.prepare([])
    before = chat.positions
    answer = chat.ask("Which colour?", max_tokens=6)
    # The next question's own control token was prefilled too.
    assert answer.stats.reused_tokens == before + 1
    assert answer.token_ids == cold(engine, chat, 6).token_ids
