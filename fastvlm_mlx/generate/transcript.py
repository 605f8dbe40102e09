"""What was said: the system message, then questions with their pictures, and answers.

A value that never changes: going back or dropping a picture gives another one. Knows messages and
which picture stands in which; knows no positions and no caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.model.fastvlm import EncodedImage
from fastvlm_mlx.prompt.template import ImageMark, Message


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and the pictures in its slots."""

    message: Message
    images: tuple[EncodedImage, ...] = ()

    def without_image(self, index: int) -> Turn:
        """Return the turn without its picture `index` and the line's end that follows its slot."""
        slot = [i for i, part in enumerate(self.message.content) if isinstance(part, ImageMark)]
        after = slot[index] + 1
        rest = self.message.content[after:]
        if rest and rest[0] == "\n":
            rest = rest[1:]
        content = (*self.message.content[: slot[index]], *rest)
        images = (*self.images[:index], *self.images[index + 1 :])
        return Turn(replace(self.message, content=content), images)

    @property
    def text(self) -> str:
        """The message's text, without pictures and the line's end after each."""
        turn = self
        while turn.images:
            turn = turn.without_image(0)
        return "".join(part for part in turn.message.content if isinstance(part, str))


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
    def images(self) -> tuple[EncodedImage, ...]:
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


def _system_turn(text: str) -> Turn:
    return Turn(Message("system", (text,)))
