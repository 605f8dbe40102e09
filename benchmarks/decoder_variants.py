"""Qwen2's layers as mlx-lm has them, and joined with RoPE apart, on the engine's own weights.

Each decodes what the engine's joined layers decode; `formulations.py` asks a device which is
faster. The weights are shared: slices and references, no copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.model.cpu_decoder import RowEmbedding, RowLinear
from fastvlm_mlx.model.decoder import Decoder, KVLayer
from fastvlm_mlx.model.fused_qwen2 import FusedAttention, FusedBlock, _added
from fastvlm_mlx.model.mlx_lm_parts import KVCache, QuantizedKVCache, attend

Run = Callable[[], mx.array]
_PLAIN: dict[type, type] = {RowLinear: nn.Linear, RowEmbedding: nn.Embedding}


def as_mlx_lm(decoder: Decoder, config: ModelConfig) -> Decoder:
    """Return the decoder with mlx-lm's own modules: q, k, v, gate and up each a product."""
    plain = Decoder(config.decoder, dtype=decoder.dtype)
    weights = decoder.source_weights()

    def setting(path: str, _: nn.Module) -> bool | dict[str, int | str]:
        if f"{path}.scales" not in weights:
            return False
        assert config.quant is not None  # the loader refuses packed weights without
        bits, group_size, mode = config.quant.of(f"decoder.{path}")
        return {"bits": bits, "group_size": group_size, "mode": mode}

    nn.quantize(plain, class_predicate=setting)
    plain.load_weights(list(weights.items()), strict=True)
    plain.eval()
    mx.eval(plain.parameters())
    return plain


class TurnedApart(FusedAttention):
    """Joined attention with RoPE over queries and over keys, each a kernel of its own."""

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: KVCache | QuantizedKVCache | None,
        residual: mx.array,
    ) -> mx.array:
        """Return `residual` plus attention over normed states `x`, both [B,n,H]."""
        batch, length, _ = x.shape
        heads = self.qkv_proj(x).reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        ends = [self.n_heads, self.n_heads + self.n_kv_heads]
        queries, keys, values = mx.split(heads, ends, axis=1)
        offset = 0 if cache is None else cache.offset
        queries, keys = (self.rope(part, offset=offset) for part in (queries, keys))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        seen = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return _added(residual, seen.transpose(0, 2, 1, 3).reshape(batch, length, -1), self.o_proj)


def as_a_gpu_runs_it(decoder: Decoder) -> Decoder:
    """Return the decoder as `load_model(..., cpu_forms=False)` makes it, its weights shared."""

    def twin(part: Any) -> Any:
        if isinstance(part, list):
            return [twin(one) for one in part]
        if not isinstance(part, nn.Module):
            return part
        same = copy.copy(part)
        for name, child in part.items():
            same[name] = twin(child)
        same.__class__ = _PLAIN.get(type(part), type(part))
        return same

    plain: Decoder = twin(decoder)
    return plain


def has_cpu_forms(decoder: Decoder) -> bool:
    """Whether one position's products are a CPU's (`model/cpu_decoder.py`)."""
    return any(type(module) in _PLAIN for module in decoder.modules())


def turned_apart(decoder: Decoder) -> Decoder:
    """Return the decoder with `TurnedApart` in place of each joined attention."""
    twin = copy.copy(decoder)
    twin.qwen2 = copy.copy(decoder.qwen2)
    twin.qwen2.model = copy.copy(decoder.qwen2.model)
    twin.qwen2.model.layers = [_turned_apart(block) for block in decoder.qwen2.model.layers]
    return twin


def _turned_apart(block: nn.Module) -> nn.Module:
    if not isinstance(block, FusedBlock) or not isinstance(block.self_attn, FusedAttention):
        return block
    block = copy.copy(block)
    block.self_attn = copy.copy(block.self_attn)
    block.self_attn.__class__ = TurnedApart
    return block


def decoding(decoder: Decoder, *, context: int, steps: int) -> Run:
    """Return what decodes `steps` given tokens behind `context` positions: the last's logits.

    The ids are given, not chosen: forms that differ by a rounding do the same work.
    """
    words = min(decoder.config.vocab_size, 1000)
    ids = [(7 * i) % words for i in range(context + steps)]
    cache: list[KVLayer] = decoder.make_cache()
    mx.eval(decoder.hidden(decoder.embed(mx.array([ids[:context]])), cache))

    def run() -> mx.array:
        for token in ids[context:]:
            logits = decoder.logits(decoder.hidden(decoder.embed(mx.array([[token]])), cache))
            mx.async_eval(logits)
        for layer in cache:
            layer.trim(steps)
        return logits

    return run


def prefilling(decoder: Decoder, *, positions: int) -> Run:
    """Return what reads a prompt of `positions`: the logits after the last."""
    words = min(decoder.config.vocab_size, 1000)
    ids = mx.array([[(7 * i) % words for i in range(positions)]])

    def run() -> mx.array:
        cache = decoder.make_cache()
        return decoder.logits(decoder.hidden(decoder.embed(ids), cache)[:, -1:])

    return run
