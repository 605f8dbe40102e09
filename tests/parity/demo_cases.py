"""What the demo model is asked in the parity tests: pictures by integer arithmetic, and questions.

Knows neither torch nor fastvlm_mlx; the reference maker and the tests both read it, so they ask
about the same bytes on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RED, GREEN, BLUE = (220, 35, 40), (45, 160, 65), (45, 90, 215)
YELLOW, PURPLE, BLACK = (245, 215, 50), (130, 55, 170), (22, 22, 22)
WHITE, GREY, NIGHT = (250, 250, 250), (225, 225, 225), (30, 36, 66)

# (shape, colour, centre y, centre x, radius) in pixels
Mark = tuple[str, tuple[int, int, int], int, int, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that share their question: case name -> pictures.

    Of the `questions` the reference keeps the one with the clearest margins over all its cases.
    """

    cases: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


# name: (height, width, ground, marks)
PICTURES: dict[str, tuple[int, int, tuple[int, int, int], tuple[Mark, ...]]] = {
    "red circle": (256, 256, WHITE, (("circle", RED, 128, 128, 50),)),
    "blue square": (256, 256, GREY, (("square", BLUE, 128, 128, 44),)),
    "landscape": (
        200,
        320,
        WHITE,
        (("circle", GREEN, 100, 80, 45), ("square", PURPLE, 100, 240, 40)),
    ),
    "portrait": (
        340,
        220,
        NIGHT,
        (("square", YELLOW, 80, 110, 40), ("circle", RED, 250, 110, 48)),
    ),
    "three": (
        256,
        256,
        WHITE,
        (
            ("circle", BLACK, 60, 60, 30),
            ("circle", BLACK, 180, 80, 28),
            ("circle", BLACK, 120, 190, 32),
        ),
    ),
}

_DESCRIBE = (
    "Describe the image.",
    "What is this?",
    "What do you see?",
    "What is in the picture?",
    "What is in the image?",
    "What does the picture show?",
    "Describe what you see.",
    "Tell me what you see.",
)
_COLOUR = ("What colour is it?", "What colour is this?", "Which colour do you see?")
# Not a description: "Describe the second image." of a pair may be answered in the same words.
_PLACE = (
    "What is to the left of the square?",
    "What colour is the shape on the left?",
    "Where is the circle?",
)
_PAIR = (
    "Describe both images.",
    "Describe the pictures.",
    "What is in the pictures?",
    "What is in the first picture?",
    "Describe the second image.",
    "What do you see?",
)

GROUPS: tuple[Group, ...] = (
    Group({"text only": ()}, ("Who are you?", "What can you do?", "Thank you!", "Help")),
    Group({"one image": ("red circle",), "other image": ("blue square",)}, _COLOUR),
    Group({"portrait": ("portrait",)}, _DESCRIBE),
    Group({"landscape": ("landscape",)}, _PLACE),
    Group({"count": ("three",)}, ("How many circles are there?", "Count the circles.")),
    Group(
        {
            "two images": ("red circle", "landscape"),
            "two images swapped": ("landscape", "red circle"),
        },
        _PAIR,
    ),
)


def picture(name: str) -> NDArray[np.uint8]:
    """Return one of PICTURES, uint8 [height, width, 3]."""
    height, width, ground, marks = PICTURES[name]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = ground
    y, x = np.indices((height, width))
    for shape, colour, cy, cx, radius in marks:
        dy, dx = y - cy, x - cx
        inside = {
            "circle": dy * dy + dx * dx <= radius * radius,
            "square": np.maximum(abs(dy), abs(dx)) <= radius,
        }[shape]
        pixels[inside] = colour
    return pixels
