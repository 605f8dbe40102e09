"""A conversation as the property test knows it: turns, what was asked, what was read.

Plain values beside a session, and the reading of an answer to whatever end it is to have.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from session_reference import Position

import fastvlm_mlx as fv
from fastvlm_mlx.events import ChatEvent
from fastvlm_mlx.prompt.template import Message, user_message


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its pictures by number, and its answer.

    `stored` pictures came from a file, and are encoded when they are looked at.
    """

    question: str
    pictures: tuple[int, ...]
    answer: str
    stored: bool = False


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

    `stored` says of each picture whether it came from a file; `room` is how many tokens the context
    has left for the answer.
    """

    kept: Sequence[Turn]
    messages: list[Message]
    pictures: list[int]
    stored: list[bool]
    positions: list[Position]
    room: int

    def stored_behind(self, start: int) -> list[int]:
        """Return the pictures from a file that are not before position `start`."""
        begins = [at for at, p in enumerate(self.positions) if isinstance(p, tuple) and p[1] == 0]
        every = zip(begins, self.pictures, self.stored, strict=True)
        return [index for at, index, stored in every if stored and at >= start]


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
        last = events[-1] if events else None
        if isinstance(last, fv.Finished):
            return cls(ids, text, last.finish_reason, last.stats)
        return cls(ids, text, None, None)

    @property
    def whole(self) -> bool:
        """Whether it came to its own end."""
        return self.reason in ("stop", "length")


class Interrupted(Exception):
    """Stands for what may be raised while an answer is read: Ctrl-C, most of all."""


def read(stream: Generator[ChatEvent, None, None], closed_at: int | None) -> list[ChatEvent]:
    """Read a stream until it ends or raises, or close it once it gave `closed_at` tokens."""
    events: list[ChatEvent] = []
    tokens = 0
    try:
        for event in stream:
            events.append(event)
            tokens += len(event.token_ids) if isinstance(event, fv.TextDelta) else 0
            if closed_at is not None and tokens >= closed_at and not isinstance(event, fv.Finished):
                break
    except Interrupted:
        pass
    stream.close()
    return events
