"""The chat without drawing: piped, on a dumb terminal, or by choice. Each line is one turn.

Answers go to standard output, as they are when it is no terminal; everything else to standard
error. A backslash at a line's end joins the next one to it. Imports neither prompt_toolkit nor
rich.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, TextIO

from fastvlm_mlx.errors import FastVLMError, PromptError, one_line
from fastvlm_mlx.events import Finished, TextDelta, TurnsDropped
from fastvlm_mlx.terminal.answers import Answer
from fastvlm_mlx.terminal.attached import Attached
from fastvlm_mlx.terminal.conversation import Conversation
from fastvlm_mlx.terminal.remarks import after_answer, cut_line, dropped_line
from fastvlm_mlx.terminal.replies import picture_line, reply
from fastvlm_mlx.terminal.safe_text import SafeText, safe

_COLUMNS = 80


class PlainChat:
    """A chat on lines. `say` prints a whole line to standard error, `calm` ends its live line.

    With a terminal to type on there is a prompt, errors are said and the chat goes on, and Ctrl-C
    stops an answer. In a pipe the first error is raised and ends the run.
    """

    def __init__(
        self, chat: Conversation, *, say: Callable[[str], None], calm: Callable[[], None]
    ) -> None:
        self._chat = chat
        self._say_line, self._calm = say, calm
        self._in, self._out = sys.stdin, sys.stdout
        self._typed = self._in.isatty()
        self._safe = self._out.isatty()

    def run(self, pictures: tuple[Attached, ...] = ()) -> int:
        """Answer each line until there are no more; return 0.

        Raises FastVLMError as said above, and KeyboardInterrupt for Ctrl-C where it stops nothing.
        """
        for picture in pictures if self._typed else ():
            self._say(picture_line(self._chat, picture))
        if self._typed:
            self._chat.opened.add_done_callback(self._hear_opened)
        while line := self._read():
            try:
                if not self._do(line.removesuffix("\n")):
                    break
            except FastVLMError as error:
                self._chat.check()
                if not self._typed:
                    raise
                self._say(f"error: {one_line(str(error))}")
        self._chat.ready()  # a model that cannot be loaded is said even if nothing was asked
        self._notes()
        return 0

    def _read(self) -> str:
        """Read a line, with those below it that a backslash at its end joins to it; "" at the end.

        As in the terminal, two backslashes are no such end.
        """
        self._notes()
        line = self._read_one("> ")
        while _goes_on(line):
            more = self._read_one("  ")
            if not more:
                break
            line = line.removesuffix("\n")[:-1] + "\n" + more
        return line

    def _read_one(self, prompt: str) -> str:
        if self._typed:
            self._calm()
            sys.stderr.write(prompt)
            sys.stderr.flush()
        return self._in.readline()

    def _hear_opened(self, opened: Future[list[str]]) -> None:
        if opened.exception() is None:
            resumed = self._chat.resumed(shutil.get_terminal_size().columns)
            if resumed:
                self._chat.news.say(resumed)

    def _do(self, line: str) -> bool:
        """Do what a line says; return whether there is to be a next one."""
        said = reply(self._chat, line, columns=_COLUMNS, can_offer=False)
        if said.asks and not self._typed:
            # Nobody is there to give the command again, and going on without it would mislead.
            if said.loses_saved:
                raise PromptError(f"a pipe cannot be asked: {said.lines[0]}")
            said = reply(self._chat, line, columns=_COLUMNS, can_offer=False)
        for picture in said.pictures if self._typed else ():
            self._say(f"{picture.name} {picture.width}x{picture.height}")
        for text in said.lines:
            self._say_line(safe(text))
        if said.answer is not None:
            self._show(said.answer)
        return not said.leaves

    def _show(self, answer: Answer) -> None:
        shown = _Shown(self._out, safe_only=self._safe, calm=self._calm)
        forgotten = False
        with _CtrlC(answer if self._typed else None):
            try:
                while not forgotten:
                    try:
                        for event in answer:
                            if isinstance(event, TurnsDropped):
                                self._say(dropped_line(event))
                            elif isinstance(event, TextDelta):
                                shown.write(event.text)
                            elif isinstance(event, Finished):
                                shown.finish()
                        break
                    except KeyboardInterrupt:
                        if not self._typed:
                            raise
                        forgotten = answer.stop()
            except FastVLMError:
                shown.end_line()
                self._chat.settle(answer)
                raise
        self._chat.settle(answer)
        self._notes()
        if self._typed:
            for line in ["stopped"] if forgotten else after_answer(answer):
                self._say(line)
        elif cut_line(answer):
            self._say(cut_line(answer))

    def _notes(self) -> None:
        for note in self._chat.news.take():
            self._say(note)

    def _say(self, line: str) -> None:
        self._say_line(f"fastvlm: {safe(line)}" if not self._typed else safe(line))


def _goes_on(line: str) -> bool:
    text = line.removesuffix("\n")
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


class _Shown:
    """An answer's text on its way out: raw into a pipe, harmless on a terminal."""

    def __init__(self, out: TextIO, *, safe_only: bool, calm: Callable[[], None]) -> None:
        self._out, self._calm = out, calm
        self._filter = SafeText() if safe_only else None
        self._last = ""

    def write(self, text: str) -> None:
        text = self._filter.feed(text) if self._filter else text
        if text:
            self._calm()
            self._out.write(text)
            self._out.flush()
            self._last = text

    def finish(self) -> None:
        """Write what is left, and a line's end if the text had none; an empty answer is a line."""
        self.write(self._filter.finish() if self._filter else "")
        self._last = self._last or " "
        self.end_line()

    def end_line(self) -> None:
        """End the line, if one was begun."""
        self._calm()
        if self._last and not self._last.endswith("\n"):
            self._out.write("\n")
            self._out.flush()
            self._last = "\n"


class _CtrlC:
    """A context in which SIGINT interrupts the reading of an answer, between two events."""

    def __init__(self, answer: Answer | None) -> None:
        self._answer = answer
        self._before: Any = None

    def __enter__(self) -> None:
        if self._answer is not None:
            self._before = signal.signal(signal.SIGINT, self._hear)

    def __exit__(self, *_: object) -> None:
        if self._answer is not None:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        assert self._answer is not None
        self._answer.wake()
