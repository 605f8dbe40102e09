from __future__ import annotations

import base64
import io
import re

import numpy as np
import pyte
import pytest
from PIL import Image

from fastvlm_mlx.terminal.inline_image import Protocol, detect, fit, opaque, preview
from tests.terminal.pyte_terminal import Terminal

TRUE_COLOUR = {"COLORTERM": "truecolor"}
PROTOCOLS: tuple[Protocol, ...] = ("kitty", "iterm2", "blocks")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "kitty"),
    ],
)
def test_the_environment_tells_the_protocol(
    environ: dict[str, str], protocol: Protocol | None
) -> None:
    assert detect(environ, True) == protocol
    assert detect(environ, False) is None


@pytest.mark.parametrize(
    "inside",
    [{"TMUX": "/tmp/t,1,0"}, {"STY": "1.p"}, {"TERM": "screen"}, {"TERM": "tmux-256color"}],
)
@pytest.mark.parametrize(
    "outside", [{"KITTY_WINDOW_ID": "1"}, {"TERM_PROGRAM": "iTerm.app"}, {"LC_TERMINAL": "iTerm2"}]
)
def test_inside_tmux_the_outer_terminals_protocol_is_not_used(
    inside: dict[str, str], outside: dict[str, str]
) -> None:
    """tmux hands on the outer terminal's variables, and eats or misplaces its pictures."""
    assert detect({"TERM": "xterm-256color"} | outside | inside, True) == "blocks"


@pytest.mark.parametrize("size", [(640, 480), (3000, 200), (30, 4000), (9, 9), (1, 1)])
def test_kitty_gets_the_picture_whole_in_chunks_of_4096(size: tuple[int, int]) -> None:
    picture = noise(*size)
    written = preview(picture, "kitty", columns=80, rows=24, color=True)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", written)
    columns, rows = fit(size, columns=80, rows=24)
    assert commands[0][0].split(",") == [
        *("a=T", "f=100", "q=2", "C=1", f"c={columns}", f"r={rows}"),
        f"m={int(len(commands) > 1)}",
    ]
    assert [keys for keys, _ in commands[1:]] == ["m=1"] * (len(commands) - 2) + ["m=0"] * (
        len(commands) > 1
    )
    assert all(len(data) == 4096 for _, data in commands[:-1]) and len(commands[-1][1]) <= 4096
    decoded = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in commands))))
    expected = picture.copy()
    expected.thumbnail((columns * 16, rows * 32))
    assert decoded.format == "PNG" and np.array_equal(np.asarray(decoded), np.asarray(expected))


@pytest.mark.parametrize("begins_at", [0, 20, 23])
def test_kitty_has_room_for_the_picture_and_the_cursor_below_it(begins_at: int) -> None:
    """At the bottom of the screen a picture scrolls, unless lines were made for it before."""
    screen = pyte.Screen(80, 24)
    stream = pyte.Stream(screen)
    stream.feed("\r\n" * begins_at)
    written = preview(noise(100, 100), "kitty", columns=80, rows=10, color=True)
    rows = fit((100, 100), columns=80, rows=10)[1]
    room, _, rest = re.split(r"(\x1b_G.*\x1b\\)", written, flags=re.DOTALL)
    stream.feed(room)
    top = screen.cursor.y
    assert screen.cursor.x == 0 and top + rows <= 23
    stream.feed(rest)
    assert (screen.cursor.y, screen.cursor.x) == (top + rows, 0)


def test_iterm2_gets_the_picture_whole() -> None:
    picture = noise(640, 480)
    written = preview(picture, "iterm2", columns=80, rows=24, color=True)
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07\r\n", written)
    assert found
    keys = dict(key.split("=") for key in found[1].split(";"))
    columns, rows = fit(picture.size, columns=80, rows=24)
    data = base64.b64decode(found[2], validate=True)
    assert keys == {
        "inline": "1",
        "size": str(len(data)),
        "width": str(columns),
        "height": str(rows),
        "preserveAspectRatio": "1",
    }
    expected = picture.copy()
    expected.thumbnail((columns * 16, rows * 32))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 48), (300, 40), (20, 300), (5, 5), (1, 1)])
