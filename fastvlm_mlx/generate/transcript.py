"""What was said: the system message, then questions with their pictures, and answers.

A value that never changes: going back or dropping a picture gives another one. Knows messages and
which picture stands in which; knows no positions and no caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.model.fastvlm import ShownImage
from fastvlm_mlx.prompt.template import ImageMark, Message


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and the pictures in its slots."""

    message: Message
    images: tuple[ShownImage, ...] = ()

    def without_image(self, index: int) -> Turn:
        """Return the turn without its picture `index`."""
        images = (*self.images[:index], *self.images[index + 1 :])
        return Turn(without_slot(self.message, index), images)

    @property
    def text(self) -> str:
        """The message's text, without pictures and the line's end after each."""
        message = self.message
        for _ in self.images:
            message = without_slot(message, 0)
        return "".join(part for part in message.content if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Transcript:
    """The system's turn, then questions and answers in pairs."""

    turns: tuple[Turn, ...]

    @classmethod
    def begin(cls, system: str) -> Transcript:
        """Return a transcript with nothing but its system message."""
        return cls((_system_turn(system),))

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages, the system's first."""
        return tuple(turn.message for turn in self.turns)

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """All pictures, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def pairs(self) -> int:
        """How many questions have been answered."""
        return len(self.turns) // 2

    @property
    def last_question(self) -> Turn:
        """The latest question answered. Raises PromptError if there is none."""
        if not self.pairs:
            raise PromptError("nothing was asked yet")
        return self.turns[-2]

    @property
    def before_last_question(self) -> Transcript:
        """All that was said before it. Raises PromptError if there is none."""
        if not self.pairs:
            raise PromptError("nothing was asked yet")
        return self.without_last(1)

    def with_system(self, text: str) -> Transcript:
        """Return the transcript behind another system message."""
        return Transcript((_system_turn(text), *self.turns[1:]))

    def without_last(self, pairs: int) -> Transcript:
        """Return the transcript before its last questions; raise PromptError if there are fewer."""
        if not 0 <= pairs <= self.pairs:
            raise PromptError(f"cannot go back {pairs} turns: the conversation has {self.pairs}")
        return Transcript(self.turns[: len(self.turns) - 2 * pairs])

    def without_image(self, index: int) -> Transcript:
        """Return the transcript without picture `index` of `images`.

        Raises PromptError if there is no such picture.
        """
        count = len(self.images)
        if not 0 <= index < count:
            raise PromptError(f"there is no picture {index}: the conversation has {count}")
        place = 0
        while index >= len(self.turns[place].images):
            index -= len(self.turns[place].images)
            place += 1
        changed = self.turns[place].without_image(index)
        return Transcript((*self.turns[:place], changed, *self.turns[place + 1 :]))


def without_slot(message: Message, index: int) -> Message:
    """Return a message without its image slot `index` and the line's end that follows it."""
    slots = [i for i, part in enumerate(message.content) if isinstance(part, ImageMark)]
    rest = message.content[slots[index] + 1 :]
    if rest and rest[0] == "\n":
        rest = rest[1:]
    return replace(message, content=(*message.content[: slots[index]], *rest))


def _system_turn(text: str) -> Turn:
    return Turn(Message("system", (text,)))
