"""The place of a session file: opened without waiting, replaced whole or not at all.

Knows what disks refuse and says it in one line. Refuses to know what is in the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastvlm_mlx.errors import SessionError, one_line

_STALE_S = 3600.0  # a temporary file that nobody wrote to for so long is a dead run's
_DISK_ERRORS = {
    errno.ENOENT: "its folder is missing: make that first",
    errno.ENOTDIR: "its folder is a file: choose another place",
    errno.EISDIR: "it is a folder: give a file's name",
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "your quota on that disk is used up",
    errno.EFBIG: "it would be larger than the disk or your `ulimit -f` allows",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.EACCES: "no permission: change the rights, or choose another place",
    errno.EPERM: "no permission: change the rights, or choose another place",
    errno.ENAMETOOLONG: "the name is too long for the disk: choose a shorter one",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.EIO: "the disk failed (input/output error)",
}


def unsaved(path: str | os.PathLike[str], error: OSError | ValueError) -> SessionError:
    """Return what a failure to write means, in one line about `path` as the user wrote it."""
    number = error.errno if isinstance(error, OSError) else None
    reason = _DISK_ERRORS.get(number or 0, one_line(str(error)))
    return SessionError(f"{printed(path)} was not saved: {reason}")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return `path` with `~` as the home folder."""
    with contextlib.suppress(RuntimeError):  # ~name of no known user: then it is a file's name
        return Path(path).expanduser()
    return Path(path)


def printed(path: str | os.PathLike[str]) -> str:
    """Return a path fit for one line of a message."""
    return one_line(os.fspath(path)) or "''"


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, for anything but a file too; never waits."""
    # Opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no file but a device or pipe")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def unreadable(name: str, error: OSError | ValueError) -> str:
    """Return what a failure to read means, in one line."""
    if isinstance(error, FileNotFoundError):
        return f"{name}: no such session file"
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder, not a session file"
    if isinstance(error, PermissionError):
        return f"{name}: no permission to read it"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{name} cannot be read as a session: {one_line(reason)}"


def is_taken(place: Path) -> bool:
    """Whether there is something that may not simply be replaced. Raises OSError."""
    try:
        found = place.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(found.st_mode) and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, "")  # a rename would not ask
    return not (stat.S_ISREG(found.st_mode) and found.st_size == 0)


_PREFIX, _SUFFIX = ".fastvlm-session-", ".partial"


@contextlib.contextmanager
def replacing(place: Path, *, permissions: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a new file that takes `place` when the block ends well, and is gone otherwise.

    By default nobody else may read it; the umask is taken from `permissions`.
    """
    partial = place.with_name(f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(partial, flags, permissions), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the folder's names; some disks know no fsync of folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove what saves that were killed left in `folder`, so that it does not fill the disk."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for item in found:
            if item.name.startswith(_PREFIX) and item.name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):
                    if time.time() - item.stat(follow_symlinks=False).st_mtime > _STALE_S:
                        Path(item.path).unlink()
