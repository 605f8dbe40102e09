"""The terminal's own settings and signals while a chat runs; both are given back at the end.

Knows termios and signal handlers. Between two prompts what is typed is neither shown nor edited by
the terminal, so that it waits, Enter and all, for the next prompt.
"""

from __future__ import annotations

import signal
import termios
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

# Ends what may have been left open: synchronized output, bracketed paste, a hidden cursor, colours.
_CALM = "\x1b[?2026l\x1b[?2004l\x1b[?25h\x1b[0m"
_IFLAG, _LFLAG = 0, 3


class KeptKeys:
    """A context in which the terminal of `keys` echoes nothing and Ctrl-C discards nothing typed.

    `out` is the same terminal, to write to. What is not a terminal any more is left alone.
    """

    def __init__(self, keys: TextIO, out: TextIO) -> None:
        self._keys, self._out = keys, out
        self._before = termios.tcgetattr(keys.fileno())

    def __enter__(self) -> Self:
        self.apply()
        return self

    def apply(self) -> None:
        """Set it so, again after a shell had the terminal (Ctrl-Z, fg)."""
        quiet = termios.tcgetattr(self._keys.fileno())
        # Line by line, an Enter would be kept as Ctrl-J, which begins a new line at the prompt.
        quiet[_IFLAG] &= ~termios.ICRNL
        quiet[_LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
        quiet[_LFLAG] |= termios.NOFLSH | termios.ISIG
        termios.tcsetattr(self._keys.fileno(), termios.TCSANOW, quiet)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            termios.tcsetattr(self._keys.fileno(), termios.TCSADRAIN, self._before)
            if error is not None:
                self._out.write(_CALM)
                self._out.flush()
        except (termios.error, OSError):  # the terminal is gone: there is nothing to restore
            return


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP go to `hear`. Enter it in the main thread.

    After a stop (Ctrl-Z, fg), `keys` are kept again, unless a prompt has the terminal.
    """

    def __init__(
        self, hear: Callable[[int], None], keys: KeptKeys, prompting: Callable[[], bool]
    ) -> None:
        self._hear, self._keys, self._prompting = hear, keys, prompting
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCONT:
            self._hear(number)
        elif not self._prompting():
            self._keys.apply()
