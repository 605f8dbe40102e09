"""What each session file was when this chat last read or wrote it, and what no save may lose.

Tells another program's conversation in a file from ours. Knows nothing of conversations.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

_Stamp = tuple[int, int, int]


class SeenFiles:
    """A file's inode, size and time of change, by its real path."""

    def __init__(self) -> None:
        self._stamps: dict[str, _Stamp | None] = {}

    def note(self, file: Path) -> None:
        """Remember a file as it is now: just before it is read, or just after it was written."""
        self._stamps[os.path.realpath(file)] = _stamp(file)

    def is_others(self, file: Path) -> bool:
        """Return whether there is something in a file that was not read or written here."""
        now = _stamp(file)
        return now is not None and now != self._stamps.get(os.path.realpath(file))


def require_session(file: Path) -> None:
    """Raise the SessionError of a file that is no session, which no save replaces."""
    from fastvlm_mlx.generate.session_file import KIND, VERSION
    from fastvlm_mlx.generate.tensor_file import TensorFile

    TensorFile(file, kind=KIND, version=VERSION).close()


def keep_beside(file: Path) -> Path:
    """Give a damaged file a second name, FILE.damaged, that no save writes over; return it."""
    number = 1
    kept = file.with_name(f"{file.name}.damaged")
    while kept.exists():
        number += 1
        kept = file.with_name(f"{file.name}.damaged{number}")
    try:
        os.link(file, kept)
    except OSError:  # a file system without links
        shutil.copy2(file, kept)
    return kept


def _stamp(file: Path) -> _Stamp | None:
    """Return None where there is nothing to lose, or no regular file (the writer says so)."""
    try:
        found = file.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
