"""One size of one thing, measured: the tower, a prefill, tokens decoded; and its memory's bound.

Knows how each is run alone, the formula of its cost, and what MLX and mlx-lm hold for it. Knows no
rounds, no fit and no files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.bench.costs import Cost, Storage, decode_cost, prefill_cost, vision_cost
from fastvlm_mlx.config import DecoderConfig, VisionConfig
from fastvlm_mlx.generate.loop import prefill
from fastvlm_mlx.model.decoder import Decoder, KVLayer
from fastvlm_mlx.model.fastvlm import FastVLM

DECODE_STEPS = 8
_KV_GROWTH = 256


@dataclass(slots=True)
class Point:
    """One size of one kind: what the formula says of it, and what it took in each round.

    `bound_bytes` is the most that `peak_bytes` may be (decode: `held_bytes`, the KV cache's
    buffers); None where no formula says: MLX runs ahead of a tower that is not in low-memory mode,
    and a CPU's own form of it makes other arrays.
    """

    kind: str
    x: int
    flops: int
    moved_bytes: int
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0
    bound_bytes: int | None = None

    @property
    def best_ms(self) -> float:
        return min(self.ms)

    def count(self, cost: Callable[[], None], *, runs: int = 1) -> None:
        """Run once and note time and peak; `runs` is how many of the kind that one run holds."""
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cpu, since = time.process_time(), time.perf_counter()
        cost()
        self.ms.append((time.perf_counter() - since) * 1000 / runs)
        self.cpu_ms.append((time.process_time() - cpu) * 1000 / runs)
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory() - before)


def kv_bytes(cache: Sequence[KVLayer]) -> int:
    """Bytes of the buffers of a KV cache, which hold `grown` positions."""
    arrays = [value for _, value in tree_flatten([layer.state for layer in cache])]
    return sum(array.nbytes for array in arrays if isinstance(array, mx.array))


def grown(positions: int) -> int:
    """Positions that mlx-lm's buffers have room for once they hold so many."""
    return -(-positions // _KV_GROWTH) * _KV_GROWTH


def tower_bound(config: VisionConfig, storage: Storage, side: int) -> int:
    """The most a low-memory tower may hold beyond its weights, at `side` pixels a side.

    The largest of three: three arrays of the stem's first output (its sum with the bias, GELU's
    factors); what MLX's CPU unfolds that convolution to (pixels, padded, 27 numbers an output); an
    attention block's scores, before and after softmax, with its queries, keys, values and their
    copies. A page besides, for scalars.
    """
    size, first, pixels = storage.float_bytes, config.embed_dims[0], side * side
    steps = [3 * first * pixels // 4, 3 * pixels + 3 * (side + 2) ** 2 + (27 + first) * pixels // 4]
    found = [numbers * size for numbers in steps]
    for i, dim in enumerate(config.embed_dims):
        if config.token_mixers[i] == "attention":
            positions = (side // 4 // 2**i) ** 2
            numbers = 2 * dim // config.head_dim * positions**2 + 8 * dim * positions
            found.append(numbers * storage.tail_bytes)
    return max(found) + 4096


def prefill_bound(config: DecoderConfig, storage: Storage, tokens: int) -> int:
    """The most a prefill from an empty cache may hold beyond the weights: one layer's, and the KV.

    A dozen arrays as wide as a state, and either eight as wide as the MLP or scores before and
    after softmax. More layers hold no more, and logits are not among it: those of all positions,
    32 MLP widths of 0.5B, would exceed it.
    """
    scores = 2 * config.num_heads * tokens
    numbers = tokens * (12 * config.hidden_size + max(8 * config.intermediate_size, scores))
    return numbers * storage.float_bytes + storage.kv(grown(tokens), config)


def measure_vision(model: FastVLM, storage: Storage, sides: Sequence[int]) -> Iterator[Point]:
    """Yield a point a resolution, each time this is asked for: one round."""
    tower = model.vision
    for side in sides:
        cost = vision_cost(tower.config, storage, height=side, width=side)
        point = _point("vision", side * side, cost)
        if tower.low_memory and tower.form is None:
            point.bound_bytes = tower_bound(tower.config, storage, side)
        pixels = mx.zeros((1, side, side, 3), dtype=mx.uint8) + mx.array(127, dtype=mx.uint8)
        mx.eval(pixels)
        point.count(partial(_evaluate, tower, pixels))
        yield point


def measure_prefill(model: FastVLM, storage: Storage, lengths: Sequence[int]) -> Iterator[Point]:
    """Yield a point a prompt's length: one pass through the layers into an empty cache."""
    decoder = model.decoder
    for length in lengths:
        embeddings = decoder.embed(mx.arange(length)[None] % decoder.config.vocab_size)
        mx.eval(embeddings)
        cache = decoder.make_cache(storage.kv_bits)
        point = _point("prefill", length, prefill_cost(decoder.config, storage, tokens=length))
        point.count(partial(_evaluate, prefill, decoder, embeddings, cache))
        point.held_bytes = kv_bytes(cache)
        point.bound_bytes = prefill_bound(decoder.config, storage, length)
        yield point


def measure_decode(model: FastVLM, storage: Storage, contexts: Sequence[int]) -> Iterator[Point]:
    """Yield a point a context: DECODE_STEPS tokens, one after the other, at its end."""
    decoder = model.decoder
    for context in contexts:
        cache = filled_cache(decoder, context)
        point = _point("decode", context, decode_cost(decoder.config, storage, context=context))
        point.held_bytes = kv_bytes(cache)
        point.bound_bytes = storage.kv(grown(context), decoder.config)
        point.count(partial(_decode, decoder, cache), runs=DECODE_STEPS)
        yield point


def filled_cache(decoder: Decoder, positions: int) -> list[KVLayer]:
    """A KV cache of so many positions, their keys and values zero."""
    config = decoder.config
    shape = (1, config.num_kv_heads, positions, config.hidden_size // config.num_heads)
    cache = decoder.make_cache()
    for layer in cache:
        # Two arrays: where they fill a buffer to its end they become it, and one would be shared.
        layer.update_and_fetch(mx.zeros(shape, decoder.dtype), mx.zeros(shape, decoder.dtype))
    mx.eval([layer.state for layer in cache])
    return cache


def _evaluate(function: Callable[..., mx.array], *inputs: object) -> None:
    mx.eval(function(*inputs))


def _decode(decoder: Decoder, cache: list[KVLayer]) -> None:
    token = mx.array([[1]])
    for _ in range(DECODE_STEPS):
        logits = decoder.logits(decoder.hidden(decoder.embed(token), cache))
        token = mx.argmax(logits, axis=-1)
        mx.eval(token)


def _point(kind: str, x: int, cost: Cost) -> Point:
    return Point(kind, x, cost.flops, cost.bytes)
