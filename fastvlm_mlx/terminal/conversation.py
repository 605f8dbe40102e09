"""The user's side of a chat: pictures waiting for their question, settings, the file it is kept in.

Hands work to the model's thread and knows what is waiting there. Draws nothing and reads no lines,
so it is the same in a terminal and in a pipe. Use it from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.events import Stats
from fastvlm_mlx.terminal.answers import Answer, Hold, Kind, Request
from fastvlm_mlx.terminal.attached import Attached, PictureForm
from fastvlm_mlx.terminal.live_session import Facts, LiveSession, Opening
from fastvlm_mlx.terminal.model_thread import ModelThread
from fastvlm_mlx.terminal.settings import Settings
from fastvlm_mlx.terminal.status import StatusFacts

if TYPE_CHECKING:
    from fastvlm_mlx.engine import Engine

T = TypeVar("T")

_LEAVING_S = 0.5


Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]


class Wait(Protocol):
    """How the user's side waits for the model's; a terminal shows that it does."""

    def __call__(self, future: Future[T]) -> T: ...


class Conversation:
    """A chat with a model that may still be loading.

    `load` makes the engine, in the model's thread, with what is told meanwhile: lines for the
    user, and (bytes so far, bytes in all, what).
    `changed` is called, from any thread, when the status has; `wait` is how to wait for the model.
    `given_up` is the file to be loaded in place of turns that were not saved, once that was said.
    """

    def __init__(
        self,
        load: Callable[[Say, Progress], Engine],
        *,
        name: str,
        settings: Settings,
        form: PictureForm,
        opening: Opening,
    ) -> None:
        self.name = name
        self.settings = settings
        self.form = form
        self.pending: list[Attached] = []
        self.facts: Facts | None = None
        self.last: Stats | None = None
        self.file = opening.file
        self.unsaved = False
        self.given_up: Path | None = None
        self.changed: Callable[[], None] = lambda: None
        self.wait: Wait = lambda future: future.result()
        self._autosaves = opening.file is not None
        self._live = LiveSession(opening, form, self._publish)
        self._loading = ""
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._bug: BaseException | None = None
        self._answer: Answer | None = None
        self._ending: Future[None] | None = None
        self._left = False
        self._preparing: Hold | None = None
        self._saving: Future[None] | None = None
        self._save_error = ""
        self._since = time.perf_counter()
        self._load_ms: float | None = None
        self._model = model = ModelThread(lambda: load(self.say, self._report))
        model.loaded.add_done_callback(self._hear_loaded)
        self.opened = model.call(lambda engine: self._live.open(engine, settings))
        self.opened.add_done_callback(self._hear_opened)
        self._watch(model.call(self._live.warm_up))
        self._prepare()

    # ---- what the model's thread tells

    def _report(self, done: int, total: int, what: str) -> None:
        """Hear how far loading is, in any thread."""
        percent = f"{100 * done // total}%" if total else ""
        self._loading = percent if what == "Loading weights" else f"{what} {percent}".rstrip()
        self.changed()

    def say(self, line: str) -> None:
        """Keep a line until there is a place to show it; any thread may call it."""
        self._notes.put(line)
        self.changed()

    def take_notes(self) -> list[str]:
        """Return what was said in the background since the last time; any thread may ask."""
        notes: list[str] = []
        while True:
            try:
                notes.append(self._notes.get_nowait())
            except Empty:
                break
        return notes

    def check(self) -> None:
        """Raise what went wrong in the background: a load that failed, a bug."""
        if self._bug is not None:
            raise self._bug
        if self.opened.done():
            self.opened.result()

    @property
    def status(self) -> StatusFacts:
        """What the status line says."""
        facts, last = self.facts, self.last
        if facts is None:
            return StatusFacts(
                model=self.name, loading=self._loading, pending_images=len(self.pending)
            )
        return StatusFacts(
            model=self.name,
            precision=facts.precision,
            positions=facts.session.positions,
            max_positions=facts.session.max_positions,
            ttft_ms=last.ttft_ms if last else None,
            decode_tps=last.decode_tps if last else None,
            memory_bytes=facts.session.active_bytes,
            reused=last.reused_tokens if last else None,
            pending_images=len(self.pending),
            stopping=self._ending is not None and not self._ending.done(),
        )

    @property
    def load_ms(self) -> float | None:
        """How long loading took; None while it goes on."""
        return self._load_ms

    def ready(self) -> Facts:
        """Wait until the session is open; return its facts.

        Raises the load's FastVLMError.
        """
        self.wait(self.opened)
        assert self.facts is not None
        return self.facts

    # ---- pictures

    def add(self, pictures: Sequence[Attached]) -> None:
        """Let pictures wait for the next question, and be encoded meanwhile."""
        self.pending += pictures
        for picture in pictures:
            self._watch(self._model.call(partial(self._live.encode, picture=picture)))
        self._prepare()

    def drop(self, index: int) -> None:
        """Take away a picture by its place: those of the transcript, then those that wait.

        Raises PromptError if there is none.
        """
        facts = self.ready()
        waiting = index - len(facts.pictures)
        if 0 <= waiting < len(self.pending):
            del self.pending[waiting]
            self._prepare()
            return
        self._change(lambda engine: self._live.drop_image(engine, index))

    # ---- turns

    def ask(
        self,
        text: str,
        *,
        kind: Kind = "ask",
        settings: Settings | None = None,
        pictures: Sequence[Attached] | None = None,
        typed: str = "",
    ) -> Answer:
        """Give a question to the model; read the answer, then `settle` it.

        `pictures` are those that wait, unless others are given.
        """
        if pictures is None:
            pictures = self.pending if kind == "ask" else ()
        request = Request(
            kind=kind,
            text=text,
            pictures=tuple(pictures),
            settings=settings or self.settings,
            typed=typed,
        )
        if kind != "ask":  # what is prefilled for a new question is that question's beginning
            self._stop_preparing()
        hold = Hold()
        events = self._model.stream(lambda engine: self._live.answer(engine, request, hold))
        events.ended.add_done_callback(lambda _: self.changed())
        self._answer = Answer(request, events, hold)
        return self._answer

    def settle(self, answer: Answer) -> None:
        """Take in what an answer that was read, or forgotten, has come to."""
        self._answer = None
        self._ending = answer.ended
        if answer.finished is not None and answer.finished.stats.generated_tokens:
            self.last = answer.finished.stats
        if answer.kept:
            asked = {picture.key for picture in answer.request.pictures}
            self.pending = [picture for picture in self.pending if picture.key not in asked]
            self._hear_change()
        if self.pending:
            self._prepare()

    def abandon(self) -> None:
        """Stop an answer that nobody has begun to read."""
        answer = self._answer
        if answer is not None:
            if not answer.stop():
                for _ in answer:
                    pass
            self.settle(answer)

    def rewind(self, turns: int) -> None:
        """Take back turns. Raises PromptError if there are fewer."""
        self._change(lambda engine: self._live.rewind(engine, turns))

    def set_system(self, text: str) -> None:
        """Replace the system message."""
        self._change(lambda engine: self._live.set_system(engine, text))

    def clear(self) -> None:
        """Begin again: no turns, no pictures; system message and settings stay."""
        self._change(lambda engine: self._live.clear(engine, self.settings))
        self.pending = []
        self.last = None

    # ---- files

    def save(self, file: Path) -> None:
        """Write the session now. Raises FastVLMError."""
        self.ready()
        self._do(lambda engine: self._live.save(engine, file))
        self.unsaved = False
        if not self._autosaves:
            self.file = file

    def load(self, file: Path) -> list[str]:
        """Go on with the session in a file, which is the one kept from now on.

        Returns what is to be said of it. Raises FastVLMError; the session so far then stays.
        """
        self.ready()
        lines = self._do(lambda engine: self._live.load(engine, file, self.settings))
        self.file, self.unsaved, self.last = file, False, None
        self._prepare()
        return lines

    def leave(self) -> bool:
        """Save what is unsaved, if the session has a file of its own, and end the model's thread.

        Returns whether it has ended; it has not if it is still loading or in one long step. An
        answer under way is stopped, and kept as far as it was to be seen. A save that is under
        way is waited for, unless KeyboardInterrupt comes.
        """
        if self._left:
            return self._model.close(timeout_s=_LEAVING_S)
        self._left = True
        self._stop_preparing()
        if self._answer is not None:
            self._answer.leave()
            self._answer, self.unsaved = None, True
        if not self._model.loaded.done():
            return self._model.close(timeout_s=0)
        saving = self._saving
        if self._autosaves and self.unsaved and (saving is None or saving.done()):
            self._save_later()
        ended = self._model.close(timeout_s=_LEAVING_S)
        while not ended and self._saving is not None and not self._saving.done():
            ended = self._model.close(timeout_s=_LEAVING_S)
        return ended

    # ---- the rest

    @property
    def ended(self) -> bool:
        """Whether the model's thread has ended."""
        return self._model.ended

    def _change(self, work: Callable[[Engine], None]) -> None:
        self.ready()
        self._do(work)
        self._hear_change()
        self._prepare()

    def _do(self, work: Callable[[Engine], T]) -> T:
        """Have work done and wait for it; work that is not waited for any more is not begun."""
        future = self._model.call(work)
        try:
            return self.wait(future)
        except KeyboardInterrupt:
            if not future.cancel():
                self.unsaved = True  # it is under way, and will be done
            raise

    def _hear_change(self) -> None:
        self.unsaved, self.given_up = True, None
        if self._autosaves:
            self._save_later()

    def _save_later(self) -> None:
        file = self.file
        assert file is not None
        self._saving = self._model.call(lambda engine: self._live.save(engine, file))
        self._saving.add_done_callback(self._hear_saved)

    def _hear_saved(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is None:
            self.unsaved, self._save_error = False, ""
            return
        self.unsaved = True
        if not isinstance(error, FastVLMError):
            self._bug = error
        elif str(error) != self._save_error:
            self._save_error = str(error)
            self.say(f"the conversation was not saved: {error}")

    def _prepare(self) -> None:
        """Have the turns so far and the pictures that wait prefilled, until there is a question."""
        self._stop_preparing()
        hold, pictures = Hold(), tuple(self.pending)
        self._preparing = hold
        self._watch(self._model.call(lambda engine: self._live.prepare(engine, pictures, hold)))

    def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.stop()

    def _watch(self, future: Future[Any]) -> None:
        """Hear of a bug in work that nobody waits for.

        A user's mistake is said when the question is asked, which needs the same work; a load that
        failed is said by `opened`.
        """

        def hear(done: Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None and not isinstance(error, FastVLMError):
                self._bug = error

        future.add_done_callback(hear)

    def _hear_opened(self, opened: Future[list[str]]) -> None:
        for line in opened.result() if opened.exception() is None else ():
            self.say(line)
        self.changed()

    def _hear_loaded(self, _loaded: Future[None]) -> None:
        self._load_ms = (time.perf_counter() - self._since) * 1000
        self.changed()

    def _publish(self, facts: Facts) -> None:
        self.facts = facts
        self.changed()
