"""The stages of one answer as our engine runs them, traced: tower, projector, prefill, decode.

Knows our model's public faces and the one prompt that is counted: 30 text positions around a
picture of 256, and a token chosen greedily. Weights are hollow, in bfloat16, the decoder packed
uniformly in groups of 64 below 16 bits; nothing is computed, so 7B needs no more memory than 0.5B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.graph_trace import hollow
from benchmarks.metal_rules.standins import Trace, standing_in, take
from fastvlm_mlx.config import PRESETS
from fastvlm_mlx.generate.loop import prefill
from fastvlm_mlx.model.decoder import KVLayer
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import FastViTHD

DTYPE = mx.bfloat16
SIDE = 1024
IMAGE_POSITIONS = 256
TEXT_BEFORE, TEXT_AFTER = 14, 16
PROMPT_POSITIONS = TEXT_BEFORE + IMAGE_POSITIONS + TEXT_AFTER
# A decode step some tokens into the answer; the cache grows in steps of 256.
CONTEXT, CACHE_POSITIONS = 300, 512
GROUP_SIZE = 64


def cast(module: nn.Module) -> nn.Module:
    """Give a module hollow weights in `DTYPE`; packed ones keep their integers."""
    floats = tree_map(
        lambda a: a.astype(DTYPE) if mx.issubdtype(a.dtype, mx.floating) else a,
        module.parameters(),
    )
    module.update(floats)
    return hollow(module)


def hollow_array(*shape: int) -> mx.array:
    """Return an evaluated array of `DTYPE` that takes no memory."""
    array = mx.broadcast_to(mx.array(0, dtype=DTYPE), shape)
    mx.eval(array)
    return array


def towers() -> Iterator[tuple[str, Trace]]:
    """Yield the tower at 1024 px in both of its forms."""
    pixels = mx.zeros((1, SIDE, SIDE, 3), dtype=mx.uint8)
    for name, paired in (("tower", False), ("tower, paired heads", True)):
        with standing_in() as calls:
            tower = cast(FastViTHD(PRESETS["0.5b"].vision, paired_heads=paired))
            yield name, take(calls, tower, pixels)


def language(size: str, bits: int) -> Iterator[tuple[str, Trace]]:
    """Yield projector, prefill and one decode step of a preset size, weights in 16, 8 or 4 bits."""
    config = PRESETS[size]
    with standing_in() as calls:
        model = FastVLM(config, DTYPE)
        if bits < 16:
            nn.quantize(model.decoder, group_size=GROUP_SIZE, bits=bits)
        model.decoder.fuse(evaluate=False)
        cast(model)
        features = hollow_array(1, IMAGE_POSITIONS, config.projector.in_dim)
        yield "projector", take(calls, model.project, features)
        shown = hollow_array(IMAGE_POSITIONS, config.decoder.hidden_size)
        yield "prefill", take(calls, _prefill(model), shown)
        yield "decode", take(calls, _decode(model), mx.array([7], dtype=mx.uint32))


def _prefill(model: FastVLM) -> Callable[[mx.array], tuple[mx.array, ...]]:
    """Return what runs a prompt into a fresh cache and chooses the first token."""

    def run(features: mx.array) -> tuple[mx.array, ...]:
        parts: list[list[int] | mx.array] = [[7] * TEXT_BEFORE, features, [7] * TEXT_AFTER]
        cache = model.decoder.make_cache()
        state = prefill(model.decoder, model.embed(parts), cache)
        return choose(model.decoder.logits(state)[:, -1]), *held(cache)

    return run


def _decode(model: FastVLM) -> Callable[[mx.array], tuple[mx.array, ...]]:
    """Return what takes a token in and chooses the next."""
    config = model.config.decoder
    head_dim = config.hidden_size // config.num_heads

    def run(token: mx.array) -> tuple[mx.array, ...]:
        cache = model.decoder.make_cache()
        fill(cache, config.num_kv_heads, head_dim)
        decoder = model.decoder
        state = decoder.hidden(decoder.embed(token[:, None]), cache)
        return choose(decoder.logits(state)[:, -1]), *held(cache)

    return run


def fill(cache: list[KVLayer], heads: int, head_dim: int) -> None:
    """Give every layer of a cache `CONTEXT` positions."""
    for layer in cache:
        layer.keys = hollow_array(1, heads, CACHE_POSITIONS, head_dim)
        layer.values = hollow_array(1, heads, CACHE_POSITIONS, head_dim)
        layer.offset = CONTEXT


def choose(logits: mx.array) -> mx.array:
    """Return the most likely token, as the greedy sampler does."""
    return mx.argmax(logits, axis=-1)


def held(cache: list[KVLayer]) -> list[mx.array]:
    """Return the cache's arrays, which outlive the step."""
    return [array for layer in cache for array in (layer.keys, layer.values)]
