"""The public face: `load` a model, then encode, generate, stream, chat, score.

Joins checkpoint, processor and pipeline. An Engine's fields never change; use it from the thread
that loaded it, since MLX's arrays belong to that thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.backend import compute_dtype, select_device
from fastvlm_mlx.checkpoint.hub import Progress, Say, model_folder
from fastvlm_mlx.checkpoint.load import decide_tied, load_model
from fastvlm_mlx.checkpoint.memory import free_bytes, require_memory
from fastvlm_mlx.checkpoint.store import Checkpoint, open_checkpoint
from fastvlm_mlx.config import ImageMode, ModelConfig
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.events import Generation, GenerationEvent
from fastvlm_mlx.generate.cache import DEFAULT_FEATURE_BYTES, FeatureCache
from fastvlm_mlx.generate.clock import Clock
from fastvlm_mlx.generate.context import Overflow
from fastvlm_mlx.generate.loop import logprobs_along, score_ids
from fastvlm_mlx.generate.options import AnswerOptions, ImageOptions, Picture, listed
from fastvlm_mlx.generate.pipeline import Pipeline
from fastvlm_mlx.generate.session import ChatSession, collect
from fastvlm_mlx.model.fastvlm import EncodedImage
from fastvlm_mlx.prompt.image import ImageSource
from fastvlm_mlx.prompt.processor import Processor, Prompt
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message
from fastvlm_mlx.sampling import GREEDY, Sampling

__all__ = ["EncodedImage", "Engine", "load"]

log = logging.getLogger("fastvlm_mlx")

LOADING_SHARE = 1.2
"""Memory of loading over that of the result: one module's source is beside it at a time."""


