"""Messages to an ordered list of text, control tokens and image slots: Qwen2's chat template.

Knows where turns begin and end, and nothing of token ids, files or pixels. What a user typed is
always plain text here: a control token or an image slot comes only from a message's structure.

Source: conversation `qwen_2` in apple/ml-fastvlm's llava/conversation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from fastvlm_mlx.errors import PromptError

Role = Literal["system", "user", "assistant"]

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class ImageMark:
    """Stands where a picture's features go. There is one value, `IMAGE`."""


IMAGE: Final = ImageMark()


@dataclass(frozen=True, slots=True)
class Control:
    """A trusted control token, by its text, e.g. `Control("<|im_start|>")`."""

    token: str


IM_START: Final = Control("<|im_start|>")
IM_END: Final = Control("<|im_end|>")

Part = str | Control | ImageMark


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: text and pictures in the order they are read. Raises PromptError if malformed."""

    role: Role
    content: tuple[str | ImageMark, ...]

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise PromptError(f"role {self.role!r} is not system, user or assistant")
        if not isinstance(self.content, tuple) or not all(
            isinstance(part, (str, ImageMark)) for part in self.content
        ):
            raise PromptError(
                f"the {self.role} message's content must be a tuple of text and IMAGE"
            )


def user_message(text: str, image_count: int) -> Message:
    r"""Return a user turn as LLaVA writes it: a slot and "\n" for each picture, then the text."""
    return Message("user", (*((IMAGE, "\n") * image_count), text))


def render(messages: Sequence[Message], *, generation_prompt: bool = True) -> tuple[Part, ...]:
    """Return the whole prompt; adjacent text is joined, so each text part is tokenized as one.

    If the first message is no system message, the default system turn is put before it. A system
    message of empty text leaves its turn out. With `generation_prompt` the prompt ends where the
    assistant's answer begins. A picture stays in the turn where it was given.

    Raises PromptError if there are no messages.
    """
    if not messages:
        raise PromptError("a prompt needs at least one message")
    if messages[0].role != "system":
        messages = (Message("system", (DEFAULT_SYSTEM,)), *messages)
    parts: list[Part] = []
    for message in messages:
        if message.role == "system" and not any(message.content):
            continue
        parts += [IM_START, f"{message.role}\n", *message.content, IM_END, "\n"]
    if generation_prompt:
        parts += [IM_START, "assistant\n"]
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)
