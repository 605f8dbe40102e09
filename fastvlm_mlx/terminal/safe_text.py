"""Text of others made harmless for a terminal: an answer must not move the cursor.

Knows which characters a terminal obeys instead of showing. Knows nothing of Markdown or of screens.
"""

from __future__ import annotations

_BIDI_CONTROLS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
_HARMLESS = dict.fromkeys((*_CONTROLS, *_BIDI_CONTROLS), "�")


def safe(text: str) -> str:
    """Return text with U+FFFD for each control character but newline and tab, for the controls of
    writing direction (embedding, override, isolate) and for half a surrogate pair."""
    return text.translate(_HARMLESS) if text.isascii() else _joined(text).translate(_HARMLESS)


class SafeText:
    """`safe` for text that comes in pieces: a surrogate pair cut in two is still one character."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, text: str) -> str:
        """Return what of the text so far is certain, made harmless."""
        text = self._half + text
        self._half = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return safe(text[: len(text) - len(self._half)])

    def finish(self) -> str:
        """Return what is left: U+FFFD if the text ended with half a character, else nothing."""
        half, self._half = self._half, ""
        return safe(half)


def _joined(text: str) -> str:
    """Return text with each pair of surrogates as one character, U+FFFD for half of one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
