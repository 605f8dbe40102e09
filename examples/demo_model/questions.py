"""Questions about a scene, in varied English, with their one right answer.

Knows the wording and the truth; refuses to know how a picture is painted or how text becomes
tokens. Every answer is one short phrase with a capital letter and a full stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from painting import Shape
from scenes import Scene

KINDS = ("describe", "shape", "colour", "count", "where", "number")
COUNT_WORDS = ("no", "one", "two", "three", "four")

DESCRIBE = (
    "Describe the image.", "Describe the picture.", "Describe this image.", "What is this?",
    "What is in the picture?", "What is in the image?", "What's in the picture?",
    "What do you see?", "What can you see in this picture?", "What does the picture show?",
    "What does this image show?", "Tell me what you see.", "Describe what you see.",
    "Give a short description of the image.", "What is shown here?", "Caption this picture.",
)  # fmt: skip
READ = (
    "What number is this?", "What is the number?", "Read the number.", "What number do you see?",
    "Which number is shown?", "What number is in the picture?", "What does it say?",
    "Which number is written here?", "Can you read the number?", "What number is written here?",
    "Read the number in the image.", "What is written in the picture?",
)  # fmt: skip
ONE_SHAPE = (
    "What shape is this?", "Which shape is this?", "What shape do you see?",
    "What shape is in the picture?", "Which shape is shown?", "Name the shape.",
    "What kind of shape is it?",
)  # fmt: skip
SHAPE_BY_COLOUR = (
    "What shape is {colour}?", "Which shape is {colour}?", "What shape is the {colour} one?",
    "What is the shape of the {colour} object?", "What is the {colour} shape?",
    "What shape is the {colour} thing?",
)  # fmt: skip
SHAPE_BY_PLACE = ("What shape is {place}?", "Which shape is {place}?", "Name the shape {place}.")
ONE_COLOUR = (
    "What colour is it?", "What color is it?", "What colour is this?", "What color is this?",
    "What colour is the shape?", "What color is the shape?", "Which colour do you see?",
)  # fmt: skip
COLOUR_OF = (
    "What colour is the {thing}?", "What color is the {thing}?", "Which colour is the {thing}?",
    "Which color is the {thing}?", "What is the colour of the {thing}?",
    "What is the color of the {thing}?", "Tell me the colour of the {thing}.",
    "What colour does the {thing} have?",
)  # fmt: skip
HOW_MANY = (
    "How many {things} are there?", "How many {things} do you see?", "Count the {things}.",
    "How many {things} are in the picture?", "How many {things} can you see?",
    "How many {things} are in the image?", "What is the number of {things}?",
)  # fmt: skip
WHERE = (
    "Where is the {thing}?", "Where is the {thing} in the picture?",
    "Where do you see the {thing}?", "Where can I find the {thing}?",
    "In which part of the picture is the {thing}?",
)  # fmt: skip
RELATION = {
    ("row", -1): ("What is to the left of the {thing}?", "What is left of the {thing}?"),
    ("row", 1): ("What is to the right of the {thing}?", "What is right of the {thing}?"),
    ("column", -1): ("What is above the {thing}?", "What is over the {thing}?"),
    ("column", 1): ("What is below the {thing}?", "What is under the {thing}?"),
}
SMALL_TALK = (
    ("Hello", "Hello! Show me a picture of coloured shapes or a number."),
    ("Hi", "Hello! Show me a picture of coloured shapes or a number."),
    ("Good morning", "Hello! Show me a picture of coloured shapes or a number."),
    ("Who are you", "I am a small demo model. Show me a picture of coloured shapes or a number."),
    ("What are you", "I am a small demo model. Show me a picture of coloured shapes or a number."),
    ("What can you do", "I can name shapes, colours, places and counts, and read short numbers."),
    ("Help", "I can name shapes, colours, places and counts, and read short numbers."),
    ("What do you know", "I can name shapes, colours, places and counts, and read short numbers."),
    ("Thanks", "You are welcome."),
    ("Thank you", "You are welcome."),
    ("Tell me a story", "I am a small demo model. I only know shapes, colours and numbers."),
    ("How are you", "I am a small demo model. I only know shapes, colours and numbers."),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its kind (one of KINDS, or text) and the one right answer."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()  # numbers of the shapes that the question points at
    shown_by: tuple[int, ...] = ()  # and of those that show the answer


def questions_about(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every kind that makes sense for the scene, in the order of KINDS."""
    makers: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
        "describe": lambda s, r: Question("describe", _pick(r, DESCRIBE), description(s)),
        "shape": _ask_shape,
        "colour": _ask_colour,
        "count": _ask_count,
        "where": _ask_where,
        "number": _ask_number,
    }
    asked = (makers[kind](scene, rng) for kind in KINDS)
    return [question for question in asked if question]


