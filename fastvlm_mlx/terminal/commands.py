"""The chat's commands: which there are, how a line names one, and the help.

Knows what is a command and what is a question or a path that starts with "/"; knows nothing of
what a command does.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.terminal.dropped import starts_with_path


@dataclass(frozen=True, slots=True)
class Command:
    """One command: `name` without its slash, `arguments` as the help shows them, "" for none."""

    name: str
    arguments: str
    summary: str


COMMANDS: tuple[Command, ...] = (
    Command("image", "[PATH|URL ...]", "Add pictures to the next question; alone: the clipboard's"),
    Command("images", "", "List the pictures, with their numbers"),
    Command("drop", "N", "Take picture N out of the conversation"),
    Command("retry", "[NAME=VALUE ...]", "Answer the last question again, e.g. temperature=0.7"),
    Command("undo", "[N]", "Take back the last turn, or the last N"),
    Command("edit", "[TEXT]", "Change the last question and ask it again"),
    Command("system", "[TEXT]", "Show the system prompt, or set it"),
    Command("set", "[NAME VALUE]", "Show the settings, or change one"),
    Command("stats", "", "Show where the last answer's time went"),
    Command("save", "[FILE]", "Save the conversation"),
    Command("load", "FILE", "Go on with a saved conversation"),
    Command("clear", "", "Start over, without turns and pictures"),
    Command("help", "", "Show this"),
    Command("quit", "", "Leave"),
)
_BY_NAME = {command.name: command for command in COMMANDS}
_ALSO = {"exit": "quit", "?": "help"}

_KEYS = (
    ("Enter", "Send"),
    ("Tab", "Complete commands, settings and paths"),
    ("Alt-Enter, Ctrl-J or \\ Enter", "New line"),
    ("Ctrl-V", "Add the clipboard's picture, or paste its text"),
    ("Ctrl-R", "Search what was typed before"),
    ("Ctrl-C", "Stop the answer; clear the line; twice on an empty line: leave"),
    ("// at the start", "Ask the line as it is: nothing in it is a command or a path"),
)

# One slash and a word, then a blank or the end: "/etc/hosts" and "/a.png" name no command.
_NAMED = re.compile(r"/([^\s/.]*)(?:\s+(.*))?", re.DOTALL)
_NARROW = 64


@dataclass(frozen=True, slots=True)
class Typed:
    """A line as read: `command` None for a question, `argument` what follows or the question."""

    command: Command | None
    argument: str

    def number(self, *, default: int | None = None) -> int:
        """Return the argument as a whole number from 1; `default` if there is none.

        Raises PromptError, saying how the command is written.
        """
        if not self.argument and default is not None:
            return default
        if re.fullmatch(r"[0-9]{1,9}", self.argument) and int(self.argument):
            return int(self.argument)
        name = self.command.name if self.command else ""
        given = f", not {self.argument[:40]!r}" if self.argument else ""
        raise PromptError(f"/{name} takes a number from 1, as in /{name} 2{given}")


def parse(line: str) -> Typed:
    """Read a line: a command (its name may be cut short as long as it stays unique), or a question.

    A question that starts with "/" is written with two; one slash of them is taken away. A line
    whose first word is a file's path is a question.

    Raises PromptError for an unknown command, a needed argument that is missing and one too many.
    """
    if line.startswith("//"):
        return Typed(None, line[1:])
    named = _NAMED.fullmatch(line)
    if named is None:
        return Typed(None, line)
    name = named[1].lower()
    command = _BY_NAME.get(_ALSO.get(name, name))
    if command is None:
        if starts_with_path(line) or _exists(Path(f"/{named[1]}")):
            return Typed(None, line)
        command = _starting_with(name)
    argument = (named[2] or "").strip()
    if argument and not command.arguments:
        raise PromptError(f"/{command.name} takes nothing after it")
    if not argument and command.arguments and not command.arguments.startswith("["):
        raise PromptError(f"/{command.name} needs its {command.arguments}; /help shows how")
    return Typed(command, argument)


def _exists(path: Path) -> bool:
    try:
        return path != Path("/") and path.exists()
    except OSError:  # a name too long for the file system
        return False


def _starting_with(name: str) -> Command:
    """Return the only command that starts so; raise PromptError with what was probably meant."""
    starting = [known for known in _BY_NAME if name and known.startswith(name)]
    if len(starting) == 1:
        return _BY_NAME[starting[0]]
    if starting:
        raise PromptError(f"/{name} may be {' or '.join(f'/{n}' for n in starting)}")
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them"
    raise PromptError(f"there is no command /{name[:40]}: {hint} (a question: type //{name[:40]})")


def help_lines(columns: int) -> list[str]:
    """Return the help for a window of `columns` (from 20): commands, then keys."""
    commands = [(f"/{c.name} {c.arguments}".rstrip(), c.summary) for c in COMMANDS]
    return [*two_columns(commands, columns), "", *two_columns(list(_KEYS), columns)]


def set_lines(rows: list[tuple[str, str, str]], columns: int) -> list[str]:
    """Return /set's (name, value, meaning) rows for a window of `columns` (from 20)."""
    edge = max(len(name) for name, _, _ in rows) + 2
    return two_columns([(f"{name:<{edge}}{value}", said) for name, value, said in rows], columns)


def two_columns(rows: list[tuple[str, str]], columns: int) -> list[str]:
    """Return two columns, or, where that is too narrow, the second below the first.

    No line reaches the last of the window's `columns`: some terminals wrap there.
    """
    if columns < _NARROW:
        return [
            line
            for left, right in rows
            for line in (*_indented(left, 0, columns), *_indented(right, 4, columns))
        ]
    edge = max(len(left) for left, _ in rows) + 2
    lines = []
    for left, right in rows:
        below = _indented(right, edge, columns)
        lines += [left.ljust(edge) + below[0][edge:], *below[1:]]
    return lines


def _indented(text: str, indent: int, columns: int) -> list[str]:
    blank = " " * indent
    return textwrap.wrap(
        text,
        max(columns - 1, 1),
        initial_indent=blank,
        subsequent_indent=blank,
        break_on_hyphens=False,
    )
