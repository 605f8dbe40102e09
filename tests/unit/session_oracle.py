"""What must be true of a conversation after each operation, found without the session's own means.

Knows the whole transcript and computes every answer anew: pictures straight through the network,
one pass over all positions, an empty cache. Which positions a session may reuse is worked out here
again, on (picture of the pool, row) in place of digests. Knows nothing of hypothesis.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from session_operations import (
    DEFAULT_SIDE,
    MAX_TOKENS,
    POOL,
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
    Switch,
    Undo,
    as_file,
    drawn,
)

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.events import ChatEvent, TurnsDropped
from fastvlm_mlx.generate.loop import generate_ids, logprobs_along
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.prompt.processor import TextIds
from fastvlm_mlx.prompt.template import IM_START, Message, user_message

# A position: a token id, or (picture of the pool, row). No digest, so none can be wrong here.
Position = int | tuple[int, int]

# Warm and cold logits differ by float rounding, about 1e-5; of two as close as this either may win.
NEAR_TIE = 1e-4
# A packed cache rounds its rows: 1e-6 at the edge of a step becomes the step.
NEAR_TIE_PACKED = 0.05

MAX_BRANCHES = 3
# What every branch is asked at the end, in turn.
CLOSING = ("Describe the image.", "What is in the first picture?")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its pictures by number, and its answer."""

    question: str
    pictures: tuple[int, ...]
    answer: str


@dataclass(slots=True)
class Tally:
    """What was compared, over all conversations."""

    conversations: int = 0
    operations: list[int] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    reused: int = 0
    dropped: int = 0
    near_ties: int = 0
    sampled_apart: int = 0


class Reference:
    """Answers computed from nothing, each once."""

    def __init__(self, engine: fv.Engine, kv_bits: int | None = None) -> None:
        self.engine = engine
        self.kv_bits = kv_bits
        # Pictures whose features the engine has.
        self.known: set[int] = set()
        self._features: dict[int, mx.array] = {}
        self._ids: dict[Any, tuple[int, ...]] = {}
        self._pixels: dict[int, np.ndarray] = {}

    def pixels(self, index: int) -> np.ndarray:
        """Return what the tower should see of a picture of the pool."""
        if index not in self._pixels:
            processor = self.engine.pipeline.processor
            self._pixels[index] = processor.pixels(drawn(index), size=side_of(index))
        return self._pixels[index]

    def features(self, index: int) -> mx.array:
        """Return the picture's features, by the network alone: no cache, no digest."""
        if index not in self._features:
            found = self.engine.pipeline.model.encode_image(mx.array(self.pixels(index))[None])[0]
            mx.eval(found)
            self._features[index] = found
        return self._features[index]

    def positions(self, messages: Sequence[Message], pictures: Sequence[int]) -> list[Position]:
        """Return what each position of the prompt is."""
        found: list[Position] = []
        remaining = iter(pictures)
        for segment in self.engine.pipeline.processor.prompt(messages).segments:
            if isinstance(segment, TextIds):
                found += segment.ids
            else:
                index = next(remaining)
                rows = side_of(index) // 64
                found += [(index, row) for row in range(rows**2)]
        assert next(remaining, None) is None
        return found

    def ids(
        self, messages: Sequence[Message], pictures: Sequence[int], sampling: fv.Sampling
    ) -> tuple[int, ...]:
        """Return the first MAX_TOKENS ids of the answer."""
        key = (tuple(messages), tuple(pictures), sampling)
        if key not in self._ids:
            decoder = self.engine.pipeline.model.decoder
            steps = generate_ids(
                decoder,
                self._embeddings(messages, pictures),
                decoder.make_cache(self.kv_bits),
                prompt_ids=self.engine.pipeline.processor.prompt(messages).text_ids,
                sampling=sampling,
                max_tokens=MAX_TOKENS,
                stop_ids=self.engine.pipeline.stop_ids,
            )
            self._ids[key] = tuple(step.token_id for step in steps)
        return self._ids[key]

    def margin(
        self, messages: Sequence[Message], pictures: Sequence[int], ids: Sequence[int]
    ) -> float:
        """Return how far the most likely id is before the next one after the prompt and `ids`."""
        decoder = self.engine.pipeline.model.decoder
        rows = logprobs_along(decoder, self._embeddings(messages, pictures), [*ids, 0])
        last = np.sort(np.array(list(rows)[-1][-1]))
        return float(last[-1] - last[-2])

    def _embeddings(self, messages: Sequence[Message], pictures: Sequence[int]) -> mx.array:
        remaining = iter(pictures)
        return self.engine.pipeline.model.embed(
            [
                segment.ids if isinstance(segment, TextIds) else self.features(next(remaining))
                for segment in self.engine.pipeline.processor.prompt(messages).segments
            ]
        )


