"""The user's side of a chat: pictures waiting for their question, settings, the file it is kept in.

Hands work to the model's thread and knows what is waiting there. Draws nothing and reads no lines,
so it is the same in a terminal and in a pipe. Use it from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fastvlm_mlx.events import Stats
from fastvlm_mlx.terminal.answers import Answer, Hold, Kind, Request
from fastvlm_mlx.terminal.attached import Attached, PictureForm
from fastvlm_mlx.terminal.kept_file import KeptFile
from fastvlm_mlx.terminal.live_session import Facts, LiveSession, Opening
from fastvlm_mlx.terminal.model_thread import ModelThread
from fastvlm_mlx.terminal.news import News
from fastvlm_mlx.terminal.remarks import resumed_line
from fastvlm_mlx.terminal.settings import Settings
from fastvlm_mlx.terminal.status import StatusFacts

if TYPE_CHECKING:
    from fastvlm_mlx.engine import Engine

T = TypeVar("T")

Load = Callable[[Callable[[str], None], Callable[[int, int, str], None]], "Engine"]

_LEAVING_S = 0.5


class Wait(Protocol):
    """How the user's side waits for the model's; a terminal shows that it does."""

    def __call__(self, future: Future[T]) -> T: ...


class Conversation:
    """A chat with a model that may still be loading.

    `load` makes the engine, in the model's thread, with what is told meanwhile: lines for the
    user, and (bytes so far, bytes in all, what).
    `wait` is how to wait for the model, `news` what it tells meanwhile, `kept` the session's file.
    """

    def __init__(
        self,
        load: Load,
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
        self.news = News()
        self.wait: Wait = lambda future: future.result()
        self._live = LiveSession(opening, form, self._publish, self.news.say)
        self._answer: Answer | None = None
        self._ending: Future[None] | None = None
        self._left = False
        self._preparing: Hold | None = None
        self._model = model = ModelThread(lambda: load(self.news.say, self.news.report))
        model.loaded.add_done_callback(self.news.hear_loaded)
        self.kept = KeptFile(opening.file, model, self._live, self.news)
        self.opened = model.call(lambda engine: self._live.open(engine, settings))
        self.opened.add_done_callback(self._hear_opened)
        self.news.watch(model.call(self._live.warm_up))
        self._prepare()

    # ---- what the model's thread tells

    def check(self) -> None:
        """Raise what went wrong in the background: a load that failed, a bug."""
        if self.news.bug is not None:
            raise self.news.bug
        if self.opened.done():
            self.opened.result()

    @property
    def status(self) -> StatusFacts:
        """What the status line says."""
        facts, last = self.facts, self.last
        if facts is None:
            return StatusFacts(
                model=self.name, loading=self.news.loading, pending_images=len(self.pending)
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

    def resumed(self, columns: int) -> str:
        """Return a line on the conversation that was opened, if its file held one; else ""."""
        if self.facts is None or self.kept.path is None:
            return ""
        return resumed_line(self.kept.path.name, self.facts, columns)

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
            self.news.watch(self._model.call(partial(self._live.encode, picture=picture)))
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
        events.ended.add_done_callback(lambda _: self.news.changed())
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
            self.kept.hear_change()
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

    def unsaved(self) -> bool:
        """Return whether there are changes that no file holds; a save under way is waited for."""
        if self.kept.saving:
            self._do(lambda _: None)
        return self.kept.unsaved

    def save(self, file: Path, *, replace: bool = False) -> None:
        """Write the session now.

        Raises FastVLMError, OtherConversation for a file that holds another unless `replace`.
        """
        self.ready()
        self._do(lambda engine: self._live.save(engine, file, replace=replace))
        self.kept.hear_written(file)

    def load(self, file: Path) -> list[str]:
        """Go on with the session in a file, which is the one kept from now on.

        Returns what is to be said of it. Raises FastVLMError; the session so far then stays.
        """
        self.ready()
        lines = self._do(lambda engine: self._live.load(engine, file, self.settings))
        self.kept.hear_read(file)
        self.last = None
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
            self._answer = None
            self.kept.hear_change()
        if not self._model.loaded.done():
            return self._model.close(timeout_s=0)
        self.kept.save_rest()
        ended = self._model.close(timeout_s=_LEAVING_S)
        while not ended and self.kept.saving:
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
        self.kept.hear_change()
        self._prepare()

    def _do(self, work: Callable[[Engine], T]) -> T:
        """Have work done and wait for it; work that is not waited for any more is not begun."""
        future = self._model.call(work)
        try:
            return self.wait(future)
        except KeyboardInterrupt:
            if not future.cancel():
                self.kept.hear_change()  # it is under way, and will be done
            raise

    def _prepare(self) -> None:
        """Have the turns so far and the pictures that wait prefilled, until there is a question."""
        self._stop_preparing()
        hold, pictures = Hold(), tuple(self.pending)
        self._preparing = hold
        self.news.watch(self._model.call(lambda engine: self._live.prepare(engine, pictures, hold)))

    def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.stop()

    def _hear_opened(self, opened: Future[list[str]]) -> None:
        for line in opened.result() if opened.exception() is None else ():
            self.news.say(line)
        self.news.changed()

    def _publish(self, facts: Facts) -> None:
        self.facts = facts
        self.news.changed()
