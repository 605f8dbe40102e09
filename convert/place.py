"""Where an artifact goes: refused up front, built beside its place, renamed when whole.

Knows folders and what disks refuse; of a model folder only its files' names. A run that is killed,
interrupted or out of disk leaves what was there, and at most a hidden folder beside it that the
next run clears up (`leftovers.py`). Linux and macOS.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm_mlx.checkpoint.hub import is_license_file
from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.convert import leftovers
from fastvlm_mlx.errors import CheckpointError, one_line

# What a model folder may hold, by path, licence files apart: those are named by `is_license_file`.
# Anything else is somebody's and is never removed.
_ARTIFACT_FILES = re.compile(
    r"model[^/]*\.safetensors(\.index\.json)?|chat_template\.jinja|README\.md|merges\.txt"
    r"|(added_tokens|chat_template|config|generation_config|preprocessor_config|processor_config"
    r"|report|special_tokens_map|tokenizer|tokenizer_config|vocab)\.json"
    r"|fastvithd\.mlpackage/(Manifest\.json|Data/.*\.mlmodel|Data/.*/weight\.bin)"
    r"|\.report\.json"  # a report that was being written
    r"|(.*/)?\.(DS_Store|gitkeep)"  # the Finder's; what keeps a folder in a repository
)
_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk of {folder}: nothing was written",
    errno.EDQUOT: "your quota on the disk of {folder} is used up: nothing was written",
    errno.EFBIG: "a file is larger than the disk of {folder} or your `ulimit -f` allows: "
    "nothing was written",
    errno.EROFS: "{folder} is on a read-only file system: choose another folder",
    errno.EACCES: "no permission to write {folder}: change its rights, or choose another folder",
    errno.EPERM: "no permission to write {folder}: change its rights, or choose another folder",
    errno.ENAMETOOLONG: "the name {folder} is too long for its disk: choose a shorter one",
    errno.EIO: "a disk failed (input/output error) while {folder} was made: nothing was written",
    errno.EBUSY: "{folder} is in use as a mount point: choose a folder inside it",
}


def disk_error(error: OSError, folder: Path) -> CheckpointError:
    """Return what a failure to write `folder` means, in one line."""
    line = _DISK_ERRORS.get(error.errno or 0, "{folder} cannot be written: {reason}")
    return CheckpointError(
        one_line(line.format(folder=folder, reason=error.strerror or str(error)))
    )


def require_space(folder: Path, nbytes: int) -> None:
    """Raise CheckpointError if the disk that `folder` is or will be on has less than `nbytes`."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise CheckpointError(
            f"{folder} needs {readable_bytes(nbytes)}, its disk has {readable_bytes(free)} free: "
            "make room, or choose another disk"
        )


