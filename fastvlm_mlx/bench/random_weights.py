"""Random weights by name: the same on every device, of sizes that keep a deep network finite.

A tensor depends on its name, its shape and the seed alone. It is made of random integers, a product
and a rounding to bfloat16, so no device's arithmetic shows. Values are uniform with variance about
1 / fan-in, tower kernels that stand for a skip connection are near the identity, norms about 1.
Packed weights are random codes with scales of the same variance, so packing takes no time. Knows
canonical names and shapes; knows no checkpoint and no model.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from fastvlm_mlx.quantize.recipes import Setting

DTYPE = mx.bfloat16
"""What float values are rounded to."""

# Elements made at once: beside a tensor stand some 12 bytes an element of these.
_CHUNK_ELEMENTS = 1 << 22
_EMBEDDINGS = re.compile(r"decoder\.qwen2\.(?:model\.embed_tokens|lm_head)\.")

# What ends a name → (offset, amplitude of a uniform value around it, is it divided by the root of
# the fan-in). The first that fits counts. Found on the 0.5B tower: its activations keep their size
# through all 44 blocks.
_RULES: tuple[tuple[re.Pattern[str], float, float, bool], ...] = tuple(
    (re.compile(pattern), offset, amplitude, scaled)
    for pattern, offset, amplitude, scaled in (
        (r"\.bn\.running_mean$", 0.0, 0.3, False),
        (r"\.bn\.running_var$", 1.25, 0.75, False),
        (r"\.bn\.weight$", 1.0, 0.5, False),
        (r"norm\.weight$", 1.0, 0.3, False),
        (r"layer_scale(_\d)?$", 0.3, 0.2, False),
        (r"\.bias$", 0.0, 0.17, False),
        (r"(mixer|pos_emb)\.weight$", 0.0, 0.7, True),
        (r"vision\.(stem|expansion\.conv|.*downsample)\.", 0.0, 2.6, True),
        (r"\.(embed_tokens|lm_head)\.weight$", 0.0, 0.17, False),
        # At full size the mean over positions would take over, and every token would be the same.
        (r"\.o_proj\.weight$", 0.0, 0.5, True),
        (r"\.weight$", 0.0, math.sqrt(3), True),
    )
)
_SKIP_KERNEL = re.compile(r"^vision\..*(mixer|pos_emb)\.weight$")
_SKIP_CENTRE = 0.9


def random_tensor(
    name: str, shape: tuple[int, ...], *, seed: int, words: int, setting: Setting | None
) -> mx.array:
    """Return a tensor by its canonical name, evaluated: bfloat16, or uint32 if it holds codes.

    `setting` says how its module is packed. Rows of embedding and head from `words` on are zero.
    """
    leaf = name.rpartition(".")[2]
    if setting is not None and leaf in ("scales", "biases"):
        array = mx.full(shape, _affine(name, shape, setting)[leaf], DTYPE)
    elif setting is not None and leaf == "weight":
        array = _rows(name, shape, seed, lambda codes: codes)
    else:
        array = _rows(name, shape, seed, partial(_values, name, shape))
    if _EMBEDDINGS.match(name):
        kept = mx.arange(shape[0])[:, None] < words
        array = mx.where(kept, array, mx.zeros_like(array))
    if _SKIP_KERNEL.search(name):
        centre = mx.zeros(shape[1:3])
        centre[shape[1] // 2, shape[2] // 2] = _SKIP_CENTRE
        array = (array.astype(mx.float32) + centre[None, :, :, None]).astype(array.dtype)
    mx.eval(array)
    return array


def _rows(
    name: str, shape: tuple[int, ...], seed: int, make: Callable[[mx.array], mx.array]
) -> mx.array:
    """Return `make` of random uint32 of this shape, some rows at a time, evaluated."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    first, stride = (int.from_bytes(half, "little") for half in (digest[:4], digest[4:]))
    row = math.prod(shape[1:])
    step = max(1, _CHUNK_ELEMENTS // row)
    chunks = []
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        begin = (first + start * row * (stride | 1)) % 2**32
        words = mx.arange(rows * row, dtype=mx.uint32) * mx.array(stride | 1, dtype=mx.uint32)
        words = _mixed(words + mx.array(begin, dtype=mx.uint32))
        chunks.append(make(words.reshape(rows, *shape[1:])))
        mx.eval(chunks[-1])
    return mx.concatenate(chunks) if len(chunks) > 1 else chunks[0]


def _mixed(words: mx.array) -> mx.array:
    """Return pseudo-random uint32 of distinct ones: MurmurHash3's finalizer (A. Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * mx.array(factor, dtype=mx.uint32)
    return words ^ (words >> 16)


def _values(name: str, shape: tuple[int, ...], words: mx.array) -> mx.array:
    """Return bfloat16 values of random words, as the first fitting rule has it."""
    offset, amplitude = _rule(name, math.prod(shape[1:]))
    # 24 bits less their middle are whole numbers that float32 holds exactly.
    whole = (words >> 8).astype(mx.int32) - (1 << 23)
    values = whole.astype(mx.float32) * (amplitude / (1 << 23))
    if offset:
        mx.eval(values)  # fused with the product, a sum is rounded once less on some devices
        values = values + offset
    return values.astype(DTYPE)


def _rule(name: str, fan_in: int) -> tuple[float, float]:
    """Return (offset, amplitude) of a tensor's values."""
    _, offset, amplitude, scaled = next(rule for rule in _RULES if rule[0].search(name))
    return offset, amplitude / math.sqrt(fan_in) if scaled else amplitude


def _affine(name: str, shape: tuple[int, ...], setting: Setting) -> dict[str, float]:
    """Return one scale and bias for all groups: uniform codes then vary as the rule's values do.

    `shape` is that of the scales. The scale is rounded to a power of two, with which the bias, half
    the codes' range below zero, is exact in bfloat16.
    """
    weight = name.rpartition(".")[0] + ".weight"
    _, amplitude = _rule(weight, shape[1] * setting.group_size)
    # Variances: amplitude^2 / 3 of the rule, scale^2 (4^bits - 1) / 12 of the codes.
    scale = 2.0 ** round(math.log2(2 * amplitude / math.sqrt(4**setting.bits - 1)))
    return {"scales": scale, "biases": -scale * (2**setting.bits - 1) / 2}
