"""Pictures in what a user typed, pasted or dragged onto the terminal.

Knows how terminals write a dropped path (quoted, escaped, `file://`) and when a word is one; asks
the file system only whether a file exists. Knows nothing of pictures but their names' endings.

Terminals differ: Terminal.app, iTerm2, Ghostty and WezTerm put backslashes before what a shell
would take for itself (WezTerm before spaces only); GNOME's, Konsole, foot and kitty put single
quotes around it, with `'\\''` or `'"'"'` for an apostrophe; Alacritty writes it as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

PICTURE_SUFFIXES = tuple(
    f".{name}"
    for name in (
        "jpg jpeg jpe jfif mpo png apng gif webp bmp dib tif tiff heic heif hif avif "
        "ppm pgm pbm pnm ico jp2 j2k jpc jpf jpx j2c"
    ).split()
)
"""Lower-case endings of the names of pictures that can be read."""

# Only these part words: a name made by macOS may hold a no-break space (U+202F before "PM").
_BLANK = " \t\r\n"
_WORD = re.compile(r"[^ \t\r\n]+")
_ENDS_LIKE_A_PICTURE = re.compile(
    rf"(?:{'|'.join(map(re.escape, PICTURE_SUFFIXES))})(?=[ \t\r\n]|$)", re.IGNORECASE
)
_FILE_URI = re.compile(r"file:(?://(?:localhost)?)?(/[^/].*)", re.IGNORECASE)
_PUNCTUATION = ",.;:!?)"
_OPENING = "([{<!"
_LONGEST_PATH = 4 * 4096  # PATH_MAX, each character escaped, and to spare
# Each word may ask the file system several times, while the prompt stands still.
_LONGEST_DROP = 32 * 1024
_MOST_ENDS = 8  # of a name with bare blanks
_MOST_ESCAPES = 500


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a line holds: `sources` (paths, URLs; in order), and `text`, the rest of it."""

    sources: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class _Word:
    start: int
    end: int
    source: str | None
    is_url: bool = False


def split_dropped(text: str) -> Dropped:
    """Take the pictures out of a typed or pasted text; what is none stays as it was typed.

    A source is a path that exists, or a word with a "/" and a picture's ending even if no such
    file is there (a pattern like `pics/*.png` too): a mistyped path is never asked as a question. A
    name without "/" needs both, a picture's ending and a file. `~` is left for who opens it. Also a
    `file://` URI (decoded), a picture's `data:` URI, and an http(s) URL that ends like a picture.
    If all the words are URLs, of anything, or end like pictures, all are sources. Where a source
    was, one separator stays. A text of over 32 KiB, or full of escaped
    blanks, is a pasted text, and is not searched.
    """
    if len(text) > _LONGEST_DROP or text.count("\\ ") > _MOST_ESCAPES:
        return Dropped((), text)
    names = _names_only(text)
    if names:
        return Dropped(names, "")
    words = _words(text)
    sources = tuple(word.source for word in words if word.source is not None)
    return Dropped(sources, _without(text, words) if sources else text)


def starts_with_path(text: str) -> bool:
    """Return whether the text's first word is a picture, and so is no command."""
    return _word_at(text, 0).source is not None


def typed_sources(argument: str) -> tuple[str, ...]:
    """Return the pictures of a command that takes nothing else: every word is one, as shells do.

    A file's name with bare blanks is one source. "-" is a file of that name: here standard input
    is the keyboard.
    """
    whole = argument.strip()
    if _is_file(whole):
        return (whole,)
    sources = []
    position = 0
    while match := _WORD.search(argument, position):
        word = _word_at(argument, match.start())
        source, position = word.source, word.end
        if source is None:
            shell = _shell_word(argument, match.start())
            source, position = shell if shell is not None else (match[0], match.end())
        sources.append("./-" if source == "-" else source)
    return tuple(sources)


