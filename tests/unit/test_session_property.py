"""Whatever people do to a conversation, each answer is the one of a conversation never cached.

Hypothesis draws the operations (`session_operations.py`), always the same ones; `session_oracle.py`
says what each must come to, and `session_reference.py` computes every answer from nothing. The
faults that other ports have are planted, and the same examples must find each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from session_operations import DEFAULT_SIDE, Conversation, conversations
from session_oracle import Played
from session_reference import Reference
from session_turns import Tally

import fastvlm_mlx as fv
from fastvlm_mlx.generate import context, pipeline, session
from fastvlm_mlx.generate.cache import KVPrefix

Plant = Callable[[pytest.MonkeyPatch], None]

CONVERSATIONS = 200
OPERATIONS = 8


def drive(
    engine: fv.Engine,
    examples: int,
    *,
    kv_bits: int | None = None,
    shrink: bool = False,
    answers_only: bool = False,
) -> Tally:
    """Play as many conversations; return what was compared, raise at the first that is wrong."""
    reference, tally = Reference(engine, kv_bits), Tally()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(conversations(operations=OPERATIONS))
    def play(conversation: Conversation) -> None:
        if answers_only:  # or a fault's wrong count may be refused before it is answered
            conversation = replace(conversation, limit=1024)
        configure(engine, conversation.limit)
        Played(reference, conversation, tally, answers_only=answers_only).play()

    play()
    return tally


def configure(engine: fv.Engine, limit: int) -> None:
    """Give the demo model a context of `limit` positions, and small pictures: its tower is slow."""
    config = engine.config
    engine.pipeline.model.config = replace(
        config,
        decoder=replace(config.decoder, max_positions=limit),
        vision=replace(config.vision, image_size=DEFAULT_SIDE),
    )


@pytest.fixture
def engine() -> fv.Engine:
    return fv.load("demo")


def check(tally: Tally, conversations: int) -> None:
    assert tally.conversations >= conversations
    assert min(tally.operations) >= OPERATIONS
    # Two ids that are nearly as likely may change places between warm and cold, but not often.
    assert tally.near_ties <= tally.answers / 100
    assert tally.sampled_apart <= tally.answers / 100


def test_conversations_answer_as_if_computed_from_nothing(engine: fv.Engine) -> None:
    """A few, for `make check`."""
    check(drive(engine, 8, shrink=True), 8)


@pytest.mark.slow
def test_two_hundred_conversations_answer_as_if_computed_from_nothing(engine: fv.Engine) -> None:
    """Ports that count reuse in ids, or know a picture by its slot only, answer otherwise."""
    tally = drive(engine, CONVERSATIONS, shrink=True)
    check(tally, CONVERSATIONS)
    kinds = "Ask Retry Edit Swap Prepare Undo Drop Fork Switch Fail SetSystem Resume"
    assert set(tally.kinds) == set(kinds.split())
    assert tally.answers >= 5 * CONVERSATIONS
    assert tally.reused >= 20 * tally.answers
    assert tally.dropped >= CONVERSATIONS / 4


@pytest.mark.slow
def test_with_a_packed_cache_too(engine: fv.Engine) -> None:
    """Against cold answers from a cache packed alike."""
    check(drive(engine, 20, kv_bits=8, shrink=True), 20)


def count_ids_not_positions(patch: pytest.MonkeyPatch) -> None:
    """A picture takes one position in the comparison, as its placeholder id does."""
    real = context.lay_out

    def lay_out(*args: object, **how: object) -> context.Fitted:
        fitted = real(*args, **how)
        counted = [at for at in fitted.positions if not isinstance(at, tuple) or at[1] == 0]
        return replace(fitted, positions=counted)

    patch.setattr(context, "lay_out", lay_out)
    patch.setattr(session, "lay_out", lay_out)


def know_every_picture_by_one_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "pixel_digest", lambda pixels: "picture")


def compare_pictures_by_their_slot(patch: pytest.MonkeyPatch) -> None:
    """Features are each picture's own, but the KV prefix does not know whose."""
    real = context.lay_out

    def lay_out(*args: object, **how: object) -> context.Fitted:
        fitted = real(*args, **how)
        blind = [("", at[1]) if isinstance(at, tuple) else at for at in fitted.positions]
        return replace(fitted, positions=blind)

    patch.setattr(context, "lay_out", lay_out)
    patch.setattr(session, "lay_out", lay_out)


def leave_what_was_cancelled_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    def hold(self: KVPrefix, positions: list[context.Position]) -> None:
        self._held = list(positions)

    patch.setattr(KVPrefix, "hold", hold)


def let_a_fork_write_into_its_origin(patch: pytest.MonkeyPatch) -> None:
    """MLX's item assignment changes the array that both hold."""

    def copy(self: KVPrefix) -> KVPrefix:
        twin = KVPrefix(self._decoder, self.kv_bits)
        for ours, theirs in zip(twin.layers, self.layers, strict=True):
            ours.keys, ours.values, ours.offset = theirs.keys, theirs.values, theirs.offset
        twin._held = list(self._held)
        return twin

    patch.setattr(KVPrefix, "copy", copy)


def drop_a_picture_and_leave_the_others_where_they_were(patch: pytest.MonkeyPatch) -> None:
    real = context.Turn.without_image

    def without_image(self: context.Turn, index: int) -> context.Turn:
        return replace(real(self, index), images=self.images[:-1])

    patch.setattr(context.Turn, "without_image", without_image)


def drop_turns_in_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "_dropped", lambda past, fitted: None)


def forget_what_is_cached(patch: pytest.MonkeyPatch) -> None:
    """Answers stay right, but are computed anew."""
    real = KVPrefix.keep_common
    patch.setattr(KVPrefix, "keep_common", lambda self, positions: real(self, [-1, *positions]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant",
    [
        count_ids_not_positions,
        know_every_picture_by_one_key,
        compare_pictures_by_their_slot,
        leave_what_was_cancelled_in_the_cache,
        let_a_fork_write_into_its_origin,
        drop_a_picture_and_leave_the_others_where_they_were,
    ],
)
def test_a_planted_fault_is_told_by_the_answers_alone(
    engine: fv.Engine, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    """The same conversations, and nothing looked at but ids."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"warm .* is not cold"):
        drive(engine, CONVERSATIONS, answers_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [drop_turns_in_silence, forget_what_is_cached])
def test_a_planted_fault_that_leaves_answers_right_is_told_by_the_counts(
    engine: fv.Engine, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        drive(engine, CONVERSATIONS)
