"""The clipboard of a Mac: its picture, and its text.

Knows macOS's own `osascript` and `pbpaste`, and nothing that would have to be installed. Other
systems have no one way to ask; there a picture is given as a file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from fastvlm_mlx.errors import ImageError, one_line
from fastvlm_mlx.terminal.dropped import PICTURE_SUFFIXES

_TIMEOUT_S = 20
# AppleScript's error numbers for "the clipboard holds no such thing".
_NONE_THERE = ("(-1700)", "(-1728)", "(-25131)")


def picture_in_clipboard() -> bytes | None:
    """Return the clipboard's picture as PNG or TIFF, or the picture file copied in the Finder.

    None if there is no picture in it. Raises ImageError where there is no `osascript` (any system
    but macOS) and if it fails.
    """
    if shutil.which("osascript") is None:
        raise ImageError("pictures can be taken from the clipboard on macOS only: give a file")
    for kind in ("PNGf", "TIFF"):
        said = _ask(f"the clipboard as «class {kind}»")
        match = re.fullmatch(rf"«data {kind}([0-9A-Fa-f]*)»", (said or "").strip())
        if match is not None:
            try:
                return bytes.fromhex(match[1])
            except ValueError as error:
                raise ImageError("the clipboard's picture came cut short: copy it again") from error
    name = (_ask("POSIX path of (the clipboard as «class furl»)") or "").removesuffix("\n")
    if not name.lower().endswith(PICTURE_SUFFIXES):
        return None
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ImageError(f"{one_line(name)} cannot be read: {error.strerror}") from error


def text_in_clipboard() -> str:
    """Return the clipboard's text; "" if it holds none or cannot be asked for it."""
    if shutil.which("pbpaste") is None:
        return ""
    try:
        done = subprocess.run(["pbpaste"], capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", errors="replace")


def _ask(expression: str) -> str | None:
    """Return what AppleScript says; None if the clipboard holds no such thing."""
    try:
        done = subprocess.run(
            ["osascript", "-e", expression],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"the clipboard gave no answer in {_TIMEOUT_S} s") from error
    except OSError as error:
        raise ImageError(f"osascript cannot be run: {error.strerror}") from error
    said = done.stdout.decode("utf-8", errors="replace")
    if done.returncode == 0:
        return said
    complaint = one_line(done.stderr.decode("utf-8", errors="replace"))[:200]
    if any(number in complaint for number in _NONE_THERE):
        return None
    raise ImageError(f"the clipboard cannot be read: {complaint or 'osascript failed'}")