@pytest.mark.parametrize("columns", [40, 12, 2])
def test_each_cell_of_the_blocks_has_its_two_pixels(size: tuple[int, int], columns: int) -> None:
    picture = noise(*size)
    terminal = Terminal(columns, 40)
    terminal.write(
        preview(picture, "blocks", columns=columns, rows=24, color=True, environ=TRUE_COLOUR)
    )
    wide, high = fit(size, columns=columns, rows=24)
    expected = np.asarray(picture.resize((wide, 2 * high), Image.Resampling.BOX))
    for y, row in enumerate(terminal.cells()[:high]):
        for x, cell in enumerate(row[:wide]):
            assert (cell.data, cell.fg, cell.bg) == (
                "▀",
                bytes(expected[2 * y, x]).hex(),
                bytes(expected[2 * y + 1, x]).hex(),
            )
        assert all(cell.data == " " and cell.bg == "default" for cell in row[wide:])
    assert (terminal.screen.cursor.y, terminal.screen.cursor.x) == (high, 0)
    assert len(terminal.lines()) == high


def test_without_true_colour_each_pixel_is_the_nearest_of_256() -> None:
    levels = (0, 95, 135, 175, 215, 255)
    palette = [(r, g, b) for r in levels for g in levels for b in levels]
    palette += [(grey,) * 3 for grey in range(8, 239, 10)]
    table = np.array(palette, dtype=np.int64)
    picture = noise(30, 20, seed=1)
    terminal = Terminal(80, 24)
    terminal.write(preview(picture, "blocks", columns=80, rows=24, color=True, environ={}))
    expected = np.asarray(picture.resize((30, 20), Image.Resampling.BOX)).astype(np.int64)
    for y, row in enumerate(terminal.cells()[:10]):
        for x, cell in enumerate(row[:30]):
            for shown, pixel in ((cell.fg, expected[2 * y, x]), (cell.bg, expected[2 * y + 1, x])):
                colour = np.array(list(bytes.fromhex(shown)), dtype=np.int64)
                best = ((table - pixel) ** 2).sum(axis=1).min()
                assert ((colour - pixel) ** 2).sum() == best


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_transparent_is_shown_on_white(protocol: Protocol) -> None:
    """A PNG's transparent pixels are often black underneath."""
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    white = Image.new("RGB", (8, 8), "white")
    options = {"columns": 80, "rows": 24, "color": True}
    assert preview(clear, protocol, **options) == preview(white, protocol, **options)
    assert opaque(clear).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pictures_of_every_mode_can_be_shown(mode: str, protocol: Protocol) -> None:
    picture = (
        noise(16, 16).convert("L").convert(mode) if mode == "LA" else noise(16, 16).convert(mode)
    )
    assert preview(picture, protocol, columns=40, rows=24, color=True)


def test_an_array_is_shown_like_the_picture() -> None:
    picture = noise(16, 12)
    options = {"columns": 40, "rows": 24, "color": True}
    assert preview(np.asarray(picture), "blocks", **options) == preview(
        picture, "blocks", **options
    )


@pytest.mark.parametrize("size", [(1000, 1000), (1000, 10), (10, 1000), (7, 3)])
@pytest.mark.parametrize(("columns", "rows"), [(200, 100), (40, 24), (20, 6), (2, 1)])
def test_a_picture_keeps_its_shape_and_its_limits(
    size: tuple[int, int], columns: int, rows: int
) -> None:
    wide, high = fit(size, columns=columns, rows=rows)
    assert 1 <= wide <= min(columns - 1, 40) and 1 <= high <= min(rows, 20)
    exact = wide * size[1] / size[0] / 2
    assert abs(high - exact) <= 1 or high == 1 or wide == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_colour_or_room_nothing_is_written(protocol: Protocol) -> None:
    assert preview(noise(8, 8), protocol, columns=80, rows=24, color=False) == ""
    assert preview(noise(8, 8), protocol, columns=1, rows=24, color=True) == ""
    assert preview(noise(8, 8), protocol, columns=80, rows=0, color=True) == ""
