"""Result files: read as a report, written whole or not at all, never over something else.

Knows the kinds of file a benchmark leaves (JSON, CSV, PNG, Markdown) and what disks refuse. Whether
a place can be written is found out before anything is measured.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.results import NO_RESULT, Report
from fastvlm_mlx.bench.spreadsheet import CSV_COLUMNS
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generate.whole_file import expanded, open_regular, printed, replacing, unsaved

Place = str | os.PathLike[str]

_READABLE_BY_ALL = 0o666
_LARGEST = 64 << 20  # bytes; a report of a thousand cases is a few megabytes
_STARTS = {
    ".json": b"{",
    ".csv": ",".join(CSV_COLUMNS[:2]).encode(),
    ".png": b"\x89PNG\r\n\x1a\n",
    ".md": b"|",
}


def read_reports(path: Place) -> tuple[Report, ...]:
    """Read what `--save` or `--json` wrote: a report, or a sweep's several, one a model.

    Raises FastVLMError, one line naming the file.
    """
    name = printed(path)
    try:
        with open_regular(expanded(path)) as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise FastVLMError(f"{name}: no such file") from None
    except OSError as error:
        raise FastVLMError(f"{name} cannot be read: {error.strerror or error}") from error
    if len(raw) > _LARGEST:
        raise FastVLMError(f"{name} is no benchmark result: it is too large for one")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FastVLMError(f"{name} is no result of `fastvlm bench --save`: no JSON") from error
    try:
        first = Report.from_json(values)
        more = values.get("more", [])
        if not isinstance(more, list):
            raise FastVLMError(NO_RESULT)
        return (first, *map(Report.from_json, more))
    except FastVLMError as error:
        raise FastVLMError(f"{name}: {error}") from error


def require_place(path: Place, suffix: str) -> None:
    """Raise FastVLMError, one line, if a result could not be written to `path` later.

    `suffix` is ".json", ".csv", ".png" or ".md": an existing file of another kind is not replaced.
    """
    place = expanded(path)
    try:
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        _require_own(place, path, suffix)
        _try_writing(place.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def require_folder(path: Place) -> bool:
    """Make a folder if it is not there, and try it; return whether it was made.

    Raises FastVLMError, one line.
    """
    folder = expanded(path)
    try:
        made = not folder.is_dir()
        folder.mkdir(exist_ok=True)
        _try_writing(folder)
        return made
    except FileExistsError as error:
        raise FastVLMError(f"{printed(path)} is a file: give a folder's name") from error
    except OSError as error:
        raise _unwritable(path, error) from error


def remove_if_empty(path: Place) -> None:
    """Remove a folder that nothing was written to; any other stays."""
    with contextlib.suppress(OSError):
        expanded(path).rmdir()


def _require_own(place: Path, path: Place, suffix: str) -> None:
    """Refuse to replace what does not begin as such a file does; an empty file is nobody's."""
    try:
        with open_regular(place) as file:
            start = file.read(len(_STARTS[suffix]))
    except FileNotFoundError:
        return
    if start and start != _STARTS[suffix]:
        raise FastVLMError(
            f"{printed(path)} exists and is no {suffix} result of `fastvlm bench`: "
            "choose another name"
        )
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, "")  # a rename would not ask


def _try_writing(folder: Path) -> None:
    trial = folder / f".fastvlm-bench-{secrets.token_hex(6)}.trial"
    descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.close(descriptor)
    with contextlib.suppress(OSError):
        trial.unlink()


def _unwritable(path: Place, error: OSError) -> FastVLMError:
    reason = str(unsaved(path, error)).removeprefix(f"{printed(path)} was not saved: ")
    if error.errno == errno.ENOENT and expanded(path).parent.is_dir():
        reason = "this place takes no files: choose another one"  # as /proc
    return FastVLMError(f"{printed(path)} cannot be written: {reason}")


def write_json(path: Place, values: Any) -> None:
    """Write one JSON object, indented. Raises FastVLMError; an old file then stays as it was."""
    text = json.dumps(values, indent=1, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def write_csv(path: Place, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `csv_rows`'s rows under their heading. Raises FastVLMError as `write_json`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode(errors="replace"))


def write_pictures(folder: Place, pictures: Mapping[str, bytes]) -> list[Path]:
    """Write PNGs by file name and return where they are. Raises FastVLMError as `write_json`."""
    places = [expanded(folder) / name for name in pictures]
    for place, raw in zip(places, pictures.values(), strict=True):
        write_whole(place, raw)
    return places


def write_whole(path: Place, raw: bytes) -> None:
    """Write a file of any kind. Raises FastVLMError as `write_json`."""
    try:
        with replacing(expanded(path), permissions=_READABLE_BY_ALL) as file:
            file.write(raw)
    except OSError as error:
        raise _unwritable(path, error) from error
