"""What was typed before, kept in a file between runs.

Knows the file: one JSON string a line, oldest first, and nothing else in it (no times, no answers,
no pictures). Several chats may write at once: a line is appended in one write under a lock, and
what is too old is cut off by replacing the file whole. Knows nothing of keys or prompts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

HISTORY_VARIABLE = "FASTVLM_HISTORY"
MAX_ENTRIES = 1000
MAX_ENTRY_BYTES = 32 * 1024
"""A longer text (a pasted book) is remembered while the chat runs and not written."""
# Another chat holds the lock for a line's time; Enter must not wait for one that is stopped.
_LOCK_TRIES, _LOCK_PAUSE_S = 10, 0.01
_SLACK = 200  # so that not every line rewrites the file
_MAX_FILE_BYTES = 2 * 2**20


def history_path(environ: Mapping[str, str], *, platform: str = sys.platform) -> Path | None:
    """Return where the history is kept; None if FASTVLM_HISTORY is empty or there is no home."""
    chosen = environ.get(HISTORY_VARIABLE)
    try:
        if chosen is not None:
            return Path(chosen).expanduser() if chosen else None
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError:  # no home, or ~name of no known user
        return None
    if platform == "darwin":
        return home / "Library/Application Support/fastvlm/history"
    state = environ.get("XDG_STATE_HOME", "")
    # The XDG specification has a relative path ignored.
    base = Path(state) if state.startswith("/") else home / ".local/state"
    return base / "fastvlm/history"


class HistoryFile:
    """One file, readable by its owner only; every method may raise OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[str]:
        """Return at most `MAX_ENTRIES` texts, oldest first; a broken line is left out."""
        try:
            with self.path.open("rb") as file:
                return _parse(_tail(file.fileno()))
        except FileNotFoundError:
            return []

    def append(self, entry: str) -> None:
        """Write one text at the end, making file and folder as needed; cut off what is too old."""
        line = json.dumps(entry).encode() + b"\n"
        if len(line) > MAX_ENTRY_BYTES:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked() as file:
            size = os.fstat(file).st_size
            # A line that a crash cut short must not swallow this one.
            broken = size and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, (b"\n" if broken else b"") + line)
            content = _tail(file)
            if size > _MAX_FILE_BYTES or content.count(b"\n") > MAX_ENTRIES + _SLACK:
                self._replace(_parse(content[-_MAX_FILE_BYTES // 2 :]))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file for one writer; again if another has replaced it in the meantime."""
        while True:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            file = os.open(self.path, flags, 0o600)
            try:
                _lock(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), self.path.stat()):
                        os.fchmod(file, 0o600)
                        yield file
                        return
            finally:
                os.close(file)

    def _replace(self, entries: list[str]) -> None:
        handle, name = tempfile.mkstemp(prefix=".history-", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
            Path(name).replace(self.path.resolve())
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _lock(file: int) -> None:
    """Lock a file for one writer. Raises BlockingIOError if another one holds it for long."""
    for _ in range(_LOCK_TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOCK_PAUSE_S)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _tail(file: int) -> bytes:
    """Return the file's end, from a line's start if it is too large to be all of it."""
    size = os.fstat(file).st_size
    start = max(0, size - _MAX_FILE_BYTES)
    content = b""
    while chunk := os.pread(file, size - start - len(content), start + len(content)):
        content += chunk
    return content.partition(b"\n")[2] if start else content


def _parse(content: bytes) -> list[str]:
    entries: list[str] = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # a broken line costs itself only
            continue
        if isinstance(entry, str) and entry and entries[-1:] != [entry]:
            entries.append(entry)
    return entries[-MAX_ENTRIES:]
