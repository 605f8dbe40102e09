"""One thread that owns all MLX work: it loads the engine, then does one piece of work at a time.

MLX's arrays and streams belong to the thread that made them, so the model is loaded, asked and let
go in this thread only; what crosses is text, numbers and evaluated arrays. Work is done in the
order it was given, after the load. Knows threads; knows no session and no terminal.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from fastvlm_mlx.engine import Engine

T = TypeVar("T")
E = TypeVar("E")

# Events waiting to be read: a reader that stands still (a stopped terminal) stops the model too.
_EVENTS_AHEAD = 64
_FOR_THE_MAIN_THREAD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH}


class ModelThread:
    """A thread around an engine. `load` runs in it at once; work follows in order.

    If `load` raises, `loaded` and every piece of work raise that error.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self.loaded: Future[None] = Future()
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._closed = False
        # A daemon, so that leaving need not wait for a download or for the tower.
        self._thread = threading.Thread(target=self._run, args=(load,), name="model", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Engine], T]) -> Future[T]:
        """Do `work` in the thread; its value or its error is the future's.

        A future that is cancelled before its turn has come is never begun.
        """
        future: Future[T] = Future()
        self._put(_Work(lambda engine: future.set_result(work(engine)), future))
        return future

    def stream(self, work: Callable[[Engine], Iterator[E]]) -> Events[E]:
        """Do `work` in the thread and pass on what it yields, at most a few events ahead."""
        ended: Future[None] = Future()
        events: Events[E] = Events(ended)
        self._put(_Work(lambda engine: events.fill(work, engine), ended))
        return events

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Take no more work, end after what was given, and wait; return whether it has ended.

        A thread that has not ended (a load goes on, or one long step of the model) must not meet
        the interpreter's end, which aborts a process with a thread inside MLX: leave by os._exit.
        """
        if not self._closed:
            self._closed = True
            self._work.put(None)
        self._thread.join(timeout_s)
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether the thread is no more."""
        return not self._thread.is_alive()

    def _put(self, work: _Work) -> None:
        if self._closed:
            raise RuntimeError("the model thread is closed")
        self._work.put(work)

    def _run(self, load: Callable[[], Engine]) -> None:
        # The system may give a signal to any thread; only the main one wakes up from it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_THREAD)
        try:
            self._serve(load)
        finally:
            if "mlx.core" in sys.modules:
                import mlx.core as mx

                # Streams that outlive their thread abort the process at its end.
                mx.clear_streams()

    def _serve(self, load: Callable[[], Engine]) -> None:
        engine: Engine | None = None
        failed: BaseException | None = None
        try:
            engine = load()
        except BaseException as error:  # whoever waits raises it
            failed = error
            self.loaded.set_exception(error)
        else:
            self.loaded.set_result(None)
        while (work := self._work.get()) is not None:
            if work.outcome.set_running_or_notify_cancel():
                try:
                    if engine is None:
                        assert failed is not None
                        raise failed
                    work.run(engine)
                except BaseException as error:  # crosses as itself
                    work.outcome.set_exception(error)
            # The last piece of work would keep its arrays alive until the next.
            del work


@dataclass(frozen=True, slots=True)
class _Work:
    """`run` sets the outcome's result; an error it raises becomes the outcome's."""

    run: Callable[[Engine], None]
    outcome: Future[Any]


class _Mark:
    """Stands in the queue for something that is no event."""


_END, _WOKEN = _Mark(), _Mark()


class Events(Generic[E]):
    """What a piece of work yields, read in another thread. `ended` is done when the work is.

    Iteration raises what the work raises. One reader; `wake` alone may be called in between.
    """

    def __init__(self, ended: Future[None]) -> None:
        self.ended = ended
        # Its put is reentrant (documented), so a signal handler may use it while `get` waits.
        self._events: SimpleQueue[E | _Mark] = SimpleQueue()
        self._room = threading.Semaphore(_EVENTS_AHEAD)
        self._left = threading.Event()
        self._woken = False
        self._over = False
        ended.add_done_callback(lambda _: self._events.put(_END))

    def __iter__(self) -> Events[E]:
        return self

    def __next__(self) -> E:
        while not self._over:
            if self._woken:
                self._woken = False
                raise KeyboardInterrupt
            event = self._events.get()
            if event is _END:
                self._over = True
                self.ended.result()
            elif not isinstance(event, _Mark):
                self._room.release()
                return event
        raise StopIteration

    def wake(self) -> None:
        """Make the reader's next step raise KeyboardInterrupt; reading may go on after it.

        For a signal handler: the reader is then interrupted between events, never while it draws.
        """
        self._woken = True
        self._events.put(_WOKEN)

    def leave(self) -> None:
        """Read no more: work not begun is dropped, else it is closed at its next event.

        Does not wait; the work ends in the background and its error, if any, is `ended`'s.
        """
        self._over = True
        self._left.set()
        self.ended.cancel()
        self._room.release()

    def fill(self, work: Callable[[Engine], Iterator[E]], engine: Engine) -> None:
        """Run `work` until it ends or the reader has left, and close it; in the model's thread."""
        iterator = work(engine)
        try:
            while not self._left.is_set():
                try:
                    event = next(iterator)
                except StopIteration:
                    break
                self._room.acquire()
                self._events.put(event)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        self.ended.set_result(None)