def side_of(index: int) -> int:
    """Return the side in pixels of what the tower sees of a picture of the pool."""
    return POOL[index].side or DEFAULT_SIDE


def common(held: Sequence[Position], wanted: Sequence[Position]) -> int:
    """Return how many positions may be reused: equal ones, not the last, no part of a picture."""
    shared = 0
    while shared < min(len(held), len(wanted) - 1) and held[shared] == wanted[shared]:
        shared += 1
    while isinstance(at := wanted[shared], tuple) and at[1] > 0:
        shared -= 1
    return shared


@dataclass(slots=True)
class Work:
    """What the network was made to do: positions through the decoder, pictures to the tower."""

    positions: int = 0
    pictures: int = 0


@contextmanager
def watched() -> Iterator[Work]:
    """Count the network's work."""
    work = Work()
    real_hidden, real_tower = Decoder.hidden, FastViTHD.__call__

    def hidden(self: Decoder, embeddings: mx.array, cache: Any) -> mx.array:
        work.positions += embeddings.shape[1]
        return real_hidden(self, embeddings, cache)

    def tower(self: FastViTHD, pixels: mx.array) -> mx.array:
        work.pictures += pixels.shape[0]
        return real_tower(self, pixels)

    Decoder.hidden, FastViTHD.__call__ = hidden, tower  # type: ignore[method-assign]
    try:
        yield work
    finally:
        Decoder.hidden, FastViTHD.__call__ = real_hidden, real_tower  # type: ignore[method-assign]


