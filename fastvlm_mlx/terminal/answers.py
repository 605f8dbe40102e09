"""A question as it goes to the model, and its answer as it comes back: who may stop it, and how.

An answer that is stopped before anything of it was to be seen leaves no trace; one that is stopped
later is kept as far as it came. Two threads meet here, so one lock decides which it is. Knows no
terminal and no MLX.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

from fastvlm_mlx.events import ChatEvent, Finished, TextDelta, TurnsDropped
from fastvlm_mlx.terminal.attached import Attached
from fastvlm_mlx.terminal.model_thread import Events
from fastvlm_mlx.terminal.settings import Settings

Kind = Literal["ask", "retry", "edit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A new question, the last one again, or another in its place; `typed` is offered again.

    `entered` is when it was sent, on the clock of `time.perf_counter`.
    """

    kind: Kind = "ask"
    text: str = ""
    pictures: tuple[Attached, ...] = ()
    settings: Settings
    typed: str = ""
    entered: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class NamedDrop(TurnsDropped):
    """Turns that are dropped, with the names of the pictures in them."""

    names: tuple[str, ...] = ()


class Hold:
    """What the reader wants of an answer under way. Any thread may ask and tell."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._claimed = False
        self._forgotten = False

    def cancelled(self) -> bool:
        """Whether the model should stop; it asks between its steps."""
        return self._stopped

    def claim(self) -> bool:
        """Say, in the model's thread, that there is something to see; False if it is too late."""
        with self._lock:
            self._claimed = self._claimed or not self._forgotten
            return self._claimed

    def stop(self) -> bool:
        """Stop the answer; return whether it is forgotten, else what there is of it is kept."""
        with self._lock:
            self._stopped = True
            self._forgotten = self._forgotten or not self._claimed
            return self._forgotten


class Answer:
    """The events of one answer, and what they have come to. Read it from one thread.

    TurnsDropped is passed on with the first token, since an answer that is forgotten before drops
    nothing. Iteration raises the model's errors, and KeyboardInterrupt after `wake`.

    The time to the first token that `finished` has is counted from when the question was entered:
    what the model was still busy with, loading say, is in it; what was done before is not.
    """

    def __init__(self, request: Request, events: Events[ChatEvent], hold: Hold) -> None:
        self.request = request
        self.text = ""
        self.finished: Finished | None = None
        self._events = events
        self._hold = hold
        self._dropped: TurnsDropped | None = None
        self._next: TextDelta | Finished | None = None
        self._first: float | None = None

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> ChatEvent:
        if self._next is None:
            event = next(self._events)
            if isinstance(event, TurnsDropped):
                self._dropped = event
                event = next(self._events)
                assert not isinstance(event, TurnsDropped)
            self._next = event
        if self._dropped is not None:
            dropped, self._dropped = self._dropped, None
            return dropped
        event, self._next = self._next, None
        if isinstance(event, TextDelta):
            if self._first is None:
                self._first = time.perf_counter()
            self.text += event.text
            return event
        if self._first is not None:
            ttft_ms = (self._first - self.request.entered) * 1000
            event = replace(event, stats=replace(event.stats, ttft_ms=ttft_ms))
        self.finished = event
        return event

    def wake(self) -> None:
        """Interrupt the reader between two events; for a signal handler."""
        self._events.wake()

    def stop(self) -> bool:
        """Stop the answer. True: nothing of it is kept, and there is no more to read.

        False: what there is of it is kept; read on, the rest and Finished are coming.
        """
        forgotten = self._hold.stop()
        if forgotten:
            self._events.leave()
        return forgotten

    def leave(self) -> None:
        """Stop reading at once; what was to be seen is kept, and the model ends on its own."""
        self._hold.stop()
        self._events.leave()

    @property
    def ended(self) -> Future[None]:
        """Done when the model is; after a stop that can be later than the reader."""
        return self._events.ended

    @property
    def kept(self) -> bool:
        """Whether the answer, read to its end, is in the transcript."""
        if self.finished is None:
            return False
        return self.finished.finish_reason != "cancelled" or bool(self.text)
