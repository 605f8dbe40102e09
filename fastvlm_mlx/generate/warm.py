"""Prompts answered from what the KV cache holds already: only what comes after is prefilled.

Knows one KV cache and laid-out prompts. Knows no turns: any prompt may follow any other, and what
they share is found by comparing positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from fastvlm_mlx.events import Finished, TextDelta
from fastvlm_mlx.generate.cache import KVPrefix
from fastvlm_mlx.generate.clock import Clock
from fastvlm_mlx.generate.context import Fitted, after
from fastvlm_mlx.generate.loop import Cancelled, prefill
from fastvlm_mlx.generate.options import AnswerOptions
from fastvlm_mlx.generate.pipeline import Pipeline


class WarmDecoder:
    """A pipeline with one KV cache of its own, `kv`, that survives from prompt to prompt."""

    def __init__(self, pipeline: Pipeline, kv_bits: int | None = None) -> None:
        self.kv = KVPrefix(pipeline.model.decoder, kv_bits)
        self._pipeline = pipeline

    def answer(
        self, fitted: Fitted, options: AnswerOptions, clock: Clock
    ) -> Generator[TextDelta | Finished, None, None]:
        """Prefill what the cache does not hold of a prompt, and yield the answer.

        However it ends, the cache then holds only what is certainly right of prompt and answer:
        nothing at all if the layers could not be computed.
        """
        reused = self.kv.keep_common(fitted.positions)
        prompt, shown = after(fitted, reused)
        images = self._pipeline.look_up(shown, clock, options.cancelled)
        if images is None:
            yield self._pipeline.unanswered(clock)
            return
        since = time.perf_counter()
        embeddings = self._pipeline.embed(prompt, images)
        clock.fence("prompt", since, embeddings)
        generated: list[int] = []
        ended = False
        events = self._pipeline.answer(
            embeddings,
            self.kv.layers,
            fitted.prompt,
            options,
            clock,
            reused,
            generated.append,
        )
        with self._forgetting_what_failed():
            try:
                for event in events:
                    ended = isinstance(event, Finished)
                    yield event
            finally:
                events.close()
                if generated:  # all of them but the latest are certainly cached (see `loop`)
                    self.kv.hold([*fitted.positions, *generated[:-1]])
                elif ended:  # cancelled between two passes
                    self.kv.hold(fitted.positions[: self.kv.layers[0].offset])
                else:
                    self.kv.hold(fitted.positions[:reused])

    def prepare(
        self, fitted: Fitted, length: int, clock: Clock, cancelled: Callable[[], bool]
    ) -> int:
        """Prefill the first `length` positions of a prompt; return how many were computed.

        `length` ends a picture or comes before all. `cancelled` is asked as for an answer.
        """
        until = fitted.positions[: length + 1]
        if self.kv.common(until) == length:
            return 0
        reused = self.kv.keep_common(until)
        prompt, shown = after(fitted, reused)
        images = self._pipeline.look_up(shown, clock, cancelled)
        if images is None:
            return 0
        embeddings = self._pipeline.embed(prompt, images)[:, : length - reused]
        with self._forgetting_what_failed():
            kept = reused
            try:
                with suppress(Cancelled):
                    decoder = self._pipeline.model.decoder
                    prefill(decoder, embeddings, self.kv.layers, cancelled=cancelled)
                mx.eval([layer.state for layer in self.kv.layers])
                kept = self.kv.layers[0].offset
            finally:
                self.kv.hold(until[:kept])
        return kept - reused

    @contextmanager
    def _forgetting_what_failed(self) -> Iterator[None]:
        """If anything is raised that leaves the layers unsound, start over with empty ones."""
        try:
            yield
        except BaseException:
            if not self.kv.is_sound():
                self.kv = KVPrefix(self._pipeline.model.decoder, self.kv.kv_bits)
            raise

    def fork(self) -> WarmDecoder:
        """Return a second one that holds the same; they share buffers until either writes."""
        twin = WarmDecoder(self._pipeline)
        twin.kv = self.kv.copy()
        return twin
