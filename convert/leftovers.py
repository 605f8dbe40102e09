"""The hidden folders beside a destination: whose they are, and what becomes of those left behind.

`.NAME.partial-XXXXXX` is being made: worth nothing until it is renamed. `.NAME.replaced-XXXXXX` is
a whole folder moved aside for a moment. Each is held by a lock that dies with its process, so that
leftovers are told from work in progress. Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

from fastvlm_mlx.errors import CheckpointError, one_line

_LEFTOVER = re.compile(r"[0-9a-f]{6}")
# A disk that knows no locks on folders (NFS, some FUSE) or no fsync of them says one of these.
_UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def hidden_name(place: Path, kind: str) -> Path:
    """Return a new name beside `place`; `kind` is partial or replaced."""
    return place.with_name(f".{place.name}.{kind}-{secrets.token_hex(3)}")


def _leftovers(place: Path, kind: str) -> Iterator[tuple[Path, bool]]:
    """Yield this user's leftover folders of a kind, newest first, each held while it is looked at.

    What a living process holds is not yielded. With each, whether its process is known to be dead:
    not so on a disk without locks.
    """
    prefix = f".{place.name}.{kind}-"
    found: list[tuple[int, Path]] = []
    for path in place.parent.iterdir():
        if path.name.startswith(prefix) and _LEFTOVER.fullmatch(path.name.removeprefix(prefix)):
            with suppress(FileNotFoundError):  # another run has just finished
                stat = path.lstat()
                if stat.st_uid == os.geteuid() and S_ISDIR(stat.st_mode):
                    found.append((stat.st_ctime_ns, path))
    for _, path in sorted(found, reverse=True):
        with suppress(FileNotFoundError, BlockingIOError):  # gone meanwhile, or held
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                is_dead = _lock(held)
                if _is_at(held, path):
                    yield path, is_dead
            finally:
                os.close(held)


def recover(place: Path) -> None:
    """Put back what a run killed between its two renames moved away; remove it if it was done."""
    for replaced, is_dead in _leftovers(place, "replaced"):
        if not os.path.lexists(place):
            replaced.rename(place)
            sync(place.parent)
        elif is_dead:
            _remove_replaced(place, replaced)


def _remove_replaced(place: Path, replaced: Path) -> None:
    # Renamed first: were this killed half-way, no later run may take the rest for a whole folder.
    doomed = replaced.rename(hidden_name(place, "partial"))
    # What cannot be removed now is named by the next run.
    shutil.rmtree(doomed, ignore_errors=True)


def remove_partials(place: Path) -> None:
    """Remove the partial folders of dead runs. Raises CheckpointError for one that stays."""
    for stale, is_dead in _leftovers(place, "partial"):
        try:
            if is_dead:
                shutil.rmtree(stale)
        except OSError as error:
            raise CheckpointError(
                f"{one_line(str(stale))}, left by an earlier run, cannot be removed "
                f"({error.strerror}): remove it by hand"
            ) from error


def make_partial(place: Path) -> tuple[Path, int]:
    """Return a new folder beside `place` and a descriptor that holds it while this process lives.

    Rights are as the umask says. Another run's clean-up may come before the lock: then once more.
    """
    while True:
        partial = hidden_name(place, "partial")
        partial.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):
            held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _lock(held)
                if _is_at(held, partial):
                    return partial, held
            except BaseException:
                os.close(held)
                raise
            os.close(held)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Hold a folder until its descriptor is closed, by kill -9 too; False if the disk cannot.

    Raises BlockingIOError if another process holds it and `wait` is off.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open folder is still the one at `path`. Raises FileNotFoundError if none is."""
    return os.path.samestat(os.fstat(descriptor), path.lstat())


def replace(place: Path, partial: Path) -> None:
    """Put `partial` in the place of the folder `place`: one of them is found at every moment."""
    replaced = hidden_name(place, "replaced")
    held = _hold_existing(place)
    try:
        try:
            place.rename(replaced)
            partial.rename(place)
        except BaseException:
            if replaced.exists() and not place.exists():
                replaced.rename(place)
            raise
        sync(place.parent)
        _remove_replaced(place, replaced)
    finally:
        os.close(held)


def _hold_existing(place: Path) -> int:
    """Return a descriptor that holds the folder at `place`, so that no `recover` touches it.

    A run that has just put it there holds it for a moment longer: wait for that one.
    """
    while True:
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _lock(held, wait=True)
            if _is_at(held, place):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def sync_all(folder: Path) -> None:
    """Have the disk keep every file of a folder, and the folder (fsync)."""
    for base, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(base) / name)
        sync(Path(base))


def sync(path: Path) -> None:
    """Have the disk keep a file's bytes or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