@dataclass(frozen=True, slots=True, repr=False)
class Engine:
    """A loaded model. `source` is the folder it came from, `layout` that folder's layout."""

    pipeline: Pipeline
    source: Path
    layout: str

    @property
    def name(self) -> str:
        """The model as it was asked for: a folder, a hub name or "demo"."""
        return self.pipeline.name

    @property
    def image_features(self) -> FeatureCache:
        """The features of the pictures seen lately, within the bytes `load` was told."""
        return self.pipeline.features

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return f"Engine({str(self.source)!r}, layout={self.layout!r}, dtype={dtype!r})"

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.pipeline.model.config

    @property
    def dtype(self) -> mx.Dtype:
        """What activations are computed in."""
        return self.pipeline.model.dtype

    def encode(
        self,
        source: ImageSource,
        *,
        resolution: int | None = None,
        image_mode: ImageMode | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        reduced_jpeg: bool = False,
        name: str | None = None,
    ) -> EncodedImage:
        """Return a picture's features [tokens, hidden], evaluated, for use in any prompt.

        `source` is a path, http(s) or data: URL, "-" (stdin), encoded bytes, PIL image or array.
        `resolution` is the side in pixels the tower sees, a multiple of 64. `background` is what
        transparent pixels are laid on. `reduced_jpeg` decodes a large JPEG at a part of its size:
        quicker, and other pixels than the reference's. `name` is what people are told the picture
        is. Pixels seen lately are not encoded again. Raises ImageError, FetchError or ConfigError.
        """
        options = ImageOptions(
            resolution=resolution,
            image_mode=image_mode,
            background=background,
            reduced_jpeg=reduced_jpeg,
        )
        encoded = self.pipeline.encode(source, options, Clock(profile=False), name)
        mx.eval(encoded.features)
        return encoded

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        num_beams: int = 1,
        profile: bool = False,
        system: str = DEFAULT_SYSTEM,
        resolution: int | None = None,
        image_mode: ImageMode | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        reduced_jpeg: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Answer one prompt about any number of pictures; the whole of what `stream` yields."""
        return collect(
            self.stream(
                prompt,
                images=images,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                logprobs=logprobs,
                num_beams=num_beams,
                profile=profile,
                system=system,
                resolution=resolution,
                image_mode=image_mode,
                background=background,
                reduced_jpeg=reduced_jpeg,
                cancelled=cancelled,
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        num_beams: int = 1,
        profile: bool = False,
        system: str = DEFAULT_SYSTEM,
        resolution: int | None = None,
        image_mode: ImageMode | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        reduced_jpeg: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[GenerationEvent, None, None]:
        """Yield TextDelta as text appears, then Finished; greedy unless `sampling` says else.

        Each picture is rendered as `<image>` and a newline before the text, as LLaVA does.
        `stop` strings end the answer and are not shown. `logprobs` adds each token's natural
        log-probability. `num_beams` above 1 searches beams (greedy scores, nothing streams).
        `profile` fences the stages and times them instead of TTFT. `cancelled` is asked before each
        pass of the prompt and after each token. Raises PromptError, ImageError, FetchError,
        ConfigError or FastVLMError.
        """
        options = AnswerOptions(
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            num_beams=num_beams,
            cancelled=cancelled,
        )
        clock = self.pipeline.start_clock(profile=profile)
        image_options = ImageOptions(
            resolution=resolution,
            image_mode=image_mode,
            background=background,
            reduced_jpeg=reduced_jpeg,
        )
        rendered, embeddings = self._prepare(prompt, images, system, image_options, clock)
        cache = self.pipeline.model.decoder.make_cache()
        yield from self.pipeline.answer(embeddings, cache, rendered, options, clock)

    def chat(
        self,
        *,
        sampling: Sampling = GREEDY,
        system: str = DEFAULT_SYSTEM,
        overflow: Overflow = "refuse",
        kv_bits: int | None = None,
    ) -> ChatSession:
        """Return a new conversation; each of its turns prefills only what is new.

        `overflow` is what happens when it outgrows the context: "refuse", or "drop" the oldest
        turns. `kv_bits` 8 or 4 packs its KV cache. Raises ConfigError for other bits.
        """
        return ChatSession(
            self.pipeline, sampling=sampling, system=system, overflow=overflow, kv_bits=kv_bits
        )

    def resume(
        self,
        path: str | os.PathLike[str],
        *,
        sampling: Sampling = GREEDY,
        overflow: Overflow = "refuse",
        kv_bits: int | None = None,
        say: Say | None = None,
    ) -> ChatSession:
        """Return the conversation that `ChatSession.save` wrote to `path`.

        With the same model and packing nothing is computed again. What is damaged or has to be
        computed again is told to `say`, by default as a warning. Raises SessionError, or
        ConfigError for pictures that are not on this model's grid.
        """
        return ChatSession.resume(
            self.pipeline, path, sampling=sampling, overflow=overflow, kv_bits=kv_bits, say=say
        )

    def warm_up(self, *, kv_bits: int | None = None) -> float:
        """Answer once about a black picture, so that the first answer is hardly slower than others.

        `kv_bits` is the chat's, if it packs its KV cache. Returns milliseconds.
        """
        return self.pipeline.warm_up(kv_bits)

    def score(
        self,
        prompt: str,
        images: Sequence[Picture] = (),
        continuation: str = "",
        *,
        system: str = DEFAULT_SYSTEM,
    ) -> tuple[float, ...]:
        """Return the natural log-probability of each token of `continuation` after the prompt.

        The continuation is plain text, tokenized on its own. Raises PromptError if it is empty.
        """
        ids = self.pipeline.processor.tokenizer.encode(continuation)
        if not ids:
            raise PromptError("the continuation to score is empty")
        embeddings = self._before(prompt, images, system, ids)
        return tuple(score_ids(self.pipeline.model.decoder, embeddings, ids))

    def distributions(
        self,
        prompt: str,
        images: Sequence[Picture],
        continuation_ids: Sequence[int],
        *,
        system: str = DEFAULT_SYSTEM,
    ) -> Iterator[mx.array]:
        """Yield the whole distribution before each of `continuation_ids`, in order, a few at once.

        Each array is [m, vocabulary] of natural float32 log-probabilities, unevaluated; take what
        you need of one before asking for the next. `score` is what these say of the ids themselves.
        Raises PromptError if there are no ids or no room for them.
        """
        if not continuation_ids:
            raise PromptError("there are no tokens to score")
        embeddings = self._before(prompt, images, system, continuation_ids)
        return logprobs_along(self.pipeline.model.decoder, embeddings, continuation_ids)

    def _before(
        self, prompt: str, images: Sequence[Picture], system: str, ids: Sequence[int]
    ) -> mx.array:
        """Return the prompt's embeddings, if there is room for `ids` after them."""
        _, embeddings = self._prepare(prompt, images, system, ImageOptions(), Clock(profile=False))
        self.pipeline.require_room(embeddings.shape[1] + len(ids) - 1)
        return embeddings

    def _prepare(
        self,
        prompt: str,
        images: Sequence[Picture],
        system: str,
        options: ImageOptions,
        clock: Clock,
    ) -> tuple[Prompt, mx.array]:
        """Dispatch the pictures, then tokenize and splice; return the prompt and its embeddings."""
        encoded = [self.pipeline.encode(picture, options, clock) for picture in listed(images)]
        since = time.perf_counter()
        rendered = self.pipeline.processor.prompt(
            [Message("system", (system,)), user_message(prompt, len(encoded))]
        )
        embeddings = self.pipeline.embed(rendered, encoded)
        clock.fence("prompt", since, embeddings)
        return rendered, embeddings