def description(scene: Scene) -> str:
    """ "A red circle and a blue square.": rows left to right, columns downwards, most first."""
    if scene.number:
        return f"The number {scene.number} in {scene.number_colour}."
    if scene.layout == "groups":
        parts = [_noun_phrase(shape, count) for shape, count in _groups(scene)]
    else:
        parts = [
            f"a {shape.colour} {shape.shape}".replace("a orange", "an orange")
            for shape in scene.shapes
        ]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return _sentence(text)


def small_talk(rng: np.random.Generator) -> Question:
    """A turn without a picture."""
    text, answer = SMALL_TALK[rng.integers(len(SMALL_TALK))]
    mark = "?" if text.split()[0] in ("Who", "What", "How") else _pick(rng, ("", ".", "!"))
    return Question("text", text + mark, answer)


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[rng.integers(len(options))]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _groups(scene: Scene) -> list[tuple[Shape, int]]:
    """One member of each kind with how many there are."""
    kinds = dict.fromkeys((s.shape, s.colour) for s in scene.shapes)
    members = [[s for s in scene.shapes if (s.shape, s.colour) == kind] for kind in kinds]
    return [(group[0], len(group)) for group in members]


def _noun_phrase(shape: Shape, count: int) -> str:
    if count == 1:
        return f"{'an' if shape.colour == 'orange' else 'a'} {shape.colour} {shape.shape}"
    return f"{COUNT_WORDS[count]} {shape.colour} {_plural(shape.shape)}"


def _thing(rng: np.random.Generator, shape: Shape) -> str:
    """A way to point at a shape that is alone in its shape and its colour."""
    return _pick(rng, [shape.shape, f"{shape.colour} shape", f"{shape.colour} {shape.shape}"])


def _alike(scene: Scene, shape: str) -> tuple[int, ...]:
    return tuple(i for i, s in enumerate(scene.shapes) if s.shape == shape)


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.number:
        return None
    index = int(rng.integers(len(scene.shapes)))
    target = scene.shapes[index]
    if scene.layout == "single":
        text = _pick(rng, ONE_SHAPE)
    elif scene.layout == "groups":
        if sum(s.colour == target.colour for s in scene.shapes) > 1:
            return None
        text = _pick(rng, SHAPE_BY_COLOUR).format(colour=target.colour)
    else:
        options = SHAPE_BY_COLOUR + SHAPE_BY_PLACE
        text = _pick(rng, options).format(colour=target.colour, place=target.place)
    return Question("shape", text, f"A {target.shape}.", (index,), (index,))


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question:
    if scene.number:
        return Question(
            "colour", _pick(rng, COLOUR_OF).format(thing="number"), _sentence(scene.number_colour)
        )
    target = scene.shapes[rng.integers(len(scene.shapes))]
    if scene.layout == "groups":
        count = len([s for s in scene.shapes if s.shape == target.shape])
        thing = target.shape if count == 1 else _plural(target.shape)
        text = _pick(rng, COLOUR_OF).format(thing=thing)
        if count > 1:
            text = text.replace(" is the ", " are the ").replace(" does ", " do ")
            text = text.replace("What are the colo", "What is the colo")
    elif scene.layout == "single" and rng.random() < 0.5:
        text = _pick(rng, ONE_COLOUR)
    else:
        thing = _pick(rng, [target.shape, target.shape, f"shape {target.place}"])
        text = _pick(rng, COLOUR_OF).format(thing=thing)
    same = _alike(scene, target.shape)
    return Question("colour", text, _sentence(target.colour), same, same)


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.number:
        return None
    target = scene.shapes[rng.integers(len(scene.shapes))]
    shape, colour = target.shape, target.colour
    way = int(rng.integers(4))
    if way == 0:
        things, count = _plural(shape), sum(s.shape == shape for s in scene.shapes)
    elif way == 1:
        things, count = f"{colour} shapes", sum(s.colour == colour for s in scene.shapes)
    else:
        things, count = _pick(rng, ("shapes", "shapes", "objects")), len(scene.shapes)
    return Question(
        "count", _pick(rng, HOW_MANY).format(things=things), _sentence(COUNT_WORDS[count])
    )


def _ask_where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The place of a shape, or which shape is next to another."""
    if scene.layout in ("number", "groups"):
        return None
    index = int(rng.integers(len(scene.shapes)))
    target = scene.shapes[index]
    alone = scene.layout == "single" and rng.random() < 0.3
    thing = "shape" if alone else _thing(rng, target)
    steps = [s for s in (-1, 1) if 0 <= index + s < len(scene.shapes)]
    if scene.layout == "single" or rng.random() < 0.5:
        text = _pick(rng, WHERE).format(thing=thing)
        return Question("where", text, _sentence(target.place), (index,), (index,))
    step = steps[rng.integers(len(steps))]
    # The neighbour in direction `step` is the answer, so the question names the target.
    text = _pick(rng, RELATION[scene.layout, step]).format(thing=thing)
    neighbour = _sentence(_noun_phrase(scene.shapes[index + step], 1))
    return Question("where", text, neighbour, (index,), (index + step,))


def _ask_number(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("number", _pick(rng, READ), f"{scene.number}.") if scene.number else None
