"""Prompts answered from what the KV cache holds already: only what comes after is prefilled.

Knows one KV cache and laid-out prompts. Knows no turns: any prompt may follow any other, and what
they share is found by comparing positions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress

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

        Afterwards, however it ends, the cache holds what is certainly right of prompt and answer.
        """
        reused = self.kv.keep_common(fitted.positions)
        embeddings = self._pipeline.embed(*after(fitted, reused))
        generated: list[int] = []
        ended = False
        events = self._pipeline.answer(
            embeddings, self.kv.layers, fitted.prompt, options, clock, reused, generated.append
        )
        try:
            for event in events:
                ended = isinstance(event, Finished)
                yield event
        finally:
            try:
                events.close()
                if generated:  # all of them but the latest are certainly cached (see `loop`)
                    self.kv.hold([*fitted.positions, *generated[:-1]])
                elif ended:  # cancelled between two passes
                    self.kv.hold(fitted.positions[: self.kv.layers[0].offset])
                else:
                    self.kv.hold(fitted.positions[:reused])
            except BaseException:
                self._forget()
                raise

    def prepare(self, fitted: Fitted, length: int, cancelled: Callable[[], bool]) -> int:
        """Prefill the first `length` positions of a prompt; return how many were computed.

        `length` ends a picture or comes before all. Fewer if `cancelled` between two passes.
        """
        certain = fitted.positions[:length]
        until = fitted.positions[: length + 1]
        if self.kv.common(until) == length:
            return 0
        reused = self.kv.keep_common(until)
        embeddings = self._pipeline.embed(*after(fitted, reused))[:, : length - reused]
        kept = reused
        try:
            with suppress(Cancelled):
                prefill(
                    self._pipeline.model.decoder, embeddings, self.kv.layers, cancelled=cancelled
                )
            mx.eval([layer.state for layer in self.kv.layers])
            kept = self.kv.layers[0].offset
        finally:
            self.kv.hold(certain[:kept])
        return kept - reused

    def fork(self) -> WarmDecoder:
        """Return a second one that holds the same; they share buffers until either writes."""
        twin = WarmDecoder(self._pipeline)
        twin.kv = self.kv.copy()
        return twin

    def _forget(self) -> None:
        self.kv = KVPrefix(self._pipeline.model.decoder, self.kv.kv_bits)
