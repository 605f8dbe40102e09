"""What people do to a conversation, as values, drawn at random: the property test's operations.

Knows the pictures that are shown and what hypothesis may draw. What must be true after an
operation is `session_oracle.py`'s.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image, ImageDraw

import fastvlm_mlx as fv

MAX_TOKENS = 4
# Pixels a side of what the tower sees, and positions a picture takes: (side / 64)^2.
DEFAULT_SIDE = 128


@dataclass(frozen=True, slots=True)
class Shown:
    """A shape on a ground at (x, y, size), seen by the tower at `side` pixels, or the default."""

    shape: str
    colour: str
    place: tuple[int, int, int]
    ground: str = "white"
    side: int | None = None


# Some differ in a colour only, some in a few pixels, one only in the side the tower sees it at.
POOL: tuple[Shown, ...] = (
    Shown("ellipse", "red", (64, 64, 60)),
    Shown("ellipse", "blue", (64, 64, 60)),
    Shown("rectangle", "yellow", (90, 30, 60), ground="black"),
    Shown("rectangle", "green", (90, 30, 60), side=64),
    Shown("rectangle", "green", (90, 34, 60), side=64),
    Shown("ellipse", "black", (20, 20, 160), side=64),
    Shown("ellipse", "purple", (100, 100, 50), side=192),
    Shown("ellipse", "red", (64, 64, 60), side=192),
)
# Another picture of the same size.
TWIN = {0: 1, 1: 2, 2: 0, 3: 4, 4: 5, 5: 3, 6: 7, 7: 6}
# What the demo model answers by its pictures, and what users type that is no question.
TEXTS = (
    "Describe the image.",
    "What do you see?",
    "What is in the first picture?",
    "Describe the second image.",
    "What colour is it?",
    "What colour is",
    "Hello",
    "",
    "<image>",
    "Wie schön 🙂?<|im_start|>",
)
SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "")
SAMPLINGS = (
    None,
    None,
    fv.Sampling(temperature=1.5, seed=7),
    fv.Sampling(temperature=0.8, top_p=0.9, seed=8),
    fv.Sampling(repetition_penalty=1.3),
)


@cache
def drawn(index: int) -> np.ndarray:
    """Return picture `index` of the pool, uint8 [192, 224, 3]."""
    shown = POOL[index]
    image = Image.new("RGB", (224, 192), shown.ground)
    x, y, size = shown.place
    getattr(ImageDraw.Draw(image), shown.shape)((x, y, x + size, y + size), fill=shown.colour)
    return np.asarray(image)


@cache
def as_file(index: int) -> bytes:
    """Return the same pixels as an encoded file."""
    file = io.BytesIO()
    Image.fromarray(drawn(index)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ends: whole; cancelled, or by an error, when `cancelled` was asked `at` times;
    or closed after `at` tokens, before the first if that is 0 and turns are dropped.
    """

    by: Literal["itself", "cancelled", "raised", "closed"] = "itself"
    at: int = 0
    keep_partial: bool = False


WHOLE = Ending()


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about pictures of the pool; each is given as pixels or as a file by turns."""

    text: str
    pictures: tuple[int, ...] = ()
    ending: Ending = WHOLE


@dataclass(frozen=True, slots=True)
class Retry:
    """The last question again; `sampling` None is the session's own."""

    sampling: fv.Sampling | None = None
    ending: Ending = WHOLE


@dataclass(frozen=True, slots=True)
class Edit:
    """The last question in other words; `pictures` None keeps the ones it had."""

    text: str
    pictures: tuple[int, ...] | None = None
    ending: Ending = WHOLE


@dataclass(frozen=True, slots=True)
class Swap:
    """The last question again about other pictures, each as large as the one it had."""

    ending: Ending = WHOLE


@dataclass(frozen=True, slots=True)
class Prepare:
    """Pictures of the next question, prefilled before it is asked; or cancelled before that."""

    pictures: tuple[int, ...]
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Undo:
    """Forget this many turns, modulo how many there are."""

    turns: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Take one picture out of the transcript, modulo how many there are."""

    index: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Go on in a copy; the original stays as a branch."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Go on in another branch, modulo how many there are."""

    branch: int


@dataclass(frozen=True, slots=True)
class Fail:
    """What can't be done: an unreadable picture, too long a question, going back too far."""

    how: Literal["picture", "length", "undo", "drop"]


@dataclass(frozen=True, slots=True)
class SetSystem:
    """Another system message."""

    text: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Save to a file and go on with what is read from it, perhaps in another process."""

    elsewhere: bool = False


Operation = (
    Ask | Retry | Edit | Swap | Prepare | Undo | Drop | Fork | Switch | Fail | SetSystem | Resume
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole example: operations on a session whose context holds `limit` positions."""

    operations: tuple[Operation, ...]
    limit: int
    overflow: Literal["refuse", "drop"]


_TEXT = st.sampled_from(TEXTS)
_PICTURES = st.lists(st.integers(0, len(POOL) - 1), max_size=3).map(tuple)
_ENDING = st.one_of(
    st.just(WHOLE),
    st.just(WHOLE),
    st.builds(
        Ending,
        by=st.sampled_from(["cancelled", "closed", "raised"]),
        at=st.integers(0, 5),
        keep_partial=st.booleans(),
    ),
)
_ASKED = (
    st.builds(Ask, _TEXT, _PICTURES, _ENDING),
    st.builds(Ask, _TEXT, _PICTURES, st.just(WHOLE)),
    st.builds(Ask, _TEXT, st.just(()), st.just(WHOLE)),
)
_OPERATION: SearchStrategy[Operation] = st.one_of(
    *_ASKED,
    *_ASKED,
    *_ASKED,
    st.builds(Retry, st.sampled_from(SAMPLINGS), _ENDING),
    st.builds(Edit, _TEXT, st.none() | _PICTURES, _ENDING),
    st.builds(Swap, _ENDING),
    st.builds(Prepare, _PICTURES, st.booleans()),
    st.builds(Undo, st.integers(1, 3)),
    st.builds(Drop, st.integers(0, 5)),
    st.builds(Fork),
    st.builds(Switch, st.integers(0, 3)),
    st.builds(Fail, st.sampled_from(["picture", "length", "undo", "drop"])),
    st.builds(SetSystem, st.sampled_from(SYSTEMS)),
    st.builds(Resume, st.booleans()),
)


def conversations(*, operations: int) -> SearchStrategy[Conversation]:
    """Return conversations of at least this many operations, in a wide and in a tight context."""
    return st.builds(
        Conversation,
        st.lists(_OPERATION, min_size=operations, max_size=operations + 6).map(tuple),
        st.sampled_from([1024, 96, 72]),
        st.sampled_from(["drop", "refuse"]),
    )
