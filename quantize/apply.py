"""Weights in, packed weights out: `mx.quantize` in chunks of rows, and the sizes it will give.

Knows MLX's packing. Knows no recipe's reasons, no module paths and no files.
"""

from __future__ import annotations

import mlx.core as mx

from fastvlm_mlx.quantize.recipes import Setting

# On a CPU MLX rounds to a 4-bit float through arrays of 16 distances an element. So many elements
# at once keep that near 20 MB and fill the caches best; rows are independent, so no bit changes.
_CHUNK_ELEMENTS = 2**18
_LEAVES = ("weight", "scales", "biases")


def quantize_weight(weight: mx.array, setting: Setting) -> dict[str, mx.array]:
    """Pack a float matrix [O,I]; return `weight` uint32, `scales`, and `biases` if affine.

    Bit for bit what one `mx.quantize` call gives on the same device: affine scales and biases in
    the weight's dtype, other modes' scales uint8. Evaluated; beside the result and its parts, the
    memory used is that of one chunk of rows. Raises ValueError if groups do not divide I.
    """
    rows, columns = weight.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    chunks = []
    for start in range(0, rows, step):
        chunk = mx.quantize(
            weight[start : start + step],
            group_size=setting.group_size,
            bits=setting.bits,
            mode=setting.mode,
        )
        mx.eval(chunk)
        chunks.append(chunk)
    packed = {}
    for index, leaf in enumerate(_LEAVES[: len(chunks[0])]):
        packed[leaf] = mx.concatenate([chunk[index] for chunk in chunks])
        mx.eval(packed[leaf])
    return packed


def packed_specs(
    shape: tuple[int, ...], setting: Setting, dtype: str
) -> dict[str, tuple[tuple[int, int], str]]:
    """Return leaf → (shape, dtype's name) of what `quantize_weight` gives for a matrix [O,I].

    `dtype` is the matrix's, as MLX spells it ("bfloat16").
    """
    rows, columns = shape
    groups = (rows, columns // setting.group_size)
    specs = {"weight": ((rows, columns * setting.bits // 32), "uint32")}
    if setting.mode == "affine":
        return specs | {"scales": (groups, dtype), "biases": (groups, dtype)}
    return specs | {"scales": (groups, "uint8")}
