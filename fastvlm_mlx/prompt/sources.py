"""Encoded bytes of a picture from a path, a URL, a `data:` URI or standard input, and its name.

Knows where bytes come from and how to name a source in an error: one printable line, however long
or odd it is. Refuses to know what the bytes hold.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import sys
import urllib.parse
from pathlib import Path
from typing import IO

from fastvlm_mlx.errors import ImageError

MAX_BYTES = 512 * 2**20
"""Largest encoded picture read from a file or standard input."""
MAX_DOWNLOAD_BYTES = 64 * 2**20
MAX_DOWNLOAD_S = 30.0


def read_bytes(source: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a path (`~` expanded), http(s) URL, `data:` URI or "-", standard input.

    Raises ImageError, naming the source, or FetchError.
    """
    name = source_name(source)
    if isinstance(source, str):
        scheme = source[:8].lower()
        if source == "-":
            return _capped(sys.stdin.buffer, name)
        if scheme.startswith("data:"):
            return _from_data_uri(source, name)
        if scheme.startswith(("http://", "https://")):
            from fastvlm_mlx.fetch import fetch  # urllib and ssl: 30 ms that a file need not pay

            return fetch(source, max_bytes=MAX_DOWNLOAD_BYTES, timeout_s=MAX_DOWNLOAD_S)
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # ~name of no known user: then it is a file's name
        path = path.expanduser()
    try:
        with path.open("rb") as file:
            return _capped(file, name)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder, not a picture") from error
    except PermissionError as error:
        raise ImageError(f"{name}: no permission to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"{name} cannot be read: {reason}") from error


def _capped(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} is larger than {MAX_BYTES >> 20} MiB, the limit for a picture")
    return data


def _from_data_uri(uri: str, name: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma before its data")
    try:
        data = urllib.parse.unquote_to_bytes(body)
        if not head.lower().endswith(";base64"):
            return data
        data = b"".join(data.split()).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ImageError(f"{name} does not hold valid base64") from error


def source_name(source: str | os.PathLike[str]) -> str:
    """Name a source in an error: long paths shortened, `data:` URIs by type and length."""
    text = os.fsdecode(source)
    if source == "-":
        return "standard input"
    if text[:5].lower() == "data:":
        kind = text[5:45].partition(",")[0].partition(";")[0]
        return f"data: URI ({printable(kind) or 'no type'}, {len(text)} characters)"
    return printable(text if len(text) <= 160 else f"{text[:80]}…{text[-60:]}") or "''"


def printable(text: str) -> str:
    """Return text fit for one line of a terminal; what is not printable becomes "?"."""
    return "".join(char if char.isprintable() else "?" for char in text.strip())