def check_destination(dst: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise CheckpointError for every reason not to make a model folder at `dst`.

    What a killed run moved out of the way comes back first. `source` is a folder that is only read:
    `dst` may not be it, nor lie inside it, nor around it or its files.
    """
    with _explained(dst):
        place = _locate(dst)
        if source is not None:
            _keep_apart(dst, place, source)
        writable = os.access(place.parent, os.W_OK | os.X_OK)
        if writable:
            leftovers.recover(place)
        _check_existing(dst, place, overwrite=overwrite)
        if not writable:
            read_only = os.statvfs(place.parent).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "")
        # Would a name be too long? This one is as long as any that is made.
        with suppress(FileNotFoundError):
            leftovers.hidden_name(place, "replaced").lstat()


@contextmanager
def new_folder(dst: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `dst` that becomes `dst` when the block ends.

    Its files are on the disk (fsync) before the rename. On any exception it is removed and `dst` is
    as it was. Other runs' partial folders are removed unless a living process holds them. Raises
    CheckpointError as `check_destination` does, and for what the disk refuses.
    """
    check_destination(dst, overwrite=overwrite, source=source)
    with _explained(dst):
        place = _locate(dst)
        leftovers.remove_partials(place)
        partial, held = leftovers.make_partial(place)
    try:
        with _explained(dst, partial):
            yield partial
            leftovers.sync_all(partial)
        with _explained(dst):
            _finish(dst, place, partial, overwrite=overwrite)
    except BaseException:
        # What cannot be removed now, the next run removes.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(held)


def _finish(dst: Path, place: Path, partial: Path, *, overwrite: bool) -> None:
    """Rename `partial` to `place`, over what is there only if that is still allowed.

    With `overwrite`, what another run puts there or moves away at that moment: then once more.
    """
    while True:
        try:
            if overwrite and place.exists():
                _check_existing(dst, place, overwrite=True)
                leftovers.replace(place, partial)
            else:
                partial.rename(place)
                leftovers.sync(place.parent)
            return
        except OSError as error:
            was_made = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if was_made and not overwrite:
                raise CheckpointError(
                    f"{dst} was made by another process meanwhile: "
                    "add --overwrite to replace it, or choose another folder"
                ) from error
            is_gone = error.errno == errno.ENOENT and partial.exists()
            if not (overwrite and (was_made or is_gone)):
                raise


@contextmanager
def _explained(dst: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn what a disk refuses into one line about `dst`.

    With `partial`, the block is the caller's: a failure to read another file is said of that file,
    and what no disk says (a closed pipe, a network error) passes.
    """
    try:
        yield
    except OSError as error:
        given = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        if partial is None or any(Path(name).is_relative_to(partial) for name in given):
            raise disk_error(error, dst) from error
        if given:
            raise CheckpointError(
                f"{one_line(given[0])} cannot be read or written: {error.strerror}"
            ) from error
        if error.errno in _DISK_ERRORS:
            raise disk_error(error, dst) from error
        raise


def _locate(dst: Path) -> Path:
    """Return `dst` with its parent's true path, its own name kept. Raises CheckpointError."""
    if dst.name in ("", ".."):
        dst = dst.resolve()
    parent = dst.parent
    try:
        is_folder = stat.S_ISDIR(parent.stat().st_mode)
    except NotADirectoryError:
        is_folder = False
    except FileNotFoundError as error:
        raise CheckpointError(f"{parent} is missing: make that folder first") from error
    if not is_folder:
        raise CheckpointError(f"{parent} is no folder: choose another place than {dst}")
    return parent.resolve() / dst.name


def _keep_apart(dst: Path, place: Path, source: Path) -> None:
    """Raise CheckpointError if writing `place` could touch the source or the files it links to."""
    kept = source.resolve()
    if _is_inside(place, kept):
        where = "is" if _is_inside(kept, place) else "lies inside"
        raise CheckpointError(f"{dst} {where} the source {source}: choose another folder")
    files = kept.iterdir() if kept.is_dir() else ()
    if any(_is_inside(file.resolve(), place) for file in (kept, *files)):
        raise CheckpointError(f"{dst} holds files of the source {source}: choose another folder")


def _is_inside(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or below it, also where names differ in case only (macOS)."""
    if inner.is_relative_to(outer):
        return True
    if not outer.exists():
        return False
    return any(place.samefile(outer) for place in (inner, *inner.parents) if place.exists())


def _check_existing(dst: Path, place: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if something at `place` may not be replaced."""
    if place.is_symlink():
        raise CheckpointError(f"{dst} is a symbolic link: name the folder itself, or another")
    if not place.exists():
        return
    if not place.is_dir():
        raise CheckpointError(f"{dst} is a file: choose another name")
    if place.is_mount():
        raise OSError(errno.EBUSY, "")
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{dst} exists: add --overwrite to replace it, or choose another folder"
        )
    for name in sorted(_entries(place)):
        is_license = "/" not in name and is_license_file(name)
        if not is_license and _ARTIFACT_FILES.fullmatch(name) is None:
            raise CheckpointError(
                f"{dst} holds {one_line(name)}, which is no part of a model folder: move it away"
            )
    if not (place / "config.json").exists():
        raise CheckpointError(
            f"{dst} has no config.json, so it is no model folder: choose another, or move it away"
        )


def _entries(folder: Path) -> Iterator[str]:
    """Yield the relative path of each file and each empty folder, the latter ending in a slash."""
    for base, folders, files in os.walk(folder):
        below = Path(base).relative_to(folder)
        for name in (*files, *(name for name in folders if (Path(base) / name).is_symlink())):
            yield (below / name).as_posix()
        if not folders and not files:
            yield f"{below.as_posix()}/"
