"""Qwen2's layers in fewer, larger products: one for q, k and v, one for gate and up.

Knows mlx-lm's attention, MLP and block by the names of their parts, and holds their weights: the
rows of the joined matrices lie one below the other, as they are (packed codes, scales and biases
too), so each output row is the same sum as before. Joining is bit-equal for packed weights and
within a rounding for floats, where a BLAS may cut a larger product otherwise. Refuses to join
matrices that are not packed alike: that group of that layer stays as mlx-lm made it.

Kernels of a decode step on Metal, a layer: 11 in floats (the residuals are added by the products'
epilogue), 14 packed (a bias and two residuals apart); mlx-lm's own layer takes 17 and 20. With one
position the heads are slices that lie in order, so RoPE over q and k at once copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fastvlm_mlx.model.mlx_lm_parts import KVCache, QuantizedKVCache, attend, swiglu

GROUPS = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}
"""Part of a layer: the name of its joined matrix, and the matrices that are joined, in order."""

_LEAVES = ("weight", "scales", "biases", "bias")


class FusedAttention(nn.Module):
    """Attention over heads from one product: rows of q, then k, then v. Holds mlx-lm's RoPE."""

    def __init__(self, attention: nn.Module, qkv_proj: nn.Module) -> None:
        super().__init__()
        self.n_heads: int = attention.n_heads
        self.n_kv_heads: int = attention.n_kv_heads
        self.scale: float = attention.scale
        self.rope = attention.rope
        self.qkv_proj = qkv_proj
        self.o_proj = attention.o_proj
        self.head_dim = _rows(attention.q_proj) // self.n_heads
        self.part_rows = tuple(_rows(attention[part]) for part in GROUPS["self_attn"][1])

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: KVCache | QuantizedKVCache | None,
        residual: mx.array,
    ) -> mx.array:
        """Return `residual` plus attention over normed states `x` [B,n,H].

        `residual` is [B,n,H], or [B,1,H]: then the last position alone is looked at, to which
        nothing is masked.
        """
        batch, length, _ = x.shape
        heads = self.qkv_proj(x).reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)
        turned, values = mx.split(heads, [self.n_heads + self.n_kv_heads], axis=1)
        turned = self.rope(turned, offset=0 if cache is None else cache.offset)
        queries, keys = mx.split(turned, [self.n_heads], axis=1)
        if cache is not None:
            if cache.offset == 0 and length % cache.step == 0:
                # They fill a new buffer, so MLX takes them for it, and with them all they are
                # slices of: queries, keys and values of every layer.
                keys, values = mx.contiguous(keys), mx.contiguous(values)
            keys, values = cache.update_and_fetch(keys, values)
        if residual.shape[1] < length:
            queries, mask = queries[:, :, -1:], None
        seen = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        seen = seen.transpose(0, 2, 1, 3).reshape(batch, residual.shape[1], -1)
        return _added(residual, seen, self.o_proj)


class FusedMLP(nn.Module):
    """SwiGLU with gate and up from one product: rows of gate, then of up."""

    def __init__(self, mlp: nn.Module, gate_up_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = mlp.down_proj
        self.part_rows = tuple(_rows(mlp[part]) for part in GROUPS["mlp"][1])

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """Return `residual` plus the MLP of normed states `x`, both [B,n,H]."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return _added(residual, swiglu(gate, up), self.down_proj)


class FusedBlock(nn.Module):
    """A layer whose groups are joined where they can be; called as mlx-lm's TransformerBlock is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        qkv, gate_up = (joined(block[at], parts) for at, (_, parts) in GROUPS.items())
        self.self_attn = block.self_attn if qkv is None else FusedAttention(block.self_attn, qkv)
        self.mlp = block.mlp if gate_up is None else FusedMLP(block.mlp, gate_up)
        self.input_layernorm = block.input_layernorm
        self.post_attention_layernorm = block.post_attention_layernorm

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None = None,
        cache: KVCache | QuantizedKVCache | None = None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        """Return states [B,n,H] after the layer; `cache` is advanced by n.

        `last_only` returns the last position's alone, [B,1,H].
        """
        attention, mlp = self.self_attn, self.mlp
        normed = self.input_layernorm(x)
        if isinstance(attention, FusedAttention):
            x = attention(normed, mask, cache, x[:, -1:] if last_only else x)
        else:
            x = x + attention(normed, mask, cache)
            x = x[:, -1:] if last_only else x
        normed = self.post_attention_layernorm(x)
        return mlp(normed, x) if isinstance(mlp, FusedMLP) else x + mlp(normed)


def joined(module: nn.Module, parts: Sequence[str]) -> nn.Module | None:
    """Return `parts` of `module`, linear layers, as one, lazy; None if they are not alike.

    Alike are plain layers of one dtype, or packed ones of equal bits, group size and mode.
    """
    layers = [module[part] for part in parts]
    if len({_form(layer) for layer in layers}) > 1:
        return None
    first, whole = layers[0], nn.Linear(1, 1)
    if type(first) is nn.QuantizedLinear:
        whole = nn.QuantizedLinear(32, 1, group_size=32)
        whole.group_size, whole.bits, whole.mode = first.group_size, first.bits, first.mode
    elif type(first) is not nn.Linear:
        return None
    whole.clear()  # only the kind of layer was wanted, not its tensors
    for leaf in _LEAVES:
        if first.get(leaf) is not None:
            whole[leaf] = mx.concatenate([layer[leaf] for layer in layers], axis=0)
    return whole


def source_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return every parameter by the name it had before layers were joined.

    The parts of joined matrices are slices of them and take no memory of their own.
    """
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if not isinstance(module, (FusedAttention, FusedMLP)):
            continue
        name, parts = GROUPS["self_attn" if isinstance(module, FusedAttention) else "mlp"]
        prefix = f"{path}." if path else ""
        for leaf in module[name]:
            whole, begin = weights.pop(f"{prefix}{name}.{leaf}"), 0
            for part, rows in zip(parts, module.part_rows, strict=True):
                weights[f"{prefix}{part}.{leaf}"] = whole[begin : begin + rows]
                begin += rows
    return weights


def _form(layer: nn.Module) -> tuple[Any, ...]:
    """Return what must be equal for rows of two layers to be one layer's."""
    packing = [getattr(layer, name, None) for name in ("bits", "group_size", "mode")]
    arrays = ((leaf, layer[leaf]) for leaf in _LEAVES if layer.get(leaf) is not None)
    return (type(layer), *packing, *((leaf, a.dtype, a.shape[1:]) for leaf, a in arrays))


def _rows(layer: nn.Module) -> int:
    return int(layer.weight.shape[0])


def _added(residual: mx.array, x: mx.array, projection: nn.Module) -> mx.array:
    """Return residual + projection(x), in one kernel if the weights are plain numbers.

    Rows are laid below each other. Of a batch a BLAS then gets one product; and one position of
    `swiglu` keeps the stride of the joined row it came from, for which Metal's products copy it
    first, until a reshape, which is free, gives it its own.
    """
    shape = residual.shape
    x = x.reshape(-1, x.shape[-1])
    if type(projection) is not nn.Linear or "bias" in projection:
        return residual + projection(x).reshape(shape)
    rows = residual.reshape(-1, shape[-1])
    return mx.addmm(rows, x, projection["weight"].T).reshape(shape)
