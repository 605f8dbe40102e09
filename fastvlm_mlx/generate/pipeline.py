"""Picture and messages to events: the way from a call to its answer, and the clock along it.

Joins model, processor and loop; everything it holds is fixed but for the features it remembers.
Knows no checkpoint files, no terminal, and no history: which positions a cache already holds is
told by the caller.

Unprofiled, nothing waits before the first token: the tower is dispatched before its pixels are
hashed and the prompt is tokenized. Profiled, each stage is fenced by an evaluation, so that its
time is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from fastvlm_mlx.errors import ContextFull, PromptError
from fastvlm_mlx.events import Finished, FinishReason, TextDelta
from fastvlm_mlx.generate.beam import beam_search
from fastvlm_mlx.generate.cache import FeatureCache
from fastvlm_mlx.generate.clock import Clock, Meter
from fastvlm_mlx.generate.context import no_room
from fastvlm_mlx.generate.loop import Step, generate_ids
from fastvlm_mlx.generate.options import AnswerOptions, ImageOptions, Picture
from fastvlm_mlx.model.decoder import KVLayer
from fastvlm_mlx.model.fastvlm import (
    EncodedImage,
    FastVLM,
    ShownImage,
    StoredImage,
    features_digest,
    pixel_digest,
    pixel_sample,
)
from fastvlm_mlx.model.fingerprint import fingerprint
from fastvlm_mlx.prompt.image import open_image, picture_name
from fastvlm_mlx.prompt.processor import Processor, Prompt, TextIds
from fastvlm_mlx.prompt.template import user_message
from fastvlm_mlx.prompt.tokenizer import TextStream
from fastvlm_mlx.sampling import GREEDY


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model with its processor and stop ids.

    `name` is what its user called it; `origin` marks the pictures it encoded as its own.
    """

    model: FastVLM
    processor: Processor
    stop_ids: frozenset[int]
    name: str = ""
    features: FeatureCache = field(default_factory=FeatureCache)
    origin: object = field(default_factory=object)

    @cached_property
    def fingerprint(self) -> str:
        """Which network this is, by all of its weights: read once, when first asked for."""
        return fingerprint(self.model)

    def start_clock(self, *, profile: bool) -> Clock:
        """Begin a call: its time and its peak memory count from now."""
        mx.reset_peak_memory()
        return Clock(profile)

    def encode(
        self, picture: Picture, options: ImageOptions, clock: Clock, name: str | None = None
    ) -> EncodedImage:
        """Return the picture's features, dispatched but not waited for (unless profiled).

        A picture whose pixels were seen lately does not go through the tower again.

        Raises ImageError or FetchError for a picture that cannot be read, ConfigError for a
        resolution off the grid, PromptError for features of another model.
        """
        if isinstance(picture, EncodedImage):
            return self._own(picture)
        if isinstance(picture, StoredImage):
            return self._encoded(picture.pixels, picture.digest, picture.name, clock)
        vision = self.model.config.vision
        size = vision.image_size if options.resolution is None else options.resolution
        vision.tokens(size, size)
        since = time.perf_counter()
        image = open_image(
            picture,
            background=options.background,
            reduced_to=size if options.reduced_jpeg else None,
        )
        clock.add("image_decode", since)
        since = time.perf_counter()
        pixels = self.processor.fit(image, size=size, mode=options.image_mode)
        clock.add("preprocess", since)
        return self._encoded(pixels, None, name or picture_name(picture), clock)

    def look_up(
        self, images: Sequence[ShownImage], clock: Clock, cancelled: Callable[[], bool]
    ) -> tuple[EncodedImage, ...] | None:
        """Return a transcript's pictures with their features; None if cancelled meanwhile.

        `cancelled` is asked before each picture that is only stored so far.
        """
        encoded: list[EncodedImage] = []
        for image in images:
            if isinstance(image, StoredImage) and cancelled():
                return None
            encoded.append(self.encode(image, ImageOptions(), clock))
        return tuple(encoded)

    def _encoded(
        self, pixels: np.ndarray, digest: str | None, name: str, clock: Clock
    ) -> EncodedImage:
        """Return a picture's features, remembered or new; `digest` is its own if it is known.

        Hashing takes milliseconds. It can wait until the tower runs if no picture remembered could
        be this one: a few of its pixels, the sample, say so at no cost.
        """
        sample = pixel_sample(pixels)
        features = None
        if self.features.may_hold(sample):
            digest = digest or self._digest(pixels, clock)
            features = self.features.get(digest)
        if features is None:
            features = self._features(pixels, clock)
            digest = digest or self._digest(pixels, clock)
            self.features.put(digest, features, sample)
        assert digest is not None
        return EncodedImage(features, digest, pixels, name, self.origin)

    def _digest(self, pixels: np.ndarray, clock: Clock) -> str:
        since = time.perf_counter()
        digest = pixel_digest(pixels)
        clock.add("preprocess", since)
        return digest

    def _features(self, pixels: np.ndarray, clock: Clock) -> mx.array:
        """Return projected features [tokens, hidden] of one picture."""
        since = time.perf_counter()
        clock.encoded_images += 1
        features = self.model.vision(mx.array(pixels)[None])
        since = clock.fence("vision", since, features)
        projected = self.model.project(features)[0]
        clock.fence("projector", since, projected)
        mx.async_eval(projected)
        return projected

    def _own(self, image: EncodedImage) -> EncodedImage:
        hidden = self.model.config.decoder.hidden_size
        if image.features.ndim != 2 or image.features.shape[1] != hidden:
            raise PromptError(
                f"an encoded image of shape {tuple(image.features.shape)} is not of this model "
                f"([tokens, {hidden}]): encode the picture with it"
            )
        if image.origin is self.origin:
            return image
        if image.origin is not None:
            raise PromptError(
                "an encoded image is of another loaded model: encode the picture with this one"
            )
        # Made by hand: whatever digest it was given, the KV cache must know it by its features.
        digest = features_digest(image.features)
        return replace(image, digest=digest, origin=self.origin)

    def embed(self, prompt: Prompt, images: Sequence[EncodedImage]) -> mx.array:
        """Return embeddings [1, n, hidden]: the prompt with each picture in its slot, in order.

        Raises PromptError if slots and pictures differ in number.
        """
        if prompt.slot_count != len(images):
            raise PromptError(
                f"the prompt has {prompt.slot_count} image slots, {len(images)} images were given"
            )
        remaining = iter(images)
        return self.model.embed(
            [
                segment.ids if isinstance(segment, TextIds) else next(remaining).features
                for segment in prompt.segments
            ]
        )

    def require_room(self, positions: int) -> int:
        """Return how many positions are left for the answer; raise ContextFull if none is."""
        limit = self.model.config.decoder.max_positions
        if positions >= limit:
            raise ContextFull(no_room(positions, limit))
        return limit - positions

    def answer(
        self,
        embeddings: mx.array,
        cache: list[KVLayer],
        prompt: Prompt,
        options: AnswerOptions,
        clock: Clock,
        reused: int = 0,
        on_token: Callable[[int], None] = lambda _: None,
    ) -> Generator[TextDelta | Finished, None, None]:
        """Prefill `embeddings` [1,n,H] behind `reused` cached positions, then yield the answer.

        `on_token` hears every id generated, the stop id too. The last event is Finished; if the
        answer is cancelled before its first token, the only one.
        """
        positions = reused + embeddings.shape[1]
        room = self.require_room(positions)
        text = TextStream(self.processor.tokenizer, tuple(options.stop), self.stop_ids)
        meter = Meter(clock, positions, reused, streams=options.num_beams == 1)
        since = time.perf_counter()
        if options.num_beams > 1:
            steps = self._beams(embeddings, options, room)
        else:
            steps = generate_ids(
                self.model.decoder,
                embeddings,
                cache,
                prompt_ids=prompt.text_ids,
                sampling=options.sampling,
                max_tokens=min(options.max_tokens, room),
                stop_ids=self.stop_ids,
                logprobs=options.logprobs,
                cancelled=options.cancelled,
                prefilled=partial(self._fence_prefill, cache, meter, since),
            )
        reason: FinishReason = "length"
        try:
            for step in steps:
                meter.token(since)
                on_token(step.token_id)
                yield _delta(text.add(step.token_id), [step])
                if text.stopped or step.token_id in self.stop_ids:
                    reason = "stop"
                    break
                if options.cancelled():
                    reason = "cancelled"
                    break
        except Exception:
            self.features.drop_failed()
            raise
        finally:
            steps.close()
        if meter.count == 0:
            reason = "cancelled"
        rest = text.finish()
        if rest:
            yield _delta(rest, [])
        yield Finished(reason, meter.stats())

    def _fence_prefill(
        self, cache: list[KVLayer], meter: Meter, since: float, hidden: mx.array
    ) -> None:
        """End the prefill's time where it is profiled; else nothing waits for it."""
        if meter.clock.profile:
            mx.eval(hidden, [layer.state for layer in cache])
            meter.prefilled(since)

    def unanswered(self, clock: Clock) -> Finished:
        """Return the end of a call that was cancelled before its prompt was read."""
        return Finished("cancelled", Meter(clock, 0, 0, streams=False).stats())

    def warm_up(self, kv_bits: int | None = None) -> float:
        """Answer once about a black picture of the model's size; return milliseconds.

        Kernels are compiled and weights first read here instead of in the first answer, which may
        still meet other sizes, and sampling.
        """
        since = time.perf_counter()
        size = self.model.config.vision.image_size
        features = self._features(np.zeros((size, size, 3), np.uint8), Clock(profile=False))
        prompt = self.processor.prompt([user_message("Hello", 1)])
        embeddings = self.embed(prompt, [EncodedImage(features, "")])
        steps = generate_ids(
            self.model.decoder,
            embeddings,
            self.model.decoder.make_cache(kv_bits),
            sampling=GREEDY,
            max_tokens=2,
            stop_ids=(),
        )
        for _ in steps:
            pass
        return (time.perf_counter() - since) * 1000

    def _beams(
        self, embeddings: mx.array, options: AnswerOptions, room: int
    ) -> Generator[Step, None, None]:
        """Yield the best beam's ids, all at once at the end: a search cannot stream."""
        ids = beam_search(
            self.model.decoder,
            embeddings,
            num_beams=options.num_beams,
            max_tokens=min(options.max_tokens, room),
            stop_ids=self.stop_ids,
        )
        for token_id in ids:
            yield Step(token_id)


def _delta(text: str, steps: Sequence[Step]) -> TextDelta:
    return TextDelta(
        text,
        tuple(step.token_id for step in steps),
        tuple(step.logprob for step in steps if step.logprob is not None),
    )
