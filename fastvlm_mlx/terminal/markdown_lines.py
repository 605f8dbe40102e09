"""Markdown's tokens drawn as coloured lines of a given width, by rich.

Drawn so that more text changes nothing above it: headings stand left, a number's width is its own,
code has no frame. Links are text: an answer is not trusted with what a click does.
The only importer of rich. Knows nothing of streams and of screens.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from markdown_it.token import Token
from rich import markdown as rich_markdown
from rich.cells import get_character_cell_size, split_graphemes
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.containers import Renderables
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from fastvlm_mlx.terminal.live_lines import Line, Run
from fastvlm_mlx.terminal.safe_text import safe

_DIM = "2"
_NARROWEST_ITEM = 4
_CODE_INDENT = 2
# The terminal's own 16 colours, which its user has chosen to be readable; no backgrounds.
_CODE_THEME = "ansi_dark"
_THEME = Theme({"markdown.code": "bold cyan", "markdown.link": "underline", "markdown.h1": "bold"})
# What a change of width repeats or leaves out, and so is no text.
_ORNAMENTS = frozenset(" ▌•─━")
_EMOJI_STYLE = "\ufe0f"


class MarkdownLines:
    """Renders blocks of tokens; without `color` the lines hold no SGR at all."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        # Only asked for lines: it writes nothing and heeds no environment.
        self._console = Console(
            file=io.StringIO(),
            width=80,
            height=25,
            force_terminal=True,
            color_system="standard",
            legacy_windows=False,
            emoji=False,
            highlight=False,
            markup=False,
            theme=_THEME,
            _environ={},
        )

    def lines(
        self, tokens: Sequence[Token], width: int, *, number: int | None = None
    ) -> list[Line]:
        """Return lines of at most `width` cells, none empty at either end.

        `number` is that of an ordered list's first item, where it is another than the token says.
        """
        if number is not None:
            tokens = [tokens[0].copy(attrs={"start": number}), *tokens[1:]]
        document = _Document(tokens)
        options = self._console.options.update(width=width, height=None)
        rendered = self._console.render_lines(document, options, pad=False)
        found = [part for row in rendered for part in _folded(self._line(row), width)]
        while found and not found[-1]:
            found.pop()
        while found and not found[0]:
            found.pop(0)
        return found

    def dim(self, text: str, width: int) -> Line:
        """Return one line of plain text, cut to the width."""
        run = (safe(" ".join(text.split())), _DIM if self._color else "")
        return _folded((run,), width)[0]

    def _line(self, segments: Iterable[Segment]) -> Line:
        """Return the segments as runs, equal neighbours joined, without spaces at the end."""
        runs: list[Run] = []
        for text, style, control in segments:
            if control or not text:
                continue
            sgr = _sgr(style) if style and self._color and not text.isspace() else ""
            # Markdown can spell any character, as &#27; does.
            text = safe(text.replace("\n", " ").replace("\t", " "))
            if runs and runs[-1][1] == sgr:
                text = runs.pop()[0] + text
            runs.append((text, sgr))
        while runs and not (rest := runs[-1][0].rstrip(" ")):
            runs.pop()
        return (*runs[:-1], (rest, runs[-1][1])) if runs else ()


def ink(line: Line) -> int:
    """Return how many characters of the text itself a line shows."""
    return sum(char not in _ORNAMENTS for text, _ in line for char in text)


def fits(line: Line, width: int) -> bool:
    """Return whether a line takes at most `width` cells on every terminal."""
    return len(_folded(line, width)) == 1


@lru_cache(maxsize=256)
def _sgr(style: Style) -> str:
    """Return the SGR parameters of a style, "" if it has none."""
    written = style.render("x", color_system=ColorSystem.STANDARD)
    return written[2 : written.index("m")] if written.startswith("\x1b[") else ""


def _folded(line: Line, width: int) -> list[Line]:
    """Return the line, cut between graphemes where some terminal may need more than `width` cells.

    Terminals disagree on emoji of several characters: here each of them counts.
    """
    if all(text.isascii() for text, _ in line) and sum(len(text) for text, _ in line) <= width:
        return [line]
    lines: list[list[Run]] = [[]]
    used = 0
    for text, sgr in line:
        for start, end, cells in split_graphemes(text)[0]:
            cluster = text[start:end]
            cells = max(cells, sum(map(_most_cells, cluster)))
            if used and used + cells > width:
                lines.append([])
                used = 0
            used += cells
            row = lines[-1]
            before = row.pop()[0] if row and row[-1][1] == sgr else ""
            row.append((before + cluster, sgr))
    return [tuple(row) for row in lines]


def _most_cells(char: str) -> int:
    if char == _EMOJI_STYLE:
        return 1
    wide = 2 if unicodedata.east_asian_width(char) in "WF" else 0
    return max(wide, get_character_cell_size(char))


class _Code(rich_markdown.CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        syntax = Syntax(
            str(self.text).rstrip(),
            self.lexer_name,
            theme=_CODE_THEME,
            background_color="default",
            word_wrap=True,
        )
        inner = options.update(width=max(options.max_width - _CODE_INDENT, 1))
        for line in console.render_lines(syntax, inner, pad=False):
            yield Segment(" " * _CODE_INDENT)
            yield from line
            yield Segment("\n")


class _Heading(rich_markdown.Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _HorizontalRule(rich_markdown.HorizontalRule):
    new_line = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("─" * options.max_width, style="markdown.hr")


class _Table(rich_markdown.TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _List(rich_markdown.ListElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ordered = self.list_type == "ordered_list_open"
        first = self.list_start or 0
        for index, item in enumerate(self.items):
            label = f"{first + index}. " if ordered else "• "
            style = "markdown.item.number" if ordered else "markdown.item.bullet"
            yield from _item(item.elements, label, console.get_style(style), console, options)


def _item(
    elements: Renderables, label: str, style: Style, console: Console, options: ConsoleOptions
) -> Iterator[Segment]:
    """Yield an item's lines, the label before the first and as much space before the others."""
    inner = options.update(width=max(options.max_width - len(label), _NARROWEST_ITEM))
    lines = console.render_lines(elements, inner, pad=False) or [[]]
    for index, line in enumerate(lines):
        yield Segment(" " * len(label) if index else label, style)
        yield from line
        yield Segment("\n")


class _Document(rich_markdown.Markdown):
    elements = rich_markdown.Markdown.elements | {
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "table_open": _Table,
        "hr": _HorizontalRule,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
    }
    inlines = rich_markdown.Markdown.inlines | {"link", "link_url"}

    def __init__(self, tokens: Iterable[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = [
            token.copy(children=list(_plain_links(token.children))) if token.children else token
            for token in tokens
        ]


def _plain_links(children: Iterable[Token]) -> Iterator[Token]:
    """Yield an inline's tokens, links and pictures as text with the address in brackets."""
    shown, address = "", ""
    for token in children:
        shown += token.content
        if token.type == "image":
            yield _text(token.content or "picture")
            yield from _address(str(token.attrs.get("src", "")))
        elif token.type == "link_open":
            shown, address = "", str(token.attrs.get("href", ""))
            yield Token("style_open", "link", 1)
        elif token.type == "link_close":
            yield Token("style_close", "link", -1)
            if address.removeprefix("mailto:") != shown:
                yield from _address(address)
        else:
            yield token


def _address(address: str) -> Iterator[Token]:
    yield _text(" (")
    yield Token("style_open", "link_url", 1)
    yield _text(address)
    yield Token("style_close", "link_url", -1)
    yield _text(")")


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)
