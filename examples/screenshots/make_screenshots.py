"""Draws the README's pictures of the chat from real runs: `fastvlm chat` in a pseudo-terminal, on
the demo model, and what its screen shows as SVG. Numbers of time and memory differ between runs.

    python examples/screenshots/make_screenshots.py [FOLDER]

Needs the `dev` extra. Without FOLDER, the pictures beside this file are written anew.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

REPOSITORY = Path(__file__).parents[2]
FASTVLM = "import sys; from fastvlm_mlx.cli.main import main; sys.exit(main())"
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")
LIMIT_S = 60
FAINT = "949494"
BLOCK = "▀"
# Of a cell in rich's SVG, in pixels. Its text does not fill cells: the blocks are drawn here.
CELL_WIDTH, CELL_HEIGHT = 12.2, 24.4


class Screen(pyte.Screen):
    """A terminal's screen that says where its cursor is when a program asks."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.replies = ""

    def write_process_input(self, data: str) -> None:
        self.replies += data

    def select_graphic_rendition(self, *attributes: int, **given: bool) -> None:
        """Show faint text, which pyte knows nothing of, in grey."""
        super().select_graphic_rendition(*attributes, **given)
        if 2 in attributes and not {38, 48} & {*attributes}:  # those are followed by a colour
            self.cursor.attrs = self.cursor.attrs._replace(fg=FAINT)


class Chat:
    """A running chat and its screen; the command line stands above it, as in a shell."""

    def __init__(self, *words: str, columns: int, rows: int, home: str) -> None:
        self.screen = Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._stream.feed(f"$ {' '.join(('fastvlm', 'chat', *words))}\r\n".encode())
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"HOME": home, "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        environment |= {"COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"}
        self._child = pexpect.spawn(
            sys.executable, ["-c", FASTVLM, "chat", *words],
            cwd=str(REPOSITORY), env=environment, dimensions=(rows, columns),
        )  # fmt: skip
        self.wait_for(lambda: self._at_prompt() and "positions" in self.text)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Read what the chat writes until it has written what is wanted."""
        until = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"the screen shows:\n{self.text}")
            try:
                self._stream.feed(self._child.read_nonblocking(65536, timeout=0.05))
            except pexpect.TIMEOUT:
                continue
            replies, self.screen.replies = self.screen.replies, ""
            self._child.send(replies)

    def enter(self, line: str) -> None:
        """Type a line, send it, and wait for the next prompt with its status line."""
        self._child.send(line)
        self.wait_for(lambda: line.split()[-1] in self._line())
        self._child.send("\r")
        self.wait_for(lambda: self._at_prompt() and "positions" in self.text.splitlines()[-1])

    def _line(self) -> str:
        return self.screen.display[self.screen.cursor.y].rstrip()

    def _at_prompt(self) -> bool:
        return re.fullmatch(r"(\[\d+ pictures?\] )?>", self._line()) is not None


def svg(screen: Screen, name: str) -> str:
    """Return what a screen shows as SVG."""
    console = Console(
        width=screen.columns, record=True, file=io.StringIO(), color_system="truecolor"
    )
    halves = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        line = Text(no_wrap=True)
        for look, run in itertools.groupby(cells, key=lambda cell: cell._replace(data="")):
            style = Style(color=_colour(look.fg), bold=look.bold, italic=look.italics)
            style += Style(reverse=look.reverse, underline=look.underscore)
            line.append("".join(cell.data for cell in run).replace(BLOCK, " "), style)
        line.rstrip()
        console.print(line)
        for half in (0, 1):
            colours = [(cell.fg, cell.bg)[half] if cell.data == BLOCK else "" for cell in cells]
            halves += _rectangles(colours, y * CELL_HEIGHT + 1.5 + half * CELL_HEIGHT / 2)
    drawn = console.export_svg(title="fastvlm chat", unique_id=name)
    text = f'<g class="{name}-matrix">'
    assert text in drawn
    return drawn.replace(text, "".join(halves) + text, 1)


def _rectangles(colours: list[str], y: float) -> Iterator[str]:
    """Draw one half of a row of cells, those of one colour as one."""
    for colour, run in itertools.groupby(range(len(colours)), key=colours.__getitem__):
        columns = list(run)
        if colour:
            yield (
                f'<rect fill="#{colour}" x="{columns[0] * CELL_WIDTH:.1f}" y="{y:.1f}" '
                f'width="{len(columns) * CELL_WIDTH:.1f}" height="{CELL_HEIGHT / 2:.1f}" '
                'shape-rendering="crispEdges"/>'
            )


def _colour(name: str) -> str | None:
    """Return pyte's name of a colour as rich has it."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return "yellow" if name == "brown" else re.sub("^bright", "bright_", name)


def chat(home: str) -> str:
    """A picture with its preview, three questions, their answers, the status line."""
    words = ("examples/images/three_shapes_landscape.png", "--model", "demo")
    terminal = Chat(*words, columns=88, rows=27, home=home)
    terminal.enter("Describe the image.")
    terminal.enter("What shape is yellow?")
    terminal.enter("Where is the green square?")
    return svg(terminal.screen, "chat")


def commands(home: str) -> str:
    """A second picture, what the conversation holds, and where the time went."""
    words = ("examples/images/red_circle.png", "--no-preview", "--model", "demo")
    terminal = Chat(*words, columns=88, rows=29, home=home)
    terminal.enter("Where is the circle?")
    terminal.enter("examples/images/number_42.png What number is this?")
    terminal.enter("/images")
    terminal.enter("/stats")
    return svg(terminal.screen, "commands")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with tempfile.TemporaryDirectory() as home:
        for draw in (chat, commands):
            (folder / f"{draw.__name__}.svg").write_text(draw(home), encoding="utf-8")


if __name__ == "__main__":
    main()
