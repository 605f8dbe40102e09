"""A runtime that can be compared: what it is asked, what it answers, and the clocks for both.

Knows no runtime, no MLX and nothing outside the standard library, as it is imported by other
people's Python. Times are milliseconds; points in time are seconds of `time.monotonic`, which all
processes of a machine share.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

PICTURE_ID = -200
"""What stands for a picture among the ids of `Shown`, as in LLaVA's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One workload as files and text, so that every runtime starts from the same.

    `prompt` is the name of `question` among the pinned ones, `photo` whether the pictures are
    12-megapixel photos; both are for reports. `resolution` is the side in pixels the tower sees.
    `follow_up` is what a chat asks after an answer of `first_answer_tokens`. Answers are greedy and
    of exactly `max_tokens`.
    """

    pictures: tuple[str, ...]
    prompt: str
    question: str
    follow_up: str
    resolution: int
    max_tokens: int
    first_answer_tokens: int
    photo: bool = False


@dataclass(slots=True, kw_only=True)
class Loaded:
    """What loading took: importing the runtime, its whole call, and reading weights within it.

    `cast_ms` is what changing the weights' dtype afterwards took, if the runtime had to be told.
    """

    import_ms: float
    load_ms: float
    weights_ms: float
    cast_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class About:
    """What a runtime says of itself and of the weights it holds, as `results.ModelCard` has it.

    `parameters` is 0 and `fingerprint` "" where it cannot say. `machine` has those fields of
    `results.MachineCard` that it knows. `unpacked`: it holds packed weights as floats.
    """

    name: str
    versions: dict[str, str]
    weight_bytes: int
    parameters: int = 0
    fingerprint: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    unpacked: bool = False


@dataclass(slots=True, kw_only=True)
class Shown:
    """What a runtime makes of a workload: the prompt's ids, -200 for a picture, and its pixels.

    `pixels` has a digest of each picture's uint8 array [side, side, 3] as given to the tower.
    `cannot` has the methods of `Peer` that it must not be asked with this workload, and why.
    """

    prompt_ids: list[int]
    pixels: list[str]
    cannot: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Answered:
    """An unfenced answer: from the call with paths to the first id on the host, and what followed.

    `peak_bytes` is MLX's own peak during the call, None where there is no MLX. `cpu_s` is of all
    threads, for the whole answer; `first_token_s` is when the first id came.
    """

    ttft_ms: float
    token_ids: list[int]
    prompt_tokens: int
    cpu_s: float
    decode_tps: float | None = None
    peak_bytes: int | None = None
    first_token_s: float = field(default_factory=time.monotonic)


class Peer(Protocol):
    """A runtime that can be asked. Every method may raise anything: its first line is reported."""

    def load(self, model: str, *, dtype: str, device: str) -> Loaded:
        """Import the runtime and load a folder: called once, before all else, and timed cold."""
        ...

    def about(self) -> About:
        """Return what is reported of the runtime and its model."""
        ...

    def show(self, work: Work) -> Shown:
        """Prepare a workload and return what the model would be given."""
        ...

    def ttft(self, work: Work) -> Answered:
        """Answer, with nothing kept of earlier answers."""
        ...

    def profile(self, work: Work) -> dict[str, float]:
        """Return milliseconds of each stage, fenced, by the names of `results.STAGES`."""
        ...

    def second_turn(self, work: Work) -> Answered:
        """Ask the question, then the follow-up in the same chat; return the latter's one token."""
        ...

    def memory(self) -> dict[str, int]:
        """Return what the runtime itself says it holds, by names of `results.METRICS`."""
        ...


class TokenClock:
    """When each token came: a call's time to the first, and the rate of those after it."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._began_cpu_s, self._began_s = time.process_time(), time.perf_counter()
        self._first_s = self._latest_s = self._first_monotonic_s = 0.0

    def token(self, token_id: int) -> None:
        """Count an id that has just reached the host."""
        self._latest_s = time.perf_counter()
        if not self.token_ids:
            self._first_s, self._first_monotonic_s = self._latest_s, time.monotonic()
        self.token_ids.append(token_id)

    def answered(self, *, prompt_tokens: int, peak_bytes: int | None = None) -> Answered:
        """Return what was counted. Raises RuntimeError if no token came."""
        if not self.token_ids:
            raise RuntimeError("no token came")
        after, seconds = len(self.token_ids) - 1, self._latest_s - self._first_s
        return Answered(
            ttft_ms=(self._first_s - self._began_s) * 1000,
            token_ids=self.token_ids,
            prompt_tokens=prompt_tokens,
            cpu_s=time.process_time() - self._began_cpu_s,
            decode_tps=after / seconds if after and seconds > 0 else None,
            peak_bytes=peak_bytes,
            first_token_s=self._first_monotonic_s,
        )


class StageClock:
    """Milliseconds between one `done` and the next, by stage; a stage may come more than once."""

    def __init__(self) -> None:
        self.stage_ms: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def done(self, stage: str) -> None:
        """Give the time since the last call to `stage`."""
        now = time.perf_counter()
        self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + (now - self._since_s) * 1000
        self._since_s = now


def pixel_digest(pixels: Any) -> str:
    """Return a digest of a numpy array and its shape."""
    digest = hashlib.blake2b(str(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def installed(*names: str) -> dict[str, str]:
    """Return the versions of those distributions that are installed, and of Python."""
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def time_function(module: str, function: str) -> Callable[[], float]:
    """Time an imported module's function from now on; return what says its milliseconds so far."""
    home = sys.modules[module]
    real = getattr(home, function)
    spent_ms = 0.0

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal spent_ms
        began = time.perf_counter()
        try:
            return real(*given, **options)
        finally:
            spent_ms += (time.perf_counter() - began) * 1000

    setattr(home, function, timed)
    return lambda: spent_ms
