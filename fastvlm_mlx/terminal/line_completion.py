"""What Tab offers: commands, their arguments, and paths, written as they have to be typed.

Knows how far the word before the cursor reaches and how a name is escaped; asks folders for their
names. Knows nothing of keys or of what a command does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from fastvlm_mlx.terminal.commands import COMMANDS
from fastvlm_mlx.terminal.dropped import PICTURE_SUFFIXES
from fastvlm_mlx.terminal.settings import SETTING_NAMES, Settings, find_setting, typed_values

_MOST_NAMES = 500
# What parts words or opens a quote; the rest of a shell's characters mean nothing here.
_ESCAPED = re.compile(r"([ \t'\"\\])")
_LAST_WORD = re.compile(r"(?:\\.|[^\s\\])*\Z", re.DOTALL)


class LineCompleter(Completer):
    """Completes one line; `pictures` names the pictures that /drop counts, first to last."""

    def __init__(self, pictures: Callable[[], Sequence[str]]) -> None:
        self._pictures = pictures

    def get_completions(
        self,
        document: Document,
        complete_event: CompleteEvent,  # noqa: ARG002 (prompt_toolkit's name)
    ) -> Iterable[Completion]:
        """Offer what may stand at the cursor, best first."""
        text = document.text_before_cursor
        named = re.match(r"/(\w+)\s+", text)
        if named is not None:
            yield from self._arguments(named[1].lower(), text[named.end() :])
            return
        if re.fullmatch(r"/\w*", text):
            commands = list(_commands(text[1:].lower()))
            yield from commands
            if commands:
                return
        yield from _asked_paths(_word_before(text))

    def _arguments(self, command: str, argument: str) -> Iterator[Completion]:
        if command == "set":
            yield from _settings(argument)
        elif command == "retry":
            yield from _assignments(argument.split()[-1] if argument[-1:].strip() else "")
        elif command == "drop":
            for number, name in enumerate(self._pictures(), start=1):
                if str(number).startswith(argument):
                    yield Completion(str(number), -len(argument), display_meta=name)
        elif command in ("image", "save", "load"):
            yield from _paths(_word_before(argument), pictures_only=command == "image")
        else:
            yield from _asked_paths(_word_before(argument))


def _commands(start: str) -> Iterator[Completion]:
    for command in COMMANDS:
        if command.name.startswith(start):
            # A blank where an argument must follow; else Enter may follow at once.
            needs = command.arguments and not command.arguments.startswith("[")
            yield Completion(
                f"/{command.name}{' ' if needs else ''}",
                -len(start) - 1,
                display=f"/{command.name}",
                display_meta=command.summary,
            )


def _settings(argument: str) -> Iterator[Completion]:
    name, blank, value = argument.partition(" ")
    if not blank:
        for known, current, _ in Settings().rows():
            if known.startswith(name.replace("-", "_").lower()):
                yield Completion(
                    f"{known} ", -len(name), display=known, display_meta=_meaning(known, current)
                )
        return
    for word in typed_values(name):
        if word.startswith(value.lower()):
            yield Completion(word, -len(value))


def _meaning(name: str, default: str) -> str:
    return f"{find_setting(name).meaning} (default {default})"


def _assignments(word: str) -> Iterator[Completion]:
    name, equals, value = word.partition("=")
    if not equals:
        for known in SETTING_NAMES:
            if known.startswith(name):
                yield Completion(f"{known}=", -len(name), display_meta=find_setting(known).meaning)
        return
    for known in typed_values(name):
        if known.startswith(value):
            yield Completion(known, -len(value))


def _word_before(text: str) -> str:
    """Return the unfinished word at the text's end: from its open quote, or its last blank."""
    for quote in "'\"":
        start = max(text.rfind(f" {quote}") + 1, text.rfind(f"\n{quote}") + 1)
        if text[start : start + 1] == quote and text.count(quote, start) == 1:
            return text[start:]
    match = _LAST_WORD.search(text)
    return match[0] if match else ""


def _asked_paths(word: str) -> Iterator[Completion]:
    """Offer folders and pictures where a word of a question is a path: by its slash, ~ or dot."""
    if word in ("~", ".", ".."):
        yield Completion(f"{word}/", -len(word))
    bare = word.lstrip("'\"")
    if "/" in bare or bare.startswith(("~", ".")):
        yield from _paths(word, pictures_only=True)


def _paths(word: str, *, pictures_only: bool) -> Iterator[Completion]:
    """Offer a folder's names: folders, and files (pictures, or all), hidden ones only if asked."""
    quote = word[:1] if word[:1] in ("'", '"') else ""
    typed = word[1:] if quote else re.sub(r"\\(.)", r"\1", word)
    folder, slash, start = typed.rpartition("/")
    for path, is_folder in _listed(folder + slash, start):
        if pictures_only and not is_folder and path.suffix.lower() not in PICTURE_SUFFIXES:
            continue
        name = path.name + ("/" if is_folder else "")
        if quote:
            written = quote + folder + slash + name + ("" if is_folder else quote)
        else:
            written = _ESCAPED.sub(r"\\\1", folder + slash + name)
        yield Completion(written, -len(word), display=name)


def _listed(folder: str, start: str) -> list[tuple[Path, bool]]:
    """Return the names that start so, sorted; none of a folder that cannot be read."""
    wanted = _comparable(start)
    found: list[tuple[Path, bool]] = []
    try:
        for path in Path(folder or ".").expanduser().iterdir():
            hidden = path.name.startswith(".") and not start.startswith(".")
            if (
                not hidden
                and _can_be_typed(path.name)
                and _comparable(path.name).startswith(wanted)
            ):
                found.append((path, path.is_dir()))
            if len(found) == _MOST_NAMES:
                break
    except (OSError, RuntimeError, ValueError):  # no such folder, no such user, a null byte
        return []
    return sorted(found, key=lambda entry: _comparable(entry[0].name))


def _can_be_typed(name: str) -> bool:
    """Return whether a name has no control characters, and is text at all (no lone surrogates)."""
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


def _comparable(name: str) -> str:
    """Return a name as it compares: macOS may list "é" as two characters, keyboards type one."""
    return unicodedata.normalize("NFC", name).casefold()