def typed_path(argument: str) -> Path:
    """Return the one path that a command's argument is: quoted, escaped, a `file://` URI, or bare.

    A bare one may hold blanks. `~` is expanded; nothing is asked of the path but whether it is a
    file as written.
    """
    argument = argument.strip()
    word = _shell_word(argument, 0)
    uri = _FILE_URI.match(argument)
    if uri is not None:
        argument = os.fsdecode(urllib.parse.unquote_to_bytes(uri[1]))
    elif word is not None and word[1] == len(argument) and not _is_file(argument):
        argument = word[0]
    path = Path(argument)
    with contextlib.suppress(RuntimeError):  # ~name of no known user: then it is a file's name
        path = path.expanduser()
    return path


def _names_only(text: str) -> tuple[str, ...]:
    """Return the sources of a text that holds nothing else but commas between them; or ()."""
    names: list[str] = []
    position = 0
    while match := _WORD.search(text, position):
        word = _word_at(text, match.start())
        name, position = word.source or (match[0] if word.is_url else ""), word.end
        if not name:
            quoted = match[0][0] in "'\""
            read = (_shell_word if quoted else _unescape)(text, match.start())
            if read is None:
                return ()
            name, position = read[0].rstrip(",;"), read[1]
            if names and not name:
                continue
            if "/" in name or not _is_pictures_name(name):
                return ()
        names.append(name)
    return tuple(names)


def _words(text: str) -> list[_Word]:
    words = []
    position = 0
    while match := _WORD.search(text, position):
        words.append(_word_at(text, match.start()))
        position = words[-1].end
    return words


def _word_at(text: str, start: int) -> _Word:
    """Return the word that starts there: a picture as long as it is, else up to the next blank."""
    match = _WORD.match(text, start)
    if match is None:
        return _Word(start, start, None)
    raw = match[0]
    if raw[0] in "'\"":
        quoted = _quoted_word(text, start)
        return quoted if quoted is not None else _Word(start, match.end(), None)
    plain, end = _unescape(text, start)
    word = _from_uri(raw, start) or _from_url(raw, start)
    if word is not None:
        return word
    if _may_be_path(plain) and _is_file(plain):
        return _Word(start, end, plain)
    shell = _shell_word(text, start)
    if shell is not None and _may_be_path(shell[0]) and _is_file(shell[0]):
        return _Word(start, shell[1], shell[0])
    if _may_be_path(raw) and _is_file(raw):
        return _Word(start, match.end(), raw)
    spaced = _unescaped_path(text, start) if _is_anchored(raw) else None
    if spaced is not None:
        return _Word(start, start + len(spaced), spaced)
    if _looks_like_a_path(plain):
        return _Word(start, end, plain)
    named = raw.rstrip(_PUNCTUATION)
    if named != raw and _may_be_path(named) and _is_file(named):
        return _Word(start, start + len(named), named)
    named = plain.rstrip(_PUNCTUATION)
    if _looks_like_a_path(named):
        return _Word(start, end - (len(plain) - len(named)), named)
    return _Word(start, match.end(), None)


def _quoted_word(text: str, start: int) -> _Word | None:
    """Return the picture whose name starts with a quote; a comma after it is no part of it."""
    shell = _shell_word(text, start)
    if shell is None:
        return None
    name, end = shell
    after = end - start - len(text[start:end].rstrip(_PUNCTUATION))
    for cut in (0, after):
        bare = name[: len(name) - cut]
        uri = _from_uri(bare, start) or _from_url(bare, start)
        if uri is not None and uri.source is not None:
            return _Word(start, end - cut, uri.source)
        # "What is in a/b.png" is a quoted question: a blank comes before its slash.
        is_path = _is_anchored(bare) or len(bare.partition("/")[0].split()) < 2
        if (is_path and _looks_like_a_path(bare)) or (_may_be_path(bare) and _is_file(bare)):
            return _Word(start, end - cut, bare)
    return None


def _from_uri(raw: str, start: int) -> _Word | None:
    """Read `file://` (this machine's only) and a picture's `data:` URI."""
    if raw[:11].lower() == "data:image/":
        return _Word(start, start + len(raw), raw)
    for uri in (raw, raw.rstrip(_PUNCTUATION)):
        parts = _FILE_URI.match(uri)
        if parts is not None:
            path = os.fsdecode(urllib.parse.unquote_to_bytes(parts[1]))
            if _ends_like_a_picture(path) or _is_file(path):
                return _Word(start, start + len(uri), path)
    return None


