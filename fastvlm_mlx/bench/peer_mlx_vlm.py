"""mlx-vlm as a runtime to compare: its public functions as its users call them, nothing changed.

Knows mlx-vlm 0.7's `load`, `apply_chat_template`, `stream_generate` and chat, and the functions
of its own that a profiled run fences. Knows nothing of our engine: it runs under a Python that has
mlx-vlm (`peer_process.py` starts it, with OpenBLAS preloaded as for ours).

With several pictures its answers are others than ours: models/fastvlm/fastvlm.py cuts the text at
places that count the pictures before, so the n-th picture stands n - 1 ids too late. The work is
as much.

What is imposed: the dtype of the weights (cast after loading), the side the pictures are fitted
to, greedy choice, and that no id stops an answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

from fastvlm_mlx.bench.peer import (
    About,
    Answered,
    Loaded,
    Shown,
    StageClock,
    TokenClock,
    Work,
    installed,
    pixel_digest,
    time_function,
)
from fastvlm_mlx.bench.worker import serve

CHUNK = 2048
"""Positions that `generate_step` prefills at once (its `prefill_step_size`)."""


class MlxVlm:
    """A model and processor of mlx-vlm's own `load`."""

    def load(self, model: str, *, dtype: str, device: str) -> Loaded:
        """Import what a user imports, load, and cast floating-point weights to `dtype`."""
        began = time.perf_counter()
        import mlx.core as mx

        mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
        self.mx, self.mlx_vlm = mx, import_module("mlx_vlm")
        self.prompts = import_module("mlx_vlm.prompt_utils")
        self.utils = import_module("mlx_vlm.utils")
        imported = time.perf_counter()
        weights_ms = time_function("mlx_vlm.utils", "load_model")
        self.model, self.processor = self.mlx_vlm.load(model)
        loaded = time.perf_counter()
        self._cast(getattr(mx, dtype))
        return Loaded(
            import_ms=(imported - began) * 1000,
            load_ms=(loaded - imported) * 1000,
            weights_ms=weights_ms(),
            cast_ms=(time.perf_counter() - loaded) * 1000,
        )

    def about(self) -> About:
        """Return versions, the size of the weights, and what its MLX computes with."""
        from mlx.utils import tree_flatten

        from fastvlm_mlx.bench.machine import machine_card

        versions = installed("mlx-vlm", "mlx", "mlx-lm", "transformers", "torch")
        held = [array for _, array in tree_flatten(self.model.parameters())]
        card = machine_card()
        return About(
            name=f"mlx-vlm {versions['mlx-vlm']}",
            versions=versions,
            weight_bytes=sum(array.nbytes for array in held),
            machine={name: getattr(card, name) for name in ("device", "backend", "blas")},
        )

    def show(self, work: Work) -> Shown:
        """Return what `prepare_inputs` gives the model; pixels as the bytes they are a 255th of."""
        import numpy as np

        inputs = self._inputs(work)
        given = np.array(inputs["pixel_values"]).transpose(0, 2, 3, 1)
        whole = np.rint(given * 255).astype(np.uint8)
        ids = inputs["input_ids"][0].tolist()
        cannot = {}
        if self._positions(work, len(ids)) > CHUNK:
            cannot["profile"] = f"it prefills more than {CHUNK} positions in chunks"
        if len(work.pictures) != 1:
            cannot["second_turn"] = "its chat takes one picture"
        return Shown(
            prompt_ids=ids,
            pixels=[pixel_digest(pixels) for pixels in whole],
            cannot=cannot,
        )

    def ttft(self, work: Work) -> Answered:
        """Answer by `apply_chat_template` and `stream_generate` with paths."""
        self._fit_to(work.resolution)
        with self._unstopped():
            self.mx.reset_peak_memory()
            clock = TokenClock()
            # The last of them repeats the last id.
            for result in self.mlx_vlm.stream_generate(
                self.model,
                self.processor,
                self._rendered(work),
                image=list(work.pictures),
                max_tokens=work.max_tokens,
                temperature=0.0,
            ):
                if result.finish_reason is None:
                    clock.token(int(result.token))
        return clock.answered(
            prompt_tokens=self._positions(work, int(result.prompt_tokens)),
            peak_bytes=self.mx.get_peak_memory(),
        )

    def profile(self, work: Work) -> dict[str, float]:
        """Return its stages, each fenced, by its own functions in the order its generation has.

        Prefill is all of the prompt but its last position, the first token the pass over that:
        as `generate_step` splits them (generate/ar.py) up to CHUNK positions.
        """
        mx, model = self.mx, self.model
        cache = import_module("mlx_vlm.models.cache").make_prompt_cache(model.language_model)
        processor = self.processor
        self._fit_to(work.resolution)
        clock = StageClock()
        pictures = [self.utils.load_image(path) for path in work.pictures]
        clock.done("image_decode_ms")
        fitted = processor.image_processor(images=pictures)["pixel_values"]
        tower = model.vision_tower
        dtype = tower.vision_model.patch_embed.blocks[0].reparam_conv.weight.dtype
        pixels = mx.array(fitted).astype(dtype)
        mx.eval(pixels)
        clock.done("preprocess_ms")
        _, seen, _ = tower(pixels.transpose(0, 2, 3, 1))
        features = seen.reshape(seen.shape[0], -1, seen.shape[-1])
        mx.eval(features)
        clock.done("vision_ms")
        features = model.mm_projector(features)
        mx.eval(features)
        clock.done("projector_ms")
        ids = mx.array(processor(text=self._rendered(work))["input_ids"])
        embeddings = model.prepare_inputs_for_multimodal(features, ids, mx.ones_like(ids))
        mx.eval(embeddings)
        clock.done("prompt_ms")
        model.language_model(ids, inputs_embeds=embeddings[:, :-1], cache=cache, logits_to_keep=1)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        clock.done("prefill_ms")
        out = model.language_model(ids, inputs_embeds=embeddings[:, -1:], cache=cache)
        out.logits[:, -1, :].argmax(axis=-1).item()
        clock.done("first_token_ms")
        return clock.stage_ms

    def second_turn(self, work: Work) -> Answered:
        """Ask twice by the class behind `python -m mlx_vlm.chat`, as its loop does."""
        self._fit_to(work.resolution)
        theirs: Any = import_module("mlx_vlm.chat")
        theirs.load = lambda _: (self.model, self.processor)  # the one loaded, not another
        with redirect_stdout(StringIO()), self._unstopped():
            chat = theirs.MLXVisionChat("", temperature=0.0, verbose=False)
            chat.max_tokens = work.first_answer_tokens
            chat.handle_command("/image", work.pictures[0])
            chat.add_to_history("user", work.question)
            chat.add_to_history("assistant", chat.generate_response())
            chat.max_tokens = 1
            self.mx.reset_peak_memory()
            clock, sizes = TokenClock(), []
            stream = theirs.stream_generate

            def watched(*given: Any, **options: Any) -> Iterator[Any]:
                for result in stream(*given, **options):
                    if result.finish_reason is None:
                        clock.token(int(result.token))
                    sizes.append(int(result.prompt_tokens))
                    yield result

            theirs.stream_generate = watched
            try:
                chat.add_to_history("user", work.follow_up)
                chat.generate_response()
            finally:
                theirs.stream_generate = stream
        return clock.answered(
            prompt_tokens=self._positions(work, sizes[0]), peak_bytes=self.mx.get_peak_memory()
        )

    def memory(self) -> dict[str, int]:
        """Return the bytes of MLX's live arrays."""
        return {"active_bytes": self.mx.get_active_memory()}

    def _cast(self, dtype: Any) -> None:
        """Change the dtype of floating-point weights; packed ones stay as they are."""
        from mlx.utils import tree_map

        def cast(array: Any) -> Any:
            floating = self.mx.issubdtype(array.dtype, self.mx.floating)
            return array.astype(dtype) if floating and array.dtype != dtype else array

        self.model.update(tree_map(cast, self.model.parameters()))
        self.mx.eval(self.model.parameters())
        self.mx.clear_cache()

    def _rendered(self, work: Work) -> str:
        text: str = self.prompts.apply_chat_template(
            self.processor, self.model.config, work.question, num_images=len(work.pictures)
        )
        return text

    def _inputs(self, work: Work) -> dict[str, Any]:
        self._fit_to(work.resolution)
        inputs: dict[str, Any] = self.utils.prepare_inputs(
            self.processor,
            images=list(work.pictures),
            prompts=self._rendered(work),
            image_token_index=self.model.config.image_token_index,
        )
        return inputs

    def _positions(self, work: Work, ids: int) -> int:
        """Return embedding positions of a prompt of so many ids, a picture counted as one."""
        side = work.resolution // self.model.config.vision_config.patch_size
        return ids + len(work.pictures) * (side**2 - 1)

    def _fit_to(self, side: int) -> None:
        """Set the square its processor fits pictures to."""
        processor = self.processor.image_processor
        processor.size = {"shortest_edge": side}
        processor.crop_size = {"height": side, "width": side}

    @contextmanager
    def _unstopped(self) -> Iterator[None]:
        """Let no id end an answer."""
        criteria = self.processor.tokenizer.stopping_criteria
        kept, criteria.eos_token_ids = criteria.eos_token_ids, []
        try:
            yield
        finally:
            criteria.eos_token_ids = kept


if __name__ == "__main__":
    serve(MlxVlm())
