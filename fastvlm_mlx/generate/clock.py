"""The times of one call: its stages if it is profiled, its first and its latest token.

Knows seconds and counts; what a stage is, and where it is fenced, is the pipeline's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx

from fastvlm_mlx.events import Stats


@dataclass(slots=True)
class Clock:
    """When a call began, what its profiled stages took in milliseconds, and its tower's runs."""

    profile: bool
    start: float = field(default_factory=time.perf_counter)
    stage_ms: dict[str, float] = field(default_factory=dict)
    encoded_images: int = 0

    def add(self, stage: str, since: float) -> None:
        """Add the time from `since` until now to a stage."""
        elapsed = (time.perf_counter() - since) * 1000
        self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + elapsed

    def fence(self, stage: str, since: float, *arrays: mx.array) -> float:
        """End a stage: if it is profiled, wait for its arrays. Return when the next one began."""
        if self.profile:
            mx.eval(*arrays)
            self.add(stage, since)
        return time.perf_counter()

    def stage(self, name: str) -> float | None:
        """Return a stage's time; None if the call was not profiled."""
        return self.stage_ms.get(name, 0.0) if self.profile else None


class Meter:
    """Counts tokens and keeps the times of the first and the latest."""

    def __init__(self, clock: Clock, positions: int, reused: int, *, streams: bool) -> None:
        self.clock, self.positions, self.reused, self.streams = clock, positions, reused, streams
        self.count = 0
        self.first = self.latest = 0.0
        self.choosing: float | None = None

    def prefilled(self, since: float) -> None:
        """End the prefill, which began at `since`: what follows is the first token's."""
        self.clock.add("prefill", since)
        self.choosing = time.perf_counter()

    def token(self, since: float) -> None:
        """Count a token that has just reached the host; `since` is when the prefill began."""
        self.latest = time.perf_counter()
        if self.count == 0:
            self.first = self.latest
            if self.choosing is None:
                self.clock.add("prefill", since)
            else:
                self.clock.add("first_token", self.choosing)
        self.count += 1

    def stats(self) -> Stats:
        """Return what the call has taken so far."""
        clock, seconds = self.clock, self.latest - self.first
        timed = self.streams and self.count > 1 and seconds > 0
        return Stats(
            image_decode_ms=clock.stage("image_decode"),
            preprocess_ms=clock.stage("preprocess"),
            vision_ms=clock.stage("vision"),
            projector_ms=clock.stage("projector"),
            prompt_ms=clock.stage("prompt"),
            prefill_ms=clock.stage("prefill"),
            first_token_ms=clock.stage("first_token"),
            ttft_ms=None if clock.profile or not self.count else self._ttft_ms(),
            decode_tps=(self.count - 1) / seconds if timed else None,
            prompt_tokens=self.positions,
            reused_tokens=self.reused,
            generated_tokens=self.count,
            encoded_images=clock.encoded_images,
            peak_bytes=mx.get_peak_memory(),
        )

    def _ttft_ms(self) -> float:
        return (self.first - self.clock.start) * 1000