def load(
    model: str | Path = "demo",
    *,
    dtype: str | None = None,
    device: str | None = None,
    memory_limit: int | None = None,
    vision_from: str | Path | None = None,
    keep_quantized: bool = False,
    feature_cache_bytes: int = DEFAULT_FEATURE_BYTES,
    paired_heads: bool = False,
    low_memory: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
    on_config: Callable[[ModelConfig], None] | None = None,
) -> Engine:
    """Load a model by folder, hub name (`org/name[@revision]`) or "demo".

    `dtype` is float32, bfloat16 or float16; by default bfloat16 on a GPU and float32 on a CPU,
    whose half-precision matrix products are slow. `device` is "cpu" or "gpu", by default MLX's
    choice. On a CPU quantized weights are dequantized while they fit in memory, since its
    quantized products are slower still; `keep_quantized` keeps them packed. Pictures' features
    are remembered up to `feature_cache_bytes`, 0 for not at all. `memory_limit` refuses a model
    whose weights need more bytes. `vision_from` names the model that holds the tower, for exports
    without one. `say` gets lines for the user; `progress` gets (bytes so far, bytes in all, what:
    "Downloading FILE" or "Loading weights"), perhaps from another thread. `on_config` gets the
    model's sizes before its weights are read, for what can be prepared meanwhile.

    `paired_heads` lets two of the tower's attention heads share a key of twice the width, for which
    Metal has a fused kernel: up to 54 MiB more weights in float32, elsewhere only more products.
    `low_memory` runs the tower step by step: the same features from less memory, but nothing else
    is done meanwhile.

    Raises a FastVLMError, one line, for anything wrong with names, files or memory.
    """
    selected = select_device(device)
    on_cpu = selected.type == mx.DeviceType.cpu
    kind = compute_dtype(dtype, selected)
    checkpoint = open_checkpoint(
        model_folder(model, say=say, progress=progress),
        vision_from=None
        if vision_from is None
        else model_folder(vision_from, say=say, progress=progress),
    )
    if on_config is not None:
        on_config(checkpoint.config)
    processor = Processor.from_folder(
        checkpoint.folder,
        image_size=checkpoint.config.vision.image_size,
        image_mode=checkpoint.config.image_mode,
    )
    checkpoint = decide_tied(checkpoint)
    dequantize = _dequantize(checkpoint, kind, on_cpu and not keep_quantized, memory_limit)
    resident = checkpoint.resident_bytes(kind, dequantize=dequantize, paired_heads=paired_heads)
    require_memory(int(resident * LOADING_SHARE), limit=memory_limit, what=str(model))
    network = load_model(
        checkpoint,
        kind,
        dequantize=dequantize,
        paired_heads=paired_heads,
        low_memory=low_memory,
        progress=_named("Loading weights", progress),
    )
    stop_ids = processor.tokenizer.stop_ids | set(network.config.eos_ids)
    features = FeatureCache(feature_cache_bytes)
    pipeline = Pipeline(network, processor, stop_ids, str(model), features)
    return Engine(pipeline, checkpoint.folder, checkpoint.layout.name)


def _named(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """Say what it is that goes on to a callback that counts."""
    return None if progress is None else lambda done, total: progress(done, total, what)


def _dequantize(checkpoint: Checkpoint, dtype: mx.Dtype, wanted: bool, limit: int | None) -> bool:
    """Whether to unpack quantized weights: only if wanted, and if the result fits in memory."""
    if not checkpoint.quantized_paths or not wanted:
        return False
    needed = checkpoint.resident_bytes(dtype, dequantize=True) * LOADING_SHARE
    fits = needed <= min(free_bytes(), limit if limit is not None else needed)
    if not fits:
        log.warning("not enough memory to dequantize: weights stay quantized, slow on a CPU")
    return fits
