"""Synthetic pictures: coloured shapes and short printed numbers, from a seed.

Knows how to lay out a scene and how the project squares a picture (`square_pixels`). Refuses to
know about questions (questions.py), tokens or any framework: numpy and Pillow only.
The same seed gives the same picture with the same Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from painting import (
    BACKGROUNDS,
    SHAPES,
    Shape,
    colours_on,
    paint_background,
    paint_number,
    paint_shape,
)
from PIL import Image, ImageDraw

SIDE = 256  # pixels of the square the model sees
TRAIN_SEEDS = 1_000_000  # training pictures use seeds from here on; held-out ones stay below

COLUMN_WORDS = ("on the left", "in the middle", "on the right")
ROW_WORDS = ("at the top", "in the middle", "at the bottom")


@dataclass(frozen=True, slots=True)
class Scene:
    """`layout` is single, row, column, groups or number."""

    layout: str
    image: Image.Image
    shapes: tuple[Shape, ...] = ()
    number: str = ""
    number_colour: str = ""
    digit_centres: tuple[tuple[float, float], ...] = ()


def make_scene(seed: int, layout: str | None = None, size: tuple[int, int] | None = None) -> Scene:
    """The picture of one seed; `layout` and `size` pin what would otherwise be drawn."""
    rng = np.random.default_rng([seed, 20])
    drawn = str(
        rng.choice(["single", "row", "column", "groups", "number"], p=[0.2, 0.2, 0.2, 0.22, 0.18])
    )
    drawn_size = _canvas_size(rng)
    layout, size = layout or drawn, size or drawn_size
    if (layout == "row" and size[0] < size[1]) or (layout == "column" and size[0] > size[1]):
        size = size[::-1]
    ground = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image = paint_background(rng, size, ground)
    if layout == "number":
        printed = paint_number(rng, image, ground)
        return Scene(layout, image, (), printed.text, printed.colour, printed.centres)
    colours = colours_on(ground)
    place = {"single": _place_single, "groups": _place_groups}.get(layout)
    shapes = place(rng, size, colours) if place else _place_line(rng, size, colours, layout)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        paint_shape(rng, draw, shape)
    return Scene(layout, image, tuple(shapes))


def square_pixels(image: Image.Image) -> np.ndarray:
    """Pad on black to a square, bicubic to SIDE: uint8 [SIDE, SIDE, 3], as the engine does it."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pixel_digest(pixels: np.ndarray) -> bytes:
    return blake2b(pixels.tobytes(), digest_size=16).digest()


def held_out_scenes(count: int, first_seed: int = 0) -> Iterator[tuple[int, Scene]]:
    """(seed, scene) of `count` held-out pictures, no two alike in the pixels the model sees."""
    seen: set[bytes] = set()
    seed = first_seed
    while len(seen) < count:
        scene = make_scene(seed)
        digest = pixel_digest(square_pixels(scene.image))
        if digest not in seen:
            seen.add(digest)
            yield seed, scene
        seed += 1
        if seed >= TRAIN_SEEDS:
            raise ValueError("held-out seeds ran into the training seeds")


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    long = int(rng.integers(224, 361))
    short = long if rng.random() < 0.5 else int(long * rng.uniform(0.6, 0.85))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _place_single(
    rng: np.random.Generator, size: tuple[int, int], colours: list[str]
) -> list[Shape]:
    """One shape in one of nine areas."""
    column, row = (1, 1) if rng.random() < 0.15 else (int(rng.integers(3)), int(rng.integers(3)))
    width, height = size
    radius = min(size) * rng.uniform(0.13, 0.2)
    x = width * ((0.22, 0.5, 0.78)[column] + rng.uniform(-0.04, 0.04))
    y = height * ((0.22, 0.5, 0.78)[row] + rng.uniform(-0.04, 0.04))
    if column == row == 1:
        place, radius = "in the middle", radius * rng.uniform(1, 1.8)
    elif row == 1:
        place = COLUMN_WORDS[column]
    elif column == 1:
        place = ROW_WORDS[row]
    else:
        place = f"in the {('top', '', 'bottom')[row]} {('left', '', 'right')[column]} corner"
    return [Shape(str(rng.choice(SHAPES)), str(rng.choice(colours)), x, y, radius, place)]


def _place_line(
    rng: np.random.Generator, size: tuple[int, int], colours: list[str], layout: str
) -> list[Shape]:
    """Two or three shapes in a row or a column, all of different shape and colour."""
    count = int(rng.integers(2, 4))
    along, across = size if layout == "row" else size[::-1]
    words = COLUMN_WORDS if layout == "row" else ROW_WORDS
    kinds = rng.choice(SHAPES, count, replace=False)
    paints = rng.choice(colours, count, replace=False)
    shapes = []
    for index in range(count):
        radius = min(along / count * 0.42, across * 0.36) * rng.uniform(0.65, 0.95)
        a = along * (index + 0.5) / count + rng.uniform(-0.03, 0.03) * along
        b = across * (0.5 + rng.uniform(-0.09, 0.09))
        place = words[index if count == 3 else index * 2]
        x, y = (a, b) if layout == "row" else (b, a)
        shapes.append(Shape(str(kinds[index]), str(paints[index]), x, y, radius, place))
    return shapes


def _place_groups(
    rng: np.random.Generator, size: tuple[int, int], colours: list[str]
) -> list[Shape]:
    """Two to four shapes: one kind, or two kinds of which there are more of the first."""
    first, second = ((2, 0), (3, 0), (4, 0), (2, 1), (3, 1))[rng.integers(5)]
    kinds = rng.choice(SHAPES, 2, replace=False)
    paints = rng.choice(colours, 2, replace=False)
    members = [(str(kinds[0]), str(paints[0]))] * first + [(str(kinds[1]), str(paints[1]))] * second
    width, height = size
    base = math.sqrt(width * height / len(members)) * 0.3
    while True:
        base *= 0.97
        radii = [min(base, min(size) * 0.22) * rng.uniform(0.75, 1.0) for _ in members]
        centres: list[tuple[float, float]] = []
        for radius in radii:
            x = rng.uniform(radius * 1.1, width - radius * 1.1)
            y = rng.uniform(radius * 1.1, height - radius * 1.1)
            others = zip(centres, radii, strict=False)
            if any(math.dist((x, y), c) < (radius + r) * 1.15 for c, r in others):
                break
            centres.append((x, y))
        if len(centres) == len(members):
            return [
                Shape(kind, paint, x, y, radius)
                for (kind, paint), (x, y), radius in zip(members, centres, radii, strict=True)
            ]
