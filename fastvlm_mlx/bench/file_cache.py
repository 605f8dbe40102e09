"""How much of a file the system holds in memory already: whether reading it will reach the disk.

Knows `mincore`, which says so page by page without reading any, how to have files read, and how
Linux is asked to forget them. Knows weights by their files' names alone.
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

from fastvlm_mlx.errors import FastVLMError

WARM, COLD = 0.99, 0.01
"""From which share in memory a file's reading is called warm, and up to which cold."""
_BLOCK = 1 << 24  # bytes read at once


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


def weight_files(*folders: Path) -> list[Path]:
    """Return the files of some model folders that hold weights, sorted."""
    found = [path for folder in folders for path in folder.glob("*")]
    return sorted(path for path in found if path.suffix in (".safetensors", ".bin"))


def read_through(paths: Sequence[Path]) -> None:
    """Read files whole, so that who reads them next finds them in memory, if that is large enough.

    Raises OSError for one that cannot be read.
    """
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass


def forget(paths: Sequence[Path]) -> None:
    """Ask the system to drop files from its cache. Raises FastVLMError where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        raise FastVLMError("only Linux can be asked to forget the weights' files")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