def _from_url(raw: str, start: int) -> _Word | None:
    """Read an http(s) URL; it is a picture by itself only if its path ends like one."""
    if not raw[:8].lower().startswith(("http://", "https://")):
        return None
    # "…/cat.jpg?" holds an empty query: the question mark is the question's.
    named = raw.rstrip(_PUNCTUATION if "(" not in raw else _PUNCTUATION.replace(")", ""))
    url = _unescape(named, 0)[0]
    try:
        path = urllib.parse.urlsplit(url).path
    except ValueError:  # a bracket that is no IPv6 address's
        return None
    if _ends_like_a_picture(path):
        return _Word(start, start + len(named), url)
    return _Word(start, start + len(raw), None, is_url=True)


def _unescape(text: str, start: int) -> tuple[str, int]:
    """Read up to an unescaped blank; a backslash takes the next character as it is, quotes too."""
    pieces: list[str] = []
    position = start
    last = min(len(text), start + _LONGEST_PATH)
    while position < last and text[position] not in _BLANK:
        if text[position] == "\\" and text[position + 1 : position + 2] not in ("", "\n", "\r"):
            position += 1
        pieces.append(text[position])
        position += 1
    return "".join(pieces), position


def _shell_word(text: str, start: int) -> tuple[str, int] | None:
    """Read one word as a POSIX shell does, quotes and all; None if a quote is left open."""
    pieces: list[str] = []
    position = start
    quote = ""
    while position < len(text) and position - start < _LONGEST_PATH:
        char, after = text[position], text[position + 1 : position + 2]
        if char in "\r\n" or (not quote and char in _BLANK):
            break
        position += 1
        if quote:
            if char == quote:
                quote = ""
            elif char == "\\" and quote == '"' and after and after in '$`"\\':
                pieces.append(after)
                position += 1
            else:
                pieces.append(char)
        elif char in "'\"":
            quote = char
        elif char == "\\" and after not in ("", "\n", "\r"):
            pieces.append(after)
            position += 1
        else:
            pieces.append(char)
    return None if quote else ("".join(pieces), position)


def _unescaped_path(text: str, start: int) -> str | None:
    """Return the file whose name with bare spaces starts there, as Alacritty writes it."""
    line = text[start : start + _LONGEST_PATH].partition("\n")[0]
    for end in islice(_ENDS_LIKE_A_PICTURE.finditer(line), _MOST_ENDS):
        if _is_file(line[: end.end()]):
            return line[: end.end()]
    return None


def _is_anchored(word: str) -> bool:
    return word.startswith(("/", "./", "../")) or re.match(r"~[^/]*/", word) is not None


def _looks_like_a_path(word: str) -> bool:
    """Return whether a word names a picture by folder and name, be there a file or not."""
    if _is_anchored(word):
        return _ends_like_a_picture(word)
    return "/" in word and "://" not in word and word[0] not in _OPENING and _is_pictures_name(word)


def _is_pictures_name(word: str) -> bool:
    """Return whether a word ends like a picture and is more than that ending: ".png" is prose."""
    name = word.rpartition("/")[2]
    return _ends_like_a_picture(name) and name.lower() not in PICTURE_SUFFIXES


def _may_be_path(word: str) -> bool:
    """Return whether a word that names a file means it: "README" in a question need not."""
    return len(word) <= _LONGEST_PATH and (_is_anchored(word) or _ends_like_a_picture(word))


def _ends_like_a_picture(word: str) -> bool:
    return word.lower().endswith(PICTURE_SUFFIXES)


def _is_file(word: str) -> bool:
    path = Path(word)
    try:
        return path.expanduser().is_file()
    except RuntimeError:  # ~name of no known user: then it is a file's name
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _without(text: str, words: list[_Word]) -> str:
    """Return the text without its sources; of the blanks around one, a line's end is kept."""
    kept = ""
    gap = ""
    removed = False
    position = 0
    for word in words:
        before = text[position : word.start]
        if removed:
            gap = before if before.count("\n") > gap.count("\n") or not before else gap
        else:
            gap = before
        position = word.end
        if word.source is not None:
            removed = True
            continue
        kept += (gap if kept or not removed else "") + text[word.start : word.end]
        removed = False
    return kept if removed else kept + text[position:]
