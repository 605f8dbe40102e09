"""The language model behind one small face: embed, hidden, logits. Today Qwen2, from mlx-lm.

Knows Qwen2's sizes and whether its head is tied. Knows no tokens' meaning, no pictures, no
sampling. Another decoder family (Vicuna, say) would change this file and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.fused_qwen2 import FusedBlock, source_weights
from fastvlm_mlx.model.mlx_lm_parts import (
    KVCache,
    Model,
    ModelArgs,
    QuantizedKVCache,
    create_attention_mask,
)

KVLayer: TypeAlias = KVCache | QuantizedKVCache

# Affine group sizes of mlx-lm's packed KV cache, the larger the better if it divides a head.
_KV_GROUP_SIZES = (64, 32)


class Decoder(nn.Module):
    """Qwen2 in three steps, so that the head runs only over the positions someone asks for.

    `dtype` is that of all activations. It is given, never read off a weight: an embedding table
    is uint32 once it is quantized, and a float32 picture would pull the whole decoder to float32.
    Weights live under `qwen2.` with mlx-lm's names; quantized layers may replace them in place.
    `fuse` then joins what can be: `source_weights` has the old names still.
    """

    def __init__(self, config: DecoderConfig, *, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.qwen2 = Model(
            ModelArgs(
                model_type="qwen2",
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                intermediate_size=config.intermediate_size,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.rms_norm_eps,
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_positions,
                rope_theta=config.rope_theta,
                tie_word_embeddings=config.tied,
            )
        )

    def fuse(self, *, evaluate: bool = True) -> None:
        """Join q, k, v and gate, up of every layer where they are packed alike; once is enough.

        Layer by layer, each evaluated and its old matrices let go before the next; `evaluate=False`
        leaves everything lazy, for weights that never will be. See `fused_qwen2.py`.
        """
        layers = self.qwen2.model.layers
        for index, block in enumerate(layers):
            if not isinstance(block, FusedBlock):
                layers[index] = fused = FusedBlock(block)
                if evaluate:
                    mx.eval(fused.parameters())

    def source_weights(self) -> dict[str, mx.array]:
        """Return every parameter by mlx-lm's names, fused or not; slices, which take no memory."""
        return source_weights(self)

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids [B,n], any integer dtype, to embeddings [B,n,H] of `dtype`."""
        return self.qwen2.model.embed_tokens(ids).astype(self.dtype)

    def hidden(
        self,
        embeddings: mx.array,
        cache: Sequence[KVLayer] | None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        """Run the layers: embeddings [B,n,H] to states [B,n,H] of `dtype`, after the final norm.

        The n positions follow those in `cache`, which is advanced by n; None means no cache.
        `last_only` returns the last position's state [B,1,H]: of the others the last layer then
        computes keys and values, and nothing that no one reads.
        """
        states = embeddings.astype(self.dtype)
        model = self.qwen2.model
        *layers, final = model.layers
        if not last_only or not isinstance(final, FusedBlock):
            states = model(None, cache=cache, input_embeddings=states)
            return states[:, -1:] if last_only else states
        kept = [None] * len(model.layers) if cache is None else cache
        mask = create_attention_mask(states, kept[0])
        for layer, kv in zip(layers, kept, strict=False):
            states = layer(states, mask, kv)
        return model.norm(final(states, mask, kept[-1], last_only=True))

    def logits(self, hidden: mx.array) -> mx.array:
        """Apply the head: states [B,m,H] to logits [B,m,V] of `dtype`."""
        if self.config.tied:
            return self.qwen2.model.embed_tokens.as_linear(hidden)
        return self.qwen2.lm_head(hidden)

    def make_cache(self, kv_bits: int | None = None) -> list[KVLayer]:
        """Return an empty KV cache, one entry a layer: floats, or packed in 8 or 4 bits.

        Packed is mlx-lm's affine form, in groups of 64 (32 if a head has no multiple of 64).
        Raises ConfigError for other bits, or heads that no group divides.
        """
        layers = range(self.config.num_layers)
        if kv_bits is None:
            return [KVCache() for _ in layers]
        if kv_bits not in (8, 4):
            raise ConfigError(f"the KV cache packs into 8 or 4 bits, not {kv_bits}")
        head_dim = self.config.hidden_size // self.config.num_heads
        fitting = [size for size in _KV_GROUP_SIZES if head_dim % size == 0]
        if not fitting:
            raise ConfigError(
                f"this model's KV cache can't be packed: its heads of {head_dim} are no multiple "
                f"of {_KV_GROUP_SIZES[-1]}"
            )
        return [QuantizedKVCache(group_size=fitting[0], bits=kv_bits) for _ in layers]
