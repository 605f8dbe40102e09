"""The line a user types: keys, history, completion and the status line below it.

Knows prompt_toolkit. Knows nothing of models, sessions or what a line means: who reads it decides.

Keys typed before `read` is called are its first keys, as long as the terminal has kept them: while
an answer is shown, whoever turns the echo off must turn ICRNL off too (termios), or an Enter typed
then arrives as Ctrl-J, a new line, and the question is not sent.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.styles import Style

from fastvlm_mlx.errors import FastVLMError, one_line
from fastvlm_mlx.terminal.clipboard import text_in_clipboard
from fastvlm_mlx.terminal.history import HistoryFile
from fastvlm_mlx.terminal.line_completion import LineCompleter
from fastvlm_mlx.terminal.status import counted

_CONTINUED = "… "
_WRAPPED = "  "
# "noreverse": prompt_toolkit's own toolbar is a bar in reverse video.
_PLAIN = {"bottom-toolbar": "noreverse"}
_COLORED = {
    "bottom-toolbar": "noreverse",
    "bottom-toolbar.text": "dim",
    "prompt": "bold",
    "prompt-continuation": "dim",
    "completion-menu": "bg:default fg:default",
    "completion-menu.completion": "bg:default fg:default",
    "completion-menu.completion.current": "bg:default fg:default reverse",
    "completion-menu.meta.completion": "bg:default fg:default dim",
    "completion-menu.meta.completion.current": "bg:default fg:default reverse",
    "scrollbar.background": "bg:default",
    "scrollbar.button": "bg:ansibrightblack",
}

log = logging.getLogger("fastvlm_mlx")


class Cancelled(KeyboardInterrupt):
    """Ctrl-C at the prompt. `text` is what was typed: "" means that the prompt was empty.

    With text, the line is gone from the prompt (and is not in the history) and the app asks again;
    on an empty prompt the app counts, and leaves at the second in a row.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class LineInput:
    """A prompt that reads one input after another; made and read in the main thread.

    `status(columns)` is one line of at most so many columns, asked at each redraw. `images()` is
    how many pictures go with the next question. `pictures()` names those that /drop counts, for
    completion. `on_image_paste()` takes the clipboard's picture, if there is one, and returns a
    line that says so; None if there is none; it may raise FastVLMError. `input` and `output` are
    prompt_toolkit's, in tests.
    """

    def __init__(
        self,
        *,
        history_file: Path | None,
        status: Callable[[int], str],
        images: Callable[[], int],
        color: bool,
        on_image_paste: Callable[[], str | None],
        pictures: Callable[[], Sequence[str]] = tuple,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._status = status
        self._images = images
        self._on_image_paste = on_image_paste
        self._notice = ""
        self._cancelled = False
        self._lines: deque[str] = deque()
        self._file = None if history_file is None else HistoryFile(history_file)
        self._last = ""
        self._session: PromptSession[str] = PromptSession(
            self._prompt,
            multiline=True,  # Enter is bound below
            key_bindings=self._bindings(),
            completer=LineCompleter(pictures),
            complete_while_typing=False,
            history=InMemoryHistory(self._remembered()),
            bottom_toolbar=self._toolbar,
            prompt_continuation=_continuation,
            style=Style.from_dict(_COLORED if color else _PLAIN),
            color_depth=None if color else ColorDepth.DEPTH_1_BIT,
            enable_suspend=True,
            include_default_pygments_style=False,
            input=input,
            output=output,
        )
        self._session.default_buffer.on_text_changed += lambda _: self._forget_notice()

    def read(self, default: str = "") -> str:
        """Return the next input, its lines joined by newlines; `default` is typed beforehand.

        Raises EOFError for Ctrl-D on an empty prompt and for a closed input, `Cancelled` (a
        KeyboardInterrupt with what was typed) for Ctrl-C or SIGINT.
        """
        self._notice = ""
        try:
            text = self._session.prompt(default=default, pre_run=self._leave_if_cancelled)
        finally:
            self._print_lines()
        self._remember(text)
        return text

    def refresh(self) -> None:
        """Draw prompt and status line again; from any thread, at any time."""
        # The loop may close between prompt_toolkit's look at it and its use: nothing is left to
        # draw then.
        with contextlib.suppress(RuntimeError):
            self._session.app.invalidate()

    def cancel(self) -> None:
        """End `read` as Ctrl-C does, now or as soon as it begins; from any thread, and for good."""
        self._cancelled = True
        loop = self._session.app.loop
        if self._session.app.is_running and loop is not None:
            with contextlib.suppress(RuntimeError):  # it closes just now
                loop.call_soon_threadsafe(self._leave_if_cancelled)

    def show(self, line: str) -> None:
        """Print a whole line, above the prompt while there is one; from any thread."""
        self._lines.append(one_line(line))
        app = self._session.app
        loop = app.loop
        if app.is_running and loop is not None and app.context is not None:
            context = app.context.copy()
            # A loop that closed just now draws no more: `read` prints what is left.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(context.run, run_in_terminal, self._print_lines)
        else:
            self._print_lines()

    def _leave_if_cancelled(self) -> None:
        if self._cancelled and self._session.app.is_running and not self._session.app.is_done:
            typed = self._session.default_buffer.text
            self._session.app.exit(exception=Cancelled(typed), style="class:aborting")

    def _print_lines(self) -> None:
        while self._lines:
            self._session.output.write(self._lines.popleft() + "\n")
        self._session.output.flush()

    def _prompt(self) -> StyleAndTextTuples:
        count = self._images()
        pending = f"[{counted(count, 'picture')}] " if count else ""
        return [("class:prompt", f"{pending}> ")]

    def _toolbar(self) -> StyleAndTextTuples:
        columns = self._session.output.get_size().columns
        # One column is left free: a line as wide as the window wraps when it is made narrower.
        text = self._notice[: columns - 1] or self._status(columns - 1)
        return [("class:bottom-toolbar.text", text)]

    def _forget_notice(self) -> None:
        self._notice = ""

    def _remembered(self) -> list[str]:
        if self._file is None:
            return []
        try:
            entries = self._file.entries()
        except OSError as error:
            self._give_up_file("read", error)
            return []
        self._last = entries[-1] if entries else ""
        return entries

    def _remember(self, text: str) -> None:
        if self._file is None or not text.strip() or text == self._last:
            return
        self._last = text
        try:
            self._file.append(text)
        except OSError as error:
            self._give_up_file("written", error)

    def _give_up_file(self, what: str, error: OSError) -> None:
        path, self._file = self._file and self._file.path, None
        reason = error.strerror or error
        log.warning("history %s cannot be %s (%s): it lasts for this chat only", path, what, reason)

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)  # while searching, Enter takes what was found
        bindings.add("enter", filter=typing)(_enter)
        bindings.add("escape", "enter", filter=typing)(_new_line)
        bindings.add("c-j", filter=typing)(_new_line)
        bindings.add("c-c", filter=typing)(_cancel)
        bindings.add("<sigint>")(_cancel)
        bindings.add("c-v", filter=typing)(self._paste)
        return bindings

    def _paste(self, event: KeyPressEvent) -> None:
        """Take the clipboard's picture, or else its text, or else what Ctrl-K or Ctrl-W cut."""
        complaint = ""
        try:
            taken = self._on_image_paste()
        except FastVLMError as error:
            taken, complaint = None, str(error)
        if taken is not None:
            self._notice = one_line(taken)
            return
        text = text_in_clipboard().replace("\r\n", "\n").replace("\r", "\n")
        if text:
            event.current_buffer.insert_text(text)
        elif cut := event.app.clipboard.get_data().text:
            event.current_buffer.insert_text(cut)
        else:
            self._notice = one_line(complaint) or "the clipboard is empty"


def _enter(event: KeyPressEvent) -> None:
    """Send; or take the chosen completion; or, after a backslash, begin a new line."""
    buffer = event.current_buffer
    menu = buffer.complete_state
    if menu is not None and menu.current_completion is not None and len(menu.completions) > 1:
        buffer.complete_state = None
        return
    before = buffer.document.current_line_before_cursor
    backslashes = len(before) - len(before.rstrip("\\"))
    if backslashes % 2 and buffer.document.is_cursor_at_the_end_of_line:
        buffer.delete_before_cursor()
        buffer.insert_text("\n")
        return
    buffer.validate_and_handle()


def _new_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


def _cancel(event: KeyPressEvent) -> None:
    text = event.app.layout.get_buffer_by_name(DEFAULT_BUFFER)
    typed = text.text if text is not None else ""
    event.app.exit(exception=Cancelled(typed), style="class:aborting")


def _continuation(_width: int, _line: int, wrap_count: int) -> str:
    return _WRAPPED if wrap_count else _CONTINUED
