"""Pictures made of integer arithmetic alone, so that every machine makes the same bytes."""

from __future__ import annotations

import numpy as np

SIZES = {
    "landscape": (640, 427),
    "portrait": (427, 640),
    "odd_landscape": (641, 428),
    "odd_portrait": (428, 641),
    "square": (300, 300),
    "model_size": (1024, 1024),
    "model_width": (1024, 333),
    "large": (1500, 1100),
    "large_portrait": (1100, 1501),
    "one_pixel": (1, 1),
    "wide_line": (500, 7),
    "tall_line": (7, 500),
    "two_rows": (3, 2),
}
"""(width, height) in pixels."""


def picture(name: str) -> np.ndarray:
    """Return uint8 [H, W, 3]: slopes, hard edges and noise, different for each name."""
    width, height = SIZES[name]
    y, x, c = np.indices((height, width, 3), dtype=np.uint32)
    slope = (x * (3 + c) + y * (5 - c)) >> np.uint32(1)
    edges = ((x // 17 + y // 11 + c) & 1) * 97
    mixed = x * 2654435761 + y * 2246822519 + c * 3266489917 + (width * 668265263) % 2**32
    noise = mixed >> np.uint32(25)  # uint32 arithmetic wraps, the same everywhere
    return ((slope + edges + noise) & 255).astype(np.uint8)
