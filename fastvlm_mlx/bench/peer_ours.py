"""Our own engine as a runtime to compare, in a process of its own.

Knows how `worker.py`'s questions are put to the harness's `OurRuntime`, so that a comparison and
`fastvlm bench` measure us alike. Run by `peer_process.py`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.bench.peer import (
    PICTURE_ID,
    About,
    Answered,
    Loaded,
    Shown,
    Work,
    installed,
    pixel_digest,
    time_function,
)
from fastvlm_mlx.bench.worker import serve

if TYPE_CHECKING:
    from fastvlm_mlx.bench.harness import Measured, OurRuntime
    from fastvlm_mlx.bench.results import Case


class Ours:
    """An Engine whose answers nothing ends but their length, and that remembers no picture."""

    def load(self, model: str, *, dtype: str, device: str) -> Loaded:
        """Import and load; `import fastvlm_mlx` itself was part of starting."""
        began = time.perf_counter()
        import fastvlm_mlx as fv

        load = fv.load
        imported = time.perf_counter()
        weights_ms = time_function("fastvlm_mlx.engine", "load_model")
        self.engine = load(model, dtype=dtype, device=device, feature_cache_bytes=0)
        loaded = time.perf_counter()
        return Loaded(
            import_ms=(imported - began) * 1000,
            load_ms=(loaded - imported) * 1000,
            weights_ms=weights_ms(),
        )

    def about(self) -> About:
        """Return versions, and the cards of model and machine."""
        from fastvlm_mlx.bench.run import describe

        report = describe(
            self.engine,
            (),
            synthetic=False,
            quantization="",
            runs=0,
            warm_up_runs=0,
            seed=0,
        )
        return About(
            name=report.runtime,
            versions=installed("mlx", "mlx-lm"),
            weight_bytes=report.model.weight_bytes,
            parameters=report.model.parameters,
            fingerprint=report.model.fingerprint,
            machine=dataclasses.asdict(report.machine),
            unpacked=report.model.unpacked,
        )

    def show(self, work: Work) -> Shown:
        """Return the prompt as rendered and the pictures as fitted."""
        from fastvlm_mlx.prompt.processor import TextIds
        from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message

        case = self._case(work)
        processor = self.engine.pipeline.processor
        prompt = processor.prompt(
            [Message("system", (DEFAULT_SYSTEM,)), user_message(work.question, case.images)]
        )
        ids: list[int] = []
        for segment in prompt.segments:
            ids += segment.ids if isinstance(segment, TextIds) else [PICTURE_ID]
        fitted = (processor.pixels(path, size=work.resolution) for path in work.pictures)
        return Shown(prompt_ids=ids, pixels=[pixel_digest(pixels) for pixels in fitted])

    def ttft(self, work: Work) -> Answered:
        """Answer unfenced."""
        began_s = time.monotonic()
        return _answered(self._runtime(work).ttft(self._case(work)), began_s)

    def profile(self, work: Work) -> dict[str, float]:
        """Return the stages of a profiled call."""
        return self._runtime(work).profile(self._case(work))

    def second_turn(self, work: Work) -> Answered:
        """Ask twice in a ChatSession."""
        began_s = time.monotonic()
        return _answered(self._runtime(work).second_turn(self._case(work)), began_s)

    def memory(self) -> dict[str, int]:
        """Return the bytes of MLX's live arrays."""
        import mlx.core as mx

        return {"active_bytes": mx.get_active_memory()}

    def _runtime(self, work: Work) -> OurRuntime:
        from fastvlm_mlx.bench.harness import OurRuntime
        from fastvlm_mlx.bench.inputs import InputFiles

        folder = Path(work.pictures[0]).parent if work.pictures else Path()
        return OurRuntime(self.engine, InputFiles(folder, work.photo))

    def _case(self, work: Work) -> Case:
        from fastvlm_mlx.bench.results import Case

        return Case(
            resolution=work.resolution,
            images=len(work.pictures),
            prompt=work.prompt,
            max_tokens=work.max_tokens,
        )


def _answered(measured: Measured, began_s: float) -> Answered:
    return Answered(
        ttft_ms=measured.ttft_ms,
        token_ids=list(measured.token_ids),
        prompt_tokens=measured.prompt_tokens,
        cpu_s=measured.cpu_s,
        decode_tps=measured.decode_tps,
        peak_bytes=measured.peak_bytes,
        first_token_s=began_s + measured.ttft_ms / 1000,
    )


if __name__ == "__main__":
    serve(Ours())
