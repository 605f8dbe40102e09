"""Write examples/images: a few held-out pictures, and one that is beyond the demo model.

Knows which seeds are shown and under what names. Refuses to pick by hand afterwards: the same
command writes the same files, and evaluate.py's pictures come from the same generator.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from questions import description
from scenes import make_scene


@dataclass(frozen=True, slots=True)
class Example:
    """A picture to show: the seed that paints it, and what it must show."""

    name: str
    answer: str  # what the picture shows, word for word
    seed: int  # held out, and apart from the examination's pictures
    layout: str
    size: tuple[int, int]


EXAMPLES = (
    Example("red_circle.png", "A red circle.", 500010, "single", (256, 256)),
    Example("square_and_star.png", "A yellow square and a red star.", 500082, "row", (280, 280)),
    Example("three_shapes_landscape.png", "A red circle, a yellow triangle and a green square.",
            500054, "row", (360, 240)),
    Example("three_shapes_portrait.png", "A blue cross, an orange square and a pink star.",
            511013, "column", (220, 340)),
    Example("three_crosses_and_a_star.png", "Three orange crosses and a purple star.",
            500000, "groups", (280, 280)),
    Example("number_42.png", "The number 42 in blue.", 500903, "number", (256, 256)),
    Example("number_62_landscape.png", "The number 62 in blue.", 500019, "number", (360, 240)),
)  # fmt: skip


def paint(example: Example) -> Image.Image:
    scene = make_scene(example.seed, example.layout, example.size)
    if description(scene) != example.answer:
        raise ValueError(f"{example.name} would show: {description(scene)}")
    return scene.image


def still_life(width: int = 320, height: int = 240, seed: int = 7) -> Image.Image:
    """A lit ball, an egg and a cup-like box on a table by a window: shading, shadow, grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    wall = np.array([196, 186, 170]) * (1.06 - 0.55 * x - 0.12 * y)[..., None]
    grain_of_wood = np.sin(60 * y + 6 * np.sin(5 * x) + 3 * x) * 0.06 + np.sin(220 * y) * 0.02
    table = np.array([134, 92, 58]) * (0.72 + 0.5 * y - 0.35 * x + grain_of_wood)[..., None]
    edge = np.clip((y - 0.62) * 60, 0, 1)[..., None]
    picture = wall * (1 - edge) + table * edge
    window = (np.abs(x - 0.16) < 0.11) & (np.abs(y - 0.24) < 0.18)
    bars = (np.abs(x - 0.16) < 0.008) | (np.abs(y - 0.24) < 0.01)
    picture[window & ~bars] = np.array([226, 236, 246])
    picture[window & ~bars] -= ((y * 60)[window & ~bars])[:, None]
    balls = (
        (0.38, 0.66, 0.13, 1.0, (150, 48, 36)),
        (0.62, 0.71, 0.085, 0.8, (214, 196, 172)),
        (0.80, 0.62, 0.15, 1.25, (92, 110, 84)),
    )
    for cx, cy, radius, *_ in balls:
        shadow_x, shadow_y = (x - cx - 0.09) / (radius * 1.5), (y - cy - radius * 1.1) / 0.05
        shadow = np.exp(-(shadow_x**2 + shadow_y**2))
        picture *= (1 - 0.55 * shadow * edge[..., 0])[..., None]
    for cx, cy, radius, squash, rgb in balls:
        picture = _ball(
            picture, x, y * height / width, (cx, cy * height / width, radius, squash), np.array(rgb)
        )
    picture += rng.normal(0, 5, picture.shape)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), "RGB")
    return image.filter(ImageFilter.GaussianBlur(0.7))


def _ball(
    picture: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    place: tuple[float, float, float, float],
    rgb: np.ndarray,
) -> np.ndarray:
    """An ellipsoid lit from the upper left, with a highlight and light thrown back from below."""
    cx, cy, radius, squash = place
    u, v = (x - cx) / radius, (y - cy) / (radius * squash * 0.8)
    inside = np.clip((1 - np.hypot(u, v)) * 40, 0, 1)[..., None]
    normal_z = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    light = np.clip(-0.55 * u - 0.6 * v + 0.58 * normal_z, 0, 1)
    back = np.clip(v, 0, 1) * 0.12
    shine = np.clip(-0.42 * u - 0.5 * v + 0.757 * normal_z, 0, 1) ** 40 * 110
    colour = rgb * (0.16 + 0.95 * light + back)[..., None] + shine[..., None]
    return picture * (1 - inside) + colour * inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images")
    args = parser.parse_args()
    for example in EXAMPLES:
        paint(example).save(args.out / example.name, optimize=True)
    still_life().save(args.out / "still_life_beyond_the_model.jpg", quality=82)


if __name__ == "__main__":
    main()
