"""Asking again, editing, dropping pictures, forking, overflowing: all reuse what is still right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ConfigError, ImageError, PromptError
from fastvlm_mlx.events import Generation, TurnsDropped
from fastvlm_mlx.generate.session import ChatSession, collect
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.mlx_lm_parts import KVCache
from tests.unit.patchwork import picture

LIMIT = 1024


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


def test_what_overflow_means_is_checked_at_once(engine: fv.Engine) -> None:
    with pytest.raises(ConfigError, match="refuse or drop"):
        engine.chat(overflow="sideways")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="refuse or drop"):
        engine.chat().overflow = "sideways"  # type: ignore[assignment]


def test_a_long_question_drops_no_more_than_it_must(engine: fv.Engine) -> None:
    """Three quarters of the context can't be reached: the whole conversation was dropped."""
    chat = engine.chat(overflow="drop")
    for number in range(4):
        chat.ask(f"Number {number}?", max_tokens=2)
    word = len(engine.pipeline.processor.tokenizer.encode(" word"))
    room = LIMIT - 256 - chat.positions
    answer = chat.ask(" word" * (room // word), max_tokens=256)
    assert 1 <= answer.dropped_turns < 4
    assert answer.stats.prompt_tokens + 256 <= LIMIT


def test_one_picture_by_itself_is_refused_in_one_line(engine: fv.Engine) -> None:
    """An array's truth value was asked; an empty path was no picture."""
    for single in (picture(1), b"", ""):
        with pytest.raises(ImageError, match="takes a list"):
            engine.chat().ask("What?", single)  # type: ignore[arg-type]
    for missing in (None, 3):
        chat = engine.chat()
        with pytest.raises(PromptError):
            chat.ask(missing)  # type: ignore[arg-type]
        assert chat.turn_count == 0


def test_a_picture_of_another_loaded_model_is_refused(engine: fv.Engine) -> None:
    """Same pixels, same digest, other features: their KV would be taken for one another's."""
    other = fv.load("demo")
    with pytest.raises(PromptError, match="another loaded model"):
        engine.chat().ask("What?", [other.encode(picture(1))])


def test_features_made_by_hand_are_known_by_their_values(engine: fv.Engine) -> None:
    chat = engine.chat()
    features = [engine.encode(picture(seed)).features for seed in (1, 2)]
    chat.ask("What is this?", [fv.EncodedImage(features[0], "same")], max_tokens=4)
    edited = collect(chat.edit("What is this?", [fv.EncodedImage(features[1], "same")]))
    assert edited.text == engine.chat().ask("What is this?", [picture(2)]).text
    assert edited.stats.reused_tokens < 30


class Broken(Exception):
    """What a failed allocation, or Ctrl-C, looks like."""


def never_computed() -> mx.array:
    """An array whose evaluation fails: of a stream that ended with its thread."""
    made: list[mx.array] = []

    def make() -> None:
        made.append(mx.zeros(1) + 1)
        mx.clear_streams()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def fail_to_evaluate(patch: pytest.MonkeyPatch) -> type[Exception]:
    """The failed graph stayed in the layers: ask, fork and save raised for ever."""
    real = Decoder.hidden

    def hidden(self: Decoder, embeddings: mx.array, cache: list, **how: object) -> mx.array:
        return real(self, embeddings + never_computed(), cache, **how)

    patch.setattr(Decoder, "hidden", hidden)
    return RuntimeError


def stop_between_keys_and_values(patch: pytest.MonkeyPatch) -> type[Exception]:
    """The keys had grown and the values had not: no later question could be answered."""
    calls: list[int] = []

    class Grown:
        def __getattr__(self, name: str) -> object:
            return getattr(mx, name)

        def concatenate(self, *args: object, **how: object) -> mx.array:
            calls.append(1)
            if len(calls) == 2:
                raise Broken
            return mx.concatenate(*args, **how)

    patch.setitem(KVCache.update_and_fetch.__globals__, "mx", Grown())
    return Broken


def stop_in_the_reader(patch: pytest.MonkeyPatch) -> type[Exception]:
    real = Decoder.logits

    def logits(self: Decoder, hidden: mx.array) -> mx.array:
        real(self, hidden)
        raise Broken

    patch.setattr(Decoder, "logits", logits)
    return Broken


@pytest.mark.parametrize(
    ("fault", "reused"),
    [
        (fail_to_evaluate, False),
        (stop_between_keys_and_values, False),
        (stop_in_the_reader, True),
    ],
)
def test_an_answer_that_fails_anywhere_leaves_a_session_that_works(
    engine: fv.Engine, tmp_path: Path, fault: Callable, reused: bool
) -> None:
    long = "word " * 80  # past the buffers' first 256 positions
    for prepares in (False, True):
        if prepares and fault is stop_in_the_reader:
            continue
        chat = engine.chat()
        chat.ask("What is this?", [picture(1)], max_tokens=4)
        with pytest.MonkeyPatch.context() as patch:
            error = fault(patch)
            with pytest.raises(error):
                if prepares:
                    chat.prepare([picture(seed) for seed in range(20, 34)])
                else:
                    chat.ask(long)
        assert chat.turn_count == 1
        chat.save(tmp_path / "talk")
        answer = chat.fork().ask("Which colour?", max_tokens=6)
        assert answer.token_ids == cold_after(engine, chat, "Which colour?", 6)
        assert (answer.stats.reused_tokens > 0) == reused


def cold_after(engine: fv.Engine, chat: ChatSession, text: str, max_tokens: int) -> tuple[int, ...]:
    fresh = engine.chat()
    fresh._transcript = chat._transcript
    return fresh.ask(text, max_tokens=max_tokens).token_ids


def test_buffers_do_not_pile_up_behind_a_prefix_of_whole_blocks(engine: fv.Engine) -> None:
    """mlx-lm adds a whole new block to what it kept if the prefix ends at 256."""
    chat = engine.chat()
    chat.ask(" word" * 250, max_tokens=1)
    kv = chat._warm.kv
    assert len(kv) > 512
    per_position = chat.kv_bytes // kv.layers[0].keys.shape[2]
    for length in (512, 256):
        kv.hold(kv.positions[:length])
        assert chat.kv_bytes <= per_position * length
    chat.rewind()
    chat.ask(" word" * 250, max_tokens=1)
    assert chat.kv_bytes <= per_position * (len(kv) + 256)
    chat.rewind()
    kv.hold([])
    assert chat.kv_bytes == 0
    assert (
        chat.ask("Hello", max_tokens=2).token_ids
        == engine.chat().ask("Hello", max_tokens=2).token_ids
    )


def test_preparing_stops_before_the_next_picture(engine: fv.Engine) -> None:
    chat = engine.chat()
    pictures = [picture(seed) for seed in range(60, 64)]
    before = len(engine.image_features)
    assert chat.prepare(pictures, cancel_after(2)) == 0
    assert len(engine.image_features) == before + 1


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


def test_a_picture_and_a_session_say_what_they_are_in_one_line(engine: fv.Engine) -> None:
    chat = engine.chat()
    chat.ask("What is this?", [picture(1)], max_tokens=2)
    assert repr(chat) == f"ChatSession(1 turns, 1 pictures, {chat.positions} of 1024 positions)"
    assert repr(chat.images[0]).startswith("EncodedImage('array [96, 128, 3] uint8', 16 positions,")


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
