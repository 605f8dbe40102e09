"""MLX's pool of freed buffers, out of the way where memory is short. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def nothing_cached() -> Iterator[None]:
    """Hand freed buffers back at once, which MLX would otherwise keep beside those in use."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
