"""What must be true of a conversation after each operation, found without the session's own means.

Knows what each operation makes of the transcript, and what must then be in the cache; answers are
compared with those of `session_reference.py`. Knows nothing of hypothesis.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_operations import (
    MAX_TOKENS,
    POOL,
    TWIN,
    Ask,
    Conversation,
    Drop,
    Edit,
    Ending,
    Fail,
    Fork,
    Operation,
    Prepare,
    Resume,
    Retry,
    SetSystem,
    Swap,
    Switch,
    Undo,
    as_file,
    drawn,
)
from session_reference import Reference, Work, common, watched
from session_turns import Answer, Asked, Branch, Interrupted, Tally, Turn, read

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.events import ChatEvent, TurnsDropped
from fastvlm_mlx.prompt.template import user_message

# Warm and cold logits differ by float rounding, about 1e-5; of two as close as this either may win.
NEAR_TIE = 1e-4
# A packed cache rounds its rows: 1e-6 at the edge of a step becomes the step.
NEAR_TIE_PACKED = 0.05

MAX_BRANCHES = 3
# What every branch is asked at the end, in turn.
CLOSING = ("Describe the image.", "What is in the first picture?")


class Played:
    """One conversation, checked after each operation."""

    def __init__(
        self,
        reference: Reference,
        conversation: Conversation,
        tally: Tally,
        *,
        answers_only: bool = False,
    ) -> None:
        self.reference, self.engine, self.tally = reference, reference.engine, tally
        self.conversation = conversation
        self.answers_only = answers_only
        session = self.engine.chat(overflow=conversation.overflow, kv_bits=reference.kv_bits)
        self.branches = [Branch(session, session.system)]
        self.branch = self.branches[0]
        # Features are reused across sessions; now and then the engine has none.
        if tally.conversations % 10 == 0:
            self.engine.image_features.clear()
            reference.known.clear()
        self.known = reference.known

    def play(self) -> None:
        """Do every operation and check the outcome of each, and that other branches stay.

        Then go on in all branches by turns, so that none has changed what another one holds.
        """
        operations = self.conversation.operations
        for operation in operations:
            self.do(operation)
            self.check_transcripts()
        for text in CLOSING if len(self.branches) > 1 else CLOSING[:1]:
            for branch in self.branches:
                self.branch = branch
                self.do(Ask(text))
                self.check_transcripts()
        self.tally.conversations += 1
        self.tally.operations.append(len(operations))

    def do(self, operation: Operation) -> None:
        """Do one operation, or what stands for it, and check its outcome."""
        operation = self.possible(operation)
        branch, session = self.branch, self.branch.session
        kind = type(operation).__name__
        self.tally.kinds[kind] = self.tally.kinds.get(kind, 0) + 1
        match operation:
            case Ask(text, pictures, ending):
                given = self.given(pictures)
                self.answer(
                    lambda **how: session.stream(text, given, **how),
                    branch.turns,
                    Turn(text, pictures, ""),
                    ending,
                )
            case Retry(sampling, ending):
                turns = branch.turns
                self.answer(session.retry, turns[:-1], turns[-1], ending, sampling, asks=0, new=())
            case Edit(text, pictures, ending):
                self.edit(text, pictures, ending)
            case Swap(ending):
                last = branch.turns[-1]
                self.edit(last.question, tuple(TWIN[i] for i in last.pictures), ending)
            case Prepare(pictures, cancelled):
                self.prepare(pictures, cancelled)
            case Undo(turns):
                turns = 1 + (turns - 1) % len(branch.turns)
                session.rewind(turns)
                del branch.turns[len(branch.turns) - turns :]
            case Drop(index):
                self.drop(index % len(session.images))
            case Fork():
                self.branch = replace(branch, session=session.fork(), turns=[*branch.turns])
                self.branches.append(self.branch)
            case Switch(index):
                self.branch = self.branches[index % len(self.branches)]
            case Fail(how):
                self.fail(how)
            case SetSystem(text):
                session.set_system(text)
                branch.system = text
            case Resume(elsewhere):
                self.resume(elsewhere=elsewhere)

    def possible(self, operation: Operation) -> Operation:
        """Return the operation; a question instead, if it has nothing to work on."""
        turns = self.branch.turns
        if isinstance(operation, Fork) and len(self.branches) == MAX_BRANCHES:
            return Switch(self.branches.index(self.branch) + 1)
        if isinstance(operation, (Retry, Edit, Undo)) and not turns:
            return Ask("What is this?", (0,))
        if isinstance(operation, Swap) and not (turns and turns[-1].pictures):
            return Ask("What do you see?", (1,))
        if isinstance(operation, Drop) and not any(turn.pictures for turn in turns):
            return Ask("What is this?", (4,))
        return operation

    def edit(self, text: str, pictures: tuple[int, ...] | None, ending: Ending) -> None:
        """Ask in place of the last question."""
        session, turns = self.branch.session, self.branch.turns
        given = None if pictures is None else self.given(pictures)
        kept = turns[-1].pictures if pictures is None else pictures
        self.answer(
            lambda **how: session.edit(text, given, **how),
            turns[:-1],
            Turn(text, kept, "", stored=pictures is None and turns[-1].stored),
            ending,
            new=() if pictures is None else pictures,
        )

    def given(self, pictures: Sequence[int]) -> list[Any]:
        """Return pictures as a caller gives them: pixels, a file, or encoded at another side."""
        found: list[Any] = []
        for place, index in enumerate(pictures):
            if POOL[index].side is None:
                found.append(as_file(index) if place % 2 else drawn(index))
            else:
                found.append(self.engine.encode(drawn(index), resolution=POOL[index].side))
                self.known.add(index)
        return found

    def answer(
        self,
        start: Callable[..., Generator[ChatEvent, None, None]],
        past: Sequence[Turn],
        turn: Turn,
        ending: Ending,
        sampling: fv.Sampling | None = None,
        *,
        asks: int | None = None,
        new: Sequence[int] | None = None,
    ) -> None:
        """Have `turn` answered after `past`, and check all of it.

        `cancelled` is asked before `asks` of its pictures, of which `new` are encoded: by default
        all are.
        """
        asks = len(turn.pictures) if asks is None else asks
        new = turn.pictures if new is None else new
        asked = self.asked(past, turn)
        left = ending.by in ("cancelled", "raised")
        early = left and ending.at < asks
        fresh = {i for i in (new[: ending.at] if early else new) if POOL[i].side is None}
        fresh -= self.known
        self.known |= fresh
        how = {"max_tokens": MAX_TOKENS, "sampling": sampling, "cancelled": asked_at(ending)}
        if asked is None and not early:
            with pytest.raises(PromptError, match="positions"):
                list(start(**how))
            return
        with watched() as work:
            events = read(
                start(**how, keep_partial=ending.keep_partial),
                ending.at if ending.by == "closed" else None,
            )
        answer = Answer.read(events)
        if early:
            assert work == Work(0, len(fresh)) or self.answers_only
            assert not answer.ids
            assert answer.reason == ("cancelled" if ending.by == "cancelled" else None)
            return
        assert asked is not None
        reused = common(self.branch.held, asked.positions)
        # Pictures from a file are encoded now, if what is prefilled has them; each is asked for.
        stored = asked.stored_behind(reused)[: ending.at - asks if left else None]
        begun = bool(answer.ids) or ending.by != "closed"
        fresh |= set(stored if begun else ()) - self.known
        self.known |= fresh
        if not self.answers_only:
            assert work.pictures == len(fresh)
        self.check_ids(answer, asked, sampling or self.branch.session.sampling)
        if not self.answers_only:
            self.check_counts(answer, asked, reused, work)
            self.tally.dropped += len(past) - len(asked.kept)
            self.check_dropped(events, past[: len(past) - len(asked.kept)])
        self.remember(answer, asked, reused, replace(turn, answer=answer.text), ending)

    def asked(self, past: Sequence[Turn], turn: Turn) -> Asked | None:
        """Return the prompt with the turns that may stay before `turn`; None if it does not fit."""
        limit = self.conversation.limit
        room = min(MAX_TOKENS, limit // 4)
        asked = self.prompt(past, turn)
        if self.conversation.overflow == "drop" and past and len(asked.positions) + room > limit:
            fewer = [self.prompt(past[count:], turn) for count in range(1, len(past) + 1)]
            # Down to three quarters of the context; if that can't be, only as far as it must.
            down = [a for a in fewer if len(a.positions) + room <= limit * 3 / 4]
            enough = [a for a in fewer if len(a.positions) + room <= limit]
            asked = [*down, *enough, fewer[-1]][0]
        return asked if len(asked.positions) < limit else None

    def prompt(self, kept: Sequence[Turn], turn: Turn) -> Asked:
        """Return the prompt of `turn` after `kept`."""
        question = user_message(turn.question, len(turn.pictures))
        messages = [*self.branch.messages(kept), question]
        pictures = [index for t in (*kept, turn) for index in t.pictures]
        stored = [t.stored for t in (*kept, turn) for _ in t.pictures]
        positions = self.reference.positions(messages, pictures)
        room = self.conversation.limit - len(positions)
        return Asked(kept, messages, pictures, stored, positions, room)

    def remember(
        self, answer: Answer, asked: Asked, reused: int, turn: Turn, ending: Ending
    ) -> None:
        """Note what the transcript and the cache must be from now on."""
        branch = self.branch
        if answer.ids:
            # The latest token was chosen, but is not yet in the cache.
            branch.held = [*asked.positions, *answer.ids[:-1]]
            self.tally.answers += 1
            self.tally.reused += reused
        elif ending.by in ("cancelled", "raised"):
            branch.held = asked.positions[:reused]
        left = ending.keep_partial and ending.by != "raised" and turn.answer
        if answer.whole or left:
            branch.turns = [*asked.kept, turn]

    def check_counts(self, answer: Answer, asked: Asked, reused: int, work: Work) -> None:
        """The network saw the new positions and the tokens but the last, and the stats say so."""
        ids, stats = answer.ids, answer.stats
        if not ids:
            assert work.positions == 0
            return
        # One step runs ahead of the reader, unless no more tokens are wanted.
        steps = min(len(ids), min(MAX_TOKENS, asked.room) - 1)
        assert work.positions == len(asked.positions) - reused + steps
        if stats is not None:
            assert stats.prompt_tokens == len(asked.positions)
            assert stats.reused_tokens == reused
            assert stats.generated_tokens == len(ids)
            assert stats.encoded_images == work.pictures

    def check_ids(self, answer: Answer, asked: Asked, sampling: fv.Sampling) -> None:
        """The answer is the one computed from nothing, as far as it came."""
        ids = answer.ids
        cold = self.reference.ids(asked.messages, asked.pictures, sampling)[: asked.room]
        if ids == cold[: len(ids)]:
            assert len(ids) == len(cold) or not answer.whole
            return
        if sampling != fv.Sampling():  # near-ties of what was drawn are not worked out
            self.tally.sampled_apart += 1
            return
        step = next(i for i, (a, b) in enumerate(zip(ids, cold, strict=False)) if a != b)
        margin = self.reference.margin(asked.messages, asked.pictures, cold[:step])
        assert margin < self.near_tie, f"warm {ids} is not cold {cold}: {margin} apart"
        self.tally.near_ties += 1

    @property
    def near_tie(self) -> float:
        return NEAR_TIE if self.reference.kv_bits is None else NEAR_TIE_PACKED

    def check_dropped(self, events: Sequence[ChatEvent], gone: Sequence[Turn]) -> None:
        """The turns that had to go were named, before anything else, and no others."""
        said = [event for event in events if isinstance(event, TurnsDropped)]
        images = sum(len(turn.pictures) for turn in gone)
        assert said == ([TurnsDropped(len(gone), images)] if gone else [])
        assert said == list(events[: len(said)])

    def prepare(self, pictures: Sequence[int], cancelled: bool) -> None:
        """Pictures of a question to come are prefilled as far as they can be."""
        branch = self.branch
        given = self.given(pictures)
        with watched() as work:
            computed = branch.session.prepare(given, lambda: cancelled)
        if cancelled and pictures:  # asked before the first of them
            assert work.pictures == work.positions == computed == 0
            return
        self.known |= set(pictures)
        asked = self.prompt(branch.turns, Turn("", tuple(pictures), ""))
        wanted = asked.positions
        if self.answers_only:
            return
        assert work.positions == computed
        if len(wanted) >= self.conversation.limit:
            assert computed == 0
            return
        certain = self.reference.certain(wanted)
        reused = common(branch.held, wanted[: certain + 1])
        assert computed == (0 if cancelled else certain - reused)
        if reused < certain:
            branch.held = wanted[: reused + computed]
            self.known |= set() if cancelled else set(asked.stored_behind(reused))

    def drop(self, index: int) -> None:
        """Take a picture out: the later ones move, nothing else changes."""
        branch = self.branch
        branch.session.drop_image(index)
        for place, turn in enumerate(branch.turns):
            if index < len(turn.pictures):
                rest = (*turn.pictures[:index], *turn.pictures[index + 1 :])
                branch.turns[place] = replace(turn, pictures=rest)
                return
            index -= len(turn.pictures)

    def fail(self, how: str) -> None:
        """What can't be done raises one line, and is not done."""
        session = self.branch.session
        if how == "picture":
            with pytest.raises(ImageError):
                session.ask("And this?", ["/no/such/picture.png"], max_tokens=2)
        elif how == "length":
            with pytest.raises(PromptError, match="positions"):
                session.ask("word " * self.conversation.limit, max_tokens=2)
        elif how == "undo":
            with pytest.raises(PromptError, match="go back"):
                session.rewind(len(self.branch.turns) + 1)
        else:
            with pytest.raises(PromptError, match="no picture"):
                session.drop_image(len(session.images))

    def resume(self, *, elsewhere: bool) -> None:
        """What was saved is what goes on, its KV too; `elsewhere` no features are known."""
        if self.answers_only:  # a file names what is wrong with it
            return
        branch = self.branch
        shown = [index for turn in branch.turns for index in turn.pictures]
        messages = branch.messages(branch.turns)
        said = self.reference.positions(messages, shown, generation_prompt=False)
        # What was taken back is not written.
        branch.held = branch.held[: common(branch.held, [*said, -1])]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session"
            self.branch.session.save(path)
            self.branch.session = self.engine.resume(
                path, overflow=self.conversation.overflow, kv_bits=self.reference.kv_bits
            )
        branch.turns = [replace(turn, stored=True) for turn in branch.turns]
        if elsewhere:
            self.engine.image_features.clear()
            self.known.clear()

    def check_transcripts(self) -> None:
        """Messages and pictures of every branch are the ones that were given, each in its turn."""
        if self.answers_only:
            return
        for branch in self.branches:
            session = branch.session
            assert list(session.messages) == branch.messages(branch.turns)
            assert session.turn_count == len(branch.turns)
            assert session.system == branch.system
            question = branch.turns[-1].question if branch.turns else None
            assert session.last_question == question
            shown = [index for turn in branch.turns for index in turn.pictures]
            assert len(session.images) == len(shown)
            for image, index in zip(session.images, shown, strict=True):
                assert image.pixels is not None
                assert np.array_equal(image.pixels, self.reference.pixels(index))


def asked_at(ending: Ending) -> Callable[[], bool]:
    """Return what is given as `cancelled`: asked often enough, it says so or raises."""
    asks = 0

    def cancelled() -> bool:
        nonlocal asks
        asks += 1
        if ending.by == "raised" and asks > ending.at:
            raise Interrupted
        return ending.by == "cancelled" and asks > ending.at

    return cancelled
