"""Pictures that differ: patches of random colours."""

from __future__ import annotations

import numpy as np


def picture(seed: int) -> np.ndarray:
    """Return uint8 [96, 128, 3]: six rows of eight patches."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