@dataclass(slots=True)
class Branch:
    """A session, the transcript it must have, and what its cache must hold."""

    session: fv.ChatSession
    system: str
    turns: list[Turn] = field(default_factory=list)
    held: list[Position] = field(default_factory=list)

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Return the system message and these turns."""
        found = [Message("system", (self.system,))]
        for turn in turns:
            found.append(user_message(turn.question, len(turn.pictures)))
            found.append(Message("assistant", (turn.answer,)))
        return found


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt: the turns kept before the question, and what it is made of.

    `room` is how many tokens the context has left for the answer.
    """

    kept: Sequence[Turn]
    messages: list[Message]
    pictures: list[int]
    positions: list[Position]
    room: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was read of an answer; `reason` and `stats` are None if it was closed before its end."""

    ids: tuple[int, ...]
    text: str
    reason: str | None
    stats: fv.Stats | None

    @classmethod
    def read(cls, events: Sequence[ChatEvent]) -> Answer:
        """Join the events."""
        deltas = [event for event in events if isinstance(event, fv.TextDelta)]
        ids = tuple(token_id for event in deltas for token_id in event.token_ids)
        text = "".join(event.text for event in deltas)
        last = events[-1]
        if isinstance(last, fv.Finished):
            return cls(ids, text, last.finish_reason, last.stats)
        return cls(ids, text, None, None)

    @property
    def whole(self) -> bool:
        """Whether it came to its own end."""
        return self.reason in ("stop", "length")


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
        """Do one operation; what has nothing to work on asks a question instead."""
        branch, session = self.branch, self.branch.session
        shown = [index for turn in branch.turns for index in turn.pictures]
        if isinstance(operation, (Retry, Edit, Undo)) and not branch.turns:
            operation = Ask("What is this?", (0,))
        if isinstance(operation, Drop) and not shown:
            operation = Ask("What is this?", (4,))
        if isinstance(operation, Fork) and len(self.branches) == MAX_BRANCHES:
            operation = Switch(self.branches.index(branch) + 1)
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
                self.answer(session.retry, branch.turns[:-1], branch.turns[-1], ending, sampling)
            case Edit(text, pictures, ending):
                given = None if pictures is None else self.given(pictures)
                kept = branch.turns[-1].pictures if pictures is None else pictures
                self.answer(
                    lambda **how: session.edit(text, given, **how),
                    branch.turns[:-1],
                    Turn(text, kept, ""),
                    ending,
                )
            case Prepare(pictures, cancelled):
                self.prepare(pictures, cancelled)
            case Undo(turns):
                turns = 1 + (turns - 1) % len(branch.turns)
                session.rewind(turns)
                del branch.turns[len(branch.turns) - turns :]
            case Drop(index):
                self.drop(index % len(shown))
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
            case Resume():
                self.resume()

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
    ) -> None:
        """Have `turn` answered after `past`, and check all of it."""
        asks = 0

        def cancelled() -> bool:
            nonlocal asks
            asks += 1
            return ending.by == "cancelled" and asks > ending.at

        how = {"max_tokens": MAX_TOKENS, "sampling": sampling, "cancelled": cancelled}
        asked = self.asked(past, turn)
        # It is asked before each picture.
        early = ending.by == "cancelled" and ending.at < len(turn.pictures)
        seen = turn.pictures[: ending.at] if early else turn.pictures
        new = {index for index in seen if POOL[index].side is None} - self.known
        self.known |= new
        if asked is None and not early:
            with pytest.raises(PromptError, match="positions"):
                list(start(**how))
            return
        with watched() as work:
            events = _read(
                start(**how, keep_partial=ending.keep_partial),
                ending.at if ending.by == "closed" else None,
            )
        answer = Answer.read(events)
        if not self.answers_only:
            assert work.pictures == len(new)
        if early:
            assert [type(event) for event in events] == [fv.Finished]
            assert (answer.reason, work.positions) == ("cancelled", 0)
            return
        assert asked is not None
        reused = common(self.branch.held, asked.positions)
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
        if self.conversation.overflow == "drop" and len(asked.positions) + room > limit:
            while asked.kept:
                asked = self.prompt(asked.kept[1:], turn)
                if len(asked.positions) + room <= limit * 3 / 4:
                    break
        return asked if len(asked.positions) < limit else None

    def prompt(self, kept: Sequence[Turn], turn: Turn) -> Asked:
        """Return the prompt of `turn` after `kept`."""
        question = user_message(turn.question, len(turn.pictures))
        messages = [*self.branch.messages(kept), question]
        pictures = [index for t in (*kept, turn) for index in t.pictures]
        positions = self.reference.positions(messages, pictures)
        return Asked(kept, messages, pictures, positions, self.conversation.limit - len(positions))

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
        elif ending.by == "cancelled":
            branch.held = asked.positions[:reused]
        if answer.whole or (ending.keep_partial and turn.answer):
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
        self.known |= set(pictures)
        messages = [*branch.messages(branch.turns), user_message("", len(pictures))]
        shown = [index for turn in branch.turns for index in turn.pictures]
        wanted = self.reference.positions(messages, [*shown, *pictures])
        if self.answers_only:
            return
        assert work.positions == computed
        if len(wanted) >= self.conversation.limit:
            assert computed == 0
            return
        # The question's text, joined with what is before it in its message, is not known yet.
        start = self.engine.pipeline.processor.tokenizer.control_id(IM_START.token)
        fixed = [at for at, p in enumerate(wanted) if p == start][-2:-1]
        fixed += [at for at, p in enumerate(wanted) if isinstance(p, tuple)]
        certain = max(fixed) + 1
        reused = common(branch.held, wanted[: certain + 1])
        assert computed == (0 if cancelled else certain - reused)
        if reused < certain:
            branch.held = wanted[: reused + computed]

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

    def resume(self) -> None:
        """What was saved is what goes on, its KV too."""
        if self.answers_only:  # a file names what is wrong with it
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session"
            self.branch.session.save(path)
            self.branch.session = self.engine.resume(
                path, overflow=self.conversation.overflow, kv_bits=self.reference.kv_bits
            )

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


def _read(stream: Generator[ChatEvent, None, None], closed_at: int | None) -> list[ChatEvent]:
    """Read a stream to its end, or close it once it gave `closed_at` tokens."""
    events = []
    tokens = 0
    for event in stream:
        events.append(event)
        tokens += len(event.token_ids) if isinstance(event, fv.TextDelta) else 0
        if closed_at is not None and tokens >= closed_at and not isinstance(event, fv.Finished):
            break
    stream.close()
    return events
