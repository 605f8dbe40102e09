"""The interactive chat: prompt, answer, prompt; and what Ctrl-C means at each moment.

Runs in the main thread, which owns the terminal and hears the signals; the model works in its own.
Knows no models and no sessions: what a line does is said by `reply`.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastvlm_mlx.errors import FastVLMError, one_line
from fastvlm_mlx.events import ChatEvent, TextDelta, TurnsDropped
from fastvlm_mlx.terminal.answers import Answer
from fastvlm_mlx.terminal.attached import Attached, attach
from fastvlm_mlx.terminal.clipboard import picture_in_clipboard
from fastvlm_mlx.terminal.conversation import Conversation
from fastvlm_mlx.terminal.line_input import Cancelled, LineInput
from fastvlm_mlx.terminal.remarks import after_answer, dropped_line
from fastvlm_mlx.terminal.replies import picture_line, reply, worth_offering
from fastvlm_mlx.terminal.screen import BOLD, DIM, RED, Screen
from fastvlm_mlx.terminal.status import status_line
from fastvlm_mlx.terminal.tty_state import KeptKeys, Signals

T = TypeVar("T")

# A wait shorter than this is not worth a line.
_SILENT_S = 0.3
# So many Ctrl-C while one answer stops: the chat is left.
_LEAVING_CTRL_C = 3

_GREETING = "Drag pictures here or type their paths, then ask. /help lists the commands."


class _Leave(Exception):
    """The chat is over."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class App:
    """A chat on the terminal of standard input and output."""

    def __init__(self, chat: Conversation, *, history_file: Path | None) -> None:
        self._chat = chat
        self._screen = Screen(sys.stdout)
        self._answer: Answer | None = None
        self._prompting = False
        self._interruptible = False
        self._pressed = False
        self._ended_by: int | None = None
        self._input = LineInput(
            history_file=history_file,
            status=self._status,
            images=lambda: len(chat.pending),
            color=self._screen.color,
            on_image_paste=self._paste_picture,
            pictures=self._picture_names,
        )
        chat.wait = self._wait
        chat.news.changed = self._refresh
        chat.opened.add_done_callback(self._hear_opened)

    def run(self, pictures: tuple[Attached, ...] = ()) -> int:
        """Talk until the user leaves; return the exit code. `pictures` were given at the start.

        Raises the FastVLMError of a model that cannot be loaded or a session file that cannot be
        used; a question typed by then is printed first.
        """
        with ExitStack() as stack:
            keys = stack.enter_context(KeptKeys(sys.stdin, sys.stdout))
            stack.enter_context(Signals(self._hear_signal, keys, lambda: self._prompting))
            try:
                self._greet()
                self._show_pictures(pictures)
                self._converse()
            except _Leave as leave:
                return leave.code
            except OSError:
                if self._ended_by is None:
                    raise
                return self._exit_code()  # the terminal is gone

    def _converse(self) -> NoReturn:
        offered = ""
        while True:
            line = self._read_line(offered)
            try:
                offered = self._do(line)
            except FastVLMError as error:
                self._check(line)
                self._say_error(error)
                offered = line if worth_offering(line) else ""
            except KeyboardInterrupt:
                self._chat.abandon()
                self._screen.say("stopped", DIM)
                offered = line
            if self._ended_by is not None:
                raise _Leave(self._exit_code())

    def _do(self, line: str) -> str:
        """Do what a line says; return what is to be offered for the next."""
        self._check(line)
        if self._ended_by is not None:
            self._screen.say(f"not asked: {line}")
            raise _Leave(self._exit_code())
        with ExitStack() as stack:
            stack.enter_context(self._interrupts())
            if "://" in line:  # a download may take its time
                stack.enter_context(self._screen.new_stream()).wait("reading…")
            said = reply(self._chat, line, columns=self._screen.columns())
        self._show_pictures(said.pictures)
        for text in said.lines:
            self._screen.say(text)
        if said.leaves:
            raise _Leave(0)
        return said.offered if said.answer is None else self._show(said.answer)

    def _exit_code(self) -> int:
        return 130 if self._ended_by is None else 128 + self._ended_by

    # ---- the prompt

    def _read_line(self, offered: str) -> str:
        """Read a line; Ctrl-C clears it, and leaves when pressed twice with nothing typed."""
        leaving = False
        while True:
            if self._ended_by is not None:
                raise _Leave(self._exit_code())
            self._show_notes()
            self._prompting = True
            try:
                return self._input.read(offered)
            except Cancelled as cancelled:
                self._check(cancelled.text)
                if self._ended_by is not None or (leaving and not cancelled.text):
                    raise _Leave(self._exit_code()) from None
                leaving = not cancelled.text
            except EOFError:
                raise _Leave(0 if self._ended_by is None else self._exit_code()) from None
            finally:
                self._prompting = False
            if leaving:
                self._screen.say("Ctrl-C again to leave", DIM)
            offered = ""

    def _check(self, typed: str) -> None:
        """End the chat if the model is not to be had; what was typed is not lost."""
        try:
            self._chat.check()
        except BaseException:
            if typed.strip():
                self._screen.say(f"not asked: {typed}")
            raise

    def _refresh(self) -> None:
        """Show what is new while the prompt is; from any thread."""
        if self._prompting:
            for note in self._chat.news.take():
                self._input.show(note)
        self._input.refresh()

    def _hear_opened(self, opened: Future[list[str]]) -> None:
        if opened.exception() is not None:
            self._input.cancel()
        else:  # rich takes 0.1 s, which is here the time a user takes to type
            importlib.import_module("fastvlm_mlx.terminal.markdown_stream")
            resumed = self._chat.resumed(self._screen.columns() - 1)
            if resumed:
                self._chat.news.say(resumed)

    def _status(self, columns: int) -> str:
        # The prompt is drawn: a Ctrl-C from before it had nothing left to stop.
        self._pressed = False
        return status_line(self._chat.status, columns)

    def _paste_picture(self) -> str | None:
        data = picture_in_clipboard()
        if data is None:
            return None
        picture = attach(data, self._chat.form, name="clipboard")
        self._chat.add([picture])
        return picture_line(self._chat, picture)

    def _picture_names(self) -> tuple[str, ...]:
        facts = self._chat.facts
        old = tuple(name for name, _ in facts.pictures) if facts is not None else ()
        return (*old, *(picture.name for picture in self._chat.pending))

    # ---- the answer

    def _show(self, answer: Answer) -> str:
        """Draw an answer as it comes; return what is to be offered again."""
        stops = 0
        forgotten = False
        self._stream = self._screen.new_stream()
        try:
            while not forgotten:
                try:
                    with self._interrupts():
                        self._wait_until_done(self._chat.opened)
                    # From here on Ctrl-C is heard between two events, never while one is drawn.
                    self._answer = answer
                    self._heed()
                    self._say_waiting()
                    for event in answer:
                        self._draw(event)
                    break
                except KeyboardInterrupt:
                    stops += 1
                    if stops >= _LEAVING_CTRL_C or self._ended_by is not None:
                        raise _Leave(self._exit_code()) from None
                    forgotten = answer.stop()
        except FastVLMError as error:
            self._stream.finish()
            self._chat.check()
            self._say_error(error)
        finally:
            self._answer = None
            self._stream.finish()
        self._chat.settle(answer)
        self._show_notes()
        for line in ["stopped"] if forgotten else after_answer(answer):
            self._screen.say(line, DIM)
        return "" if answer.kept else answer.request.typed

    def _draw(self, event: ChatEvent) -> None:
        if isinstance(event, TurnsDropped):  # before any text
            self._stream.finish()
            self._screen.say(dropped_line(event), BOLD)
            self._stream = self._screen.new_stream()
        elif isinstance(event, TextDelta):
            self._stream.feed(event.text)

    def _wait(self, future: Future[T]) -> T:
        """Wait for the model; a transient line says so. KeyboardInterrupt gives up waiting."""
        if not wait_for([future], timeout=_SILENT_S).done:
            self._stream = self._screen.new_stream()
            with self._stream:
                self._wait_until_done(future)
        return future.result()

    def _wait_until_done(self, future: Future[Any]) -> None:
        while not future.done():
            self._say_waiting()
            wait_for([future], timeout=_SILENT_S)

    def _say_waiting(self) -> None:
        status = self._chat.status
        if status.loading is not None:
            line = f"loading {status.model} {status.loading}".rstrip()
            self._stream.wait(f"{line}… (Ctrl-C: not now)")
        else:
            self._stream.wait("stopping the last answer…" if status.stopping else "…")

    # ---- the screen

    def _greet(self) -> None:
        file = self._chat.kept.path
        if file is None or not file.exists():
            self._screen.say(_GREETING, DIM)

    def _show_pictures(self, pictures: tuple[Attached, ...]) -> None:
        for picture in pictures:
            if self._chat.settings.preview:
                self._screen.show(picture)
            if picture in self._chat.pending:
                self._screen.say(picture_line(self._chat, picture))
            else:
                self._screen.say(f"{picture.name} {picture.width}x{picture.height}")

    def _show_notes(self) -> None:
        for note in self._chat.news.take():
            self._screen.say(note)

    def _say_error(self, error: FastVLMError) -> None:
        self._screen.say(f"error: {one_line(str(error))}", RED)

    # ---- signals

    def _hear_signal(self, number: int) -> None:
        """SIGINT stops what is going on; SIGTERM and SIGHUP end the chat.

        An interrupt is raised where the chat waits, and nowhere else: what is drawn, noted and
        saved between a question and the next is finished first.
        """
        if number != signal.SIGINT:
            self._ended_by = number
            if self._prompting:
                self._input.cancel()
                return
        if self._answer is not None:
            self._answer.wake()
        elif self._interruptible:
            raise KeyboardInterrupt
        else:
            self._pressed = True

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt in here, also one pressed just before."""
        self._interruptible = True
        try:
            self._heed()
            yield
        finally:
            self._interruptible = False

    def _heed(self) -> None:
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt
