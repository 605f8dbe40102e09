"""A picture in the terminal: as pixels where it can show them, else as half blocks of colour.

Knows the two protocols (iTerm2's OSC 1337, kitty's graphics APC) and which terminal speaks which.
Knows nothing of where pictures come from, and asks the terminal nothing: the environment tells.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

Protocol = Literal["iterm2", "kitty", "blocks"]
Colour: TypeAlias = tuple[int, int, int]

_MOST_COLUMNS = 40
_MOST_ROWS = 20
# The largest cell a picture is sent for; more pixels would not be seen.
_CELL_PIXELS = (16, 32)
# Longest base64 a chunk may carry: https://sw.kovidgoyal.net/kitty/graphics-protocol/
_KITTY_CHUNK = 4096
_CUBE = (0, 95, 135, 175, 215, 255)
_GREYS = tuple(range(8, 239, 10))


def detect(environ: Mapping[str, str], isatty: bool) -> Protocol | None:
    """Return how this terminal shows pictures; None where it shows none, or no colours.

    tmux and screen keep neither protocol's pictures where they belong: they get blocks.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not isatty or environ.get("NO_COLOR") or term in ("", "dumb"):
        return None
    if environ.get("TMUX") or environ.get("STY") or term.startswith(("screen", "tmux")):
        return "blocks"
    if environ.get("KITTY_WINDOW_ID") or program == "ghostty":
        return "kitty"
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "blocks"


def preview(
    image: Image.Image | np.ndarray,
    protocol: Protocol,
    *,
    columns: int,
    rows: int,
    color: bool,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Return what shows the picture at the cursor, in column 0, and leaves the cursor below it.

    `image` is a Pillow image or uint8 [H, W, 3]. It takes at most `columns` x `rows` cells, and 40
    columns, its shape kept (a cell counts as 1 x 2); what is transparent is shown on white. Without
    colour there is nothing to show: "".
    """
    if not color or columns < 2 or rows < 1:
        return ""
    picture = opaque(image)
    cells = fit(picture.size, columns=columns, rows=rows)
    if protocol == "blocks":
        deep = environ.get("COLORTERM") in ("truecolor", "24bit")
        return _blocks(picture, cells, deep=deep)
    png = _png(picture, cells)
    return _kitty(png, cells) if protocol == "kitty" else _iterm2(png, cells)


def opaque(image: Image.Image | np.ndarray) -> Image.Image:
    """Return the picture as RGB, on white where it was transparent."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")


def fit(size: tuple[int, int], *, columns: int, rows: int) -> tuple[int, int]:
    """Return (columns, rows) of cells for a picture of `size` pixels, its shape kept.

    The last column is left free, and no picture is blown up beyond a pixel a column.
    """
    width, height = size
    most_columns, most_rows = min(columns - 1, _MOST_COLUMNS), min(rows, _MOST_ROWS)
    scale = min(most_columns / width, 2 * most_rows / height, 1.0)
    return max(round(width * scale), 1), max(round(height * scale / 2), 1)


def _png(picture: Image.Image, cells: tuple[int, int]) -> bytes:
    """Return the picture, made no larger than its cells can show, as PNG."""
    small = picture.copy()
    small.thumbnail((cells[0] * _CELL_PIXELS[0], cells[1] * _CELL_PIXELS[1]))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return stream.getvalue()


def _kitty(png: bytes, cells: tuple[int, int]) -> str:
    """Return kitty's commands, with room made first: at the bottom a picture would be scrolled.

    C=1 leaves the cursor where it is, since terminals differ in where they put it otherwise.
    """
    columns, rows = cells
    data = base64.standard_b64encode(png).decode("ascii")
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    commands = []
    for index, chunk in enumerate(chunks):
        keys = f"a=T,f=100,q=2,C=1,c={columns},r={rows}," if index == 0 else ""
        more = int(index + 1 < len(chunks))
        commands.append(f"\x1b_G{keys}m={more};{chunk}\x1b\\")
    room = "\r\n" * rows + f"\x1b[{rows}A"
    return room + "".join(commands) + f"\x1b[{rows}B\r"


def _iterm2(png: bytes, cells: tuple[int, int]) -> str:
    """Return iTerm2's command: https://iterm2.com/documentation-images.html"""
    data = base64.standard_b64encode(png).decode("ascii")
    keys = f"inline=1;size={len(png)};width={cells[0]};height={cells[1]};preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{data}\x07\r\n"


def _blocks(picture: Image.Image, cells: tuple[int, int], *, deep: bool) -> str:
    """Return rows of upper half blocks: the upper pixel in the foreground, the lower behind."""
    columns, rows = cells
    small = picture.resize((columns, 2 * rows), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(rows, 2, columns, 3).tolist()
    name = _deep if deep else _indexed
    lines = []
    for upper, lower in pixels:
        line, last = "", ""
        for over, under in zip(upper, lower, strict=True):
            colours = f"\x1b[38;{name(over)};48;{name(under)}m"
            line += "▀" if colours == last else f"{colours}▀"
            last = colours
        lines.append(f"{line}\x1b[0m\r\n")
    return "".join(lines)


def _deep(colour: Colour) -> str:
    return f"2;{colour[0]};{colour[1]};{colour[2]}"


def _indexed(colour: Colour) -> str:
    """Return the nearest of xterm's 6 x 6 x 6 cube (from 16) and 24 greys (from 232)."""
    levels = [min(range(6), key=lambda i: abs(_CUBE[i] - value)) for value in colour]
    grey = min(range(24), key=lambda i: abs(_GREYS[i] - sum(colour) / 3))
    in_cube = sum((_CUBE[i] - value) ** 2 for i, value in zip(levels, colour, strict=True))
    in_grey = sum((_GREYS[grey] - value) ** 2 for value in colour)
    if in_grey < in_cube:
        return f"5;{232 + grey}"
    return f"5;{16 + 36 * levels[0] + 6 * levels[1] + levels[2]}"
