"""The one thread that owns MLX work: order, errors, leaving early, and the process's end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.events import Finished
from fastvlm_mlx.terminal.model_thread import _EVENTS_AHEAD, ModelThread

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

WAIT_S = 60


@pytest.fixture
def model() -> Iterator[ModelThread]:
    thread = ModelThread(lambda: fv.load("demo"))
    yield thread
    assert thread.close(timeout_s=WAIT_S)


def test_work_is_done_in_order_in_one_thread_after_the_load(model: ModelThread) -> None:
    done: list[int] = []
    names = [
        model.call(lambda _, n=n: (done.append(n), threading.current_thread().name)[1])
        for n in range(5)
    ]
    assert {name.result(WAIT_S) for name in names} == {"model"}
    assert done == list(range(5))
    assert model.loaded.done()


def test_an_answer_crosses_as_the_engine_gives_it(model: ModelThread) -> None:
    question = "What is this?"
    wanted = model.call(lambda engine: engine.generate(question, max_tokens=8)).result(WAIT_S)
    events = list(model.stream(lambda engine: engine.stream(question, max_tokens=8)))
    assert isinstance(events[-1], Finished)
    assert "".join(e.text for e in events[:-1]) == wanted.text  # type: ignore[union-attr]


def test_errors_cross_as_themselves_and_the_thread_goes_on(model: ModelThread) -> None:
    with pytest.raises(PromptError, match="the model has 1024"):
        list(model.stream(lambda engine: engine.stream("word " * 2000)))
    with pytest.raises(ZeroDivisionError):
        model.call(lambda _: 1 / 0).result(WAIT_S)
    assert model.call(lambda engine: engine.generate("hi", max_tokens=1).text).result(WAIT_S)


def test_a_load_that_fails_is_the_error_of_all_work() -> None:
    thread = ModelThread(lambda: fv.load("./nowhere"))
    with pytest.raises(fv.FastVLMError, match="nowhere"):
        thread.loaded.result(WAIT_S)
    with pytest.raises(fv.FastVLMError, match="nowhere"):
        thread.call(lambda engine: engine.source).result(WAIT_S)
    with pytest.raises(fv.FastVLMError, match="nowhere"):
        list(thread.stream(lambda engine: engine.stream("hi")))
    assert thread.close(timeout_s=WAIT_S)


def test_leaving_early_closes_the_work_and_later_work_is_done(model: ModelThread) -> None:
    """The queue is bounded: a producer that waits for room must be let go by the leaver."""
    closed = threading.Event()

    def endless(_: object) -> Iterator[int]:
        try:
            yield from range(10 * _EVENTS_AHEAD)
        finally:
            closed.set()

    events = model.stream(endless)
    assert [next(events), next(events)] == [0, 1]
    while events._room._value:  # until the model waits for room
        time.sleep(0.001)
    events.leave()
    assert closed.wait(WAIT_S)
    assert list(events) == []
    assert model.call(lambda _: 1).result(WAIT_S) == 1


def test_the_model_waits_for_a_reader_that_stands_still(model: ModelThread) -> None:
    made: list[int] = []

    def many(_: object) -> Iterator[int]:
        for number in range(10 * _EVENTS_AHEAD):
            made.append(number)
            yield number

    events = model.stream(many)
    assert next(events) == 0
    events.ended.add_done_callback(lambda _: made.append(-1))
    assert len(made) <= _EVENTS_AHEAD + 2
    assert list(events) == list(range(1, 10 * _EVENTS_AHEAD))


def test_work_left_before_its_turn_is_never_begun(model: ModelThread) -> None:
    hold = threading.Event()
    begun: list[int] = []
    model.call(lambda _: hold.wait(WAIT_S))
    left = model.stream(lambda _: iter([begun.append(1)]))
    called = model.call(lambda _: begun.append(2))
    left.leave()
    assert called.cancel()
    hold.set()
    assert model.call(lambda _: 3).result(WAIT_S) == 3
    assert begun == []


def test_a_signal_wakes_the_reader_between_events_and_reading_goes_on(model: ModelThread) -> None:
    """Only the main thread hears SIGINT; a KeyboardInterrupt inside drawing would tear a line."""
    hold = threading.Event()

    def slow(_: object) -> Iterator[str]:
        hold.wait(WAIT_S)
        yield "late"

    events = model.stream(slow)
    before = signal.signal(signal.SIGINT, lambda *_: events.wake())
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(events)
    finally:
        signal.signal(signal.SIGINT, before)
    hold.set()
    assert list(events) == ["late"]


def test_signals_are_not_taken_by_the_models_thread(model: ModelThread) -> None:
    """Where the system gave one to a thread inside MLX, the main thread waited on."""
    blocked = model.call(lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, ())).result(WAIT_S)
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= blocked


AT_EXIT = """
import os, sys, threading
import fastvlm_mlx as fv
from fastvlm_mlx.terminal.model_thread import ModelThread
model = ModelThread(lambda: fv.load("demo"))
kind = sys.argv[1]
if kind == "ended":
    model.call(lambda engine: engine.generate("hi", max_tokens=2)).result()
    sys.exit(0 if model.close(timeout_s=60) else 9)
if kind == "answering":
    events = model.stream(lambda engine: engine.stream("hi", max_tokens=900, stop=["@@"]))
    next(events)
if not model.close(timeout_s=0):
    os._exit(0)
"""


@pytest.mark.parametrize("kind", ["ended", "loading", "answering"])
def test_the_process_ends_promptly_and_never_aborts(kind: str) -> None:
    """Without mx.clear_streams, or with a thread inside MLX at the end, it died of a signal."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", AT_EXIT, kind], capture_output=True, timeout=WAIT_S
        )
        assert done.returncode == 0, done
