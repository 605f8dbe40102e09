"""How much of a file the system holds in memory already: whether reading it will reach the disk.

Knows `mincore`, which says so page by page without reading any. Changes nothing in the cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

WARM, COLD = 0.99, 0.01
"""From which share in memory a file's reading is called warm, and up to which cold."""


def resident_share(path: Path) -> float | None:
    """Return the share of a file's pages that are in memory, 0 to 1; None if that is not known.

    Linux tells a file's owner, or who may write it, only; other systems than Linux and macOS are
    not asked. Raises OSError if the file cannot be opened.
    """
    size = path.stat().st_size
    if sys.platform not in ("linux", "darwin") or size == 0:
        return None
    if path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK):
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        failed = mincore(view.ctypes.data, size, pages.ctypes.data)
        del view  # it holds the mapping open
    return None if failed else float(np.mean(pages & 1))


def file_cache_state(paths: Sequence[Path]) -> Literal["warm", "cold", "unknown"]:
    """Say whether reading these files will come from memory, from the disk, or from both.

    "unknown" is also what lies between, and no files. Raises OSError for one that cannot be opened.
    """
    shares = [resident_share(path) for path in paths]
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares):
        return "unknown"
    if min(known) >= WARM:
        return "warm"
    return "cold" if max(known) <= COLD else "unknown"
