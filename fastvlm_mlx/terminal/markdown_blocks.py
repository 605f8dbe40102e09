"""Markdown cut into blocks that no later text can change, and what of the last is certain.

The dialect is CommonMark with tables and strikethrough, less three things that would let later text
change what was read long before, or lose text: link reference definitions, underlined headings and
HTML (it is shown as it is). Knows markdown-it's tokens; knows nothing of colours or of screens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "lheading"])
)
# A last line of these only may become a rule, a fence, a list or text: not yet worth showing.
_UNDECIDED = re.compile(r"(?:[ \t>*+\-_=#`~|:]|\d{1,9}[.)](?![^ \t]))*\d{0,9}")
# An answer that is a number and a full stop is no list with nothing in it.
_ALONE = re.compile(r"\A(\s*\d{1,9})([.)]\s*\Z)")
# Characters that may begin something which changes what comes after them, once it is closed.
_OPENERS = "*_`[~|"
_MOST_TRIES = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A top-level block, or one item of a top-level list.

    `start` and `end` are offsets in the text; `follows` says that it is another item of the list
    before it, `number` is an item's number in an ordered list.
    """

    start: int
    end: int
    tokens: tuple[Token, ...]
    follows: bool = False
    number: int | None = None

    @property
    def kind(self) -> str:
        """markdown-it's name of the block: "paragraph_open", "fence", "bullet_list_open" ..."""
        return self.tokens[0].type


def blocks(text: str, *, first: Block | None = None) -> list[Block]:
    """Return the blocks of text; `first` is its first one as it was when text went on before it."""
    tokens = _PARSER.parse(_ALONE.sub(r"\1\\\2", text) if first is None else text)
    starts = _line_starts(text)
    found: list[Block] = []
    index = 0
    while index < len(tokens):
        end = _closing(tokens, index)
        part = tokens[index : end + 1]
        opening = part[0]
        if opening.type in ("bullet_list_open", "ordered_list_open"):
            found += _items(part, starts, None if found else first)
        else:
            begin, last = opening.map or [0, 0]
            found.append(Block(starts[begin], starts[last], tuple(part)))
        index = end + 1
    return found


def _items(tokens: list[Token], starts: list[int], known: Block | None) -> list[Block]:
    """Return a list's items as blocks of their own, each wrapped as a list of one."""
    opening, closing = tokens[0], tokens[-1]
    start = opening.attrGet("start")
    number = 1 if start is None else int(start)
    if known is not None and known.number is not None:
        number = known.number
    follows = known is not None and known.follows
    items: list[Block] = []
    index = 1
    while index < len(tokens) - 1:
        end = _closing(tokens, index)
        begin, last = tokens[index].map or [0, 0]
        item = (opening, *tokens[index : end + 1], closing)
        own = number + len(items) if opening.type == "ordered_list_open" else None
        items.append(Block(starts[begin], starts[last], item, follows or bool(items), own))
        index = end + 1
    return items


def _closing(tokens: list[Token], index: int) -> int:
    """Return the index of the token that closes the one at `index` (itself if it opens nothing)."""
    depth = 0
    while True:
        depth += tokens[index].nesting
        if depth == 0:
            return index
        index += 1


def last_line(text: str) -> int:
    """Return where the unfinished last line begins; the text's length if there is none."""
    return text.rfind("\n") + 1


def is_undecided(line: str) -> bool:
    """Whether an unfinished line may still become nearly anything: not yet worth showing."""
    return _UNDECIDED.fullmatch(line) is not None


def certain_length(text: str) -> int:
    """Return how much of text can be read as it is now, whatever comes after it.

    The last line that this part is rendered to may still grow.
    """
    found = blocks(text)
    if not found:
        return 0
    leaf = _last_leaf(found[-1].tokens)
    starts = _line_starts(text)
    begin = starts[leaf.map[0]] if leaf.map else 0
    if leaf.type in ("fence", "code_block"):
        return max(last_line(text), begin)
    if leaf.type != "inline" or any(token.type == "table_open" for token in found[-1].tokens):
        return found[-1].start
    resolved = _resolved(leaf.content)
    line, column = resolved.count("\n"), len(resolved) - (resolved.rfind("\n") + 1)
    source = text[starts[leaf.map[0] + line] :] if leaf.map else ""
    inside = source.find(leaf.content.split("\n")[line])
    return begin if inside < 0 else len(text) - len(source) + inside + column


def _last_leaf(tokens: tuple[Token, ...]) -> Token:
    """Return the last token that holds text, or the first of the block."""
    return next((token for token in reversed(tokens) if token.content and token.map), tokens[0])


def _resolved(content: str) -> str:
    """Return the longest beginning, up to a space, in which nothing waits to be closed."""
    end = len(content)
    for _ in range(_MOST_TRIES):
        end = max(content.rfind(" ", 0, end), content.rfind("\n", 0, end))
        if end <= 0:
            return ""
        (inline,) = _PARSER.parseInline(content[:end])
        if not _waiting(inline.children or []):
            return content[:end]
        end = max(content.rfind(opener, 0, end) for opener in _OPENERS)
    return ""


def _waiting(children: list[Token]) -> bool:
    return any(
        char in token.content for token in children if token.type == "text" for char in _OPENERS
    )


def _line_starts(text: str) -> list[int]:
    """Return the offset of each line, and the text's length for one line more."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    return [*starts, *([len(text)] * 2)]
