"""On Linux without a GPU: OpenBLAS, made global before mlx.core is first imported.

MLX's Linux CPU wheel links a reference BLAS; a global OpenBLAS takes its place at symbol lookup
and is tens of times faster in float32. No effect elsewhere, or where no OpenBLAS is installed.
Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator


def preload() -> bool:
    """Load OpenBLAS with RTLD_GLOBAL; return whether it is now loaded. Safe to call twice."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    for name in _names():
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _names() -> Iterator[str]:
    """Debian's name first: a search for others starts programs, and takes 10 ms to import."""
    yield "libopenblas.so.0"
    from ctypes.util import find_library

    found = find_library("openblas")
    if found is not None:
        yield found
