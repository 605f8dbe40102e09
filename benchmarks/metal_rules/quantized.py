"""Which kernels a product with packed weights takes on Metal (`QuantizedMatmul::eval_gpu`)."""

from __future__ import annotations

from benchmarks.metal_rules.chips import Chip

_OLD_GENERATIONS = (13, 14)
_WIDE_GENERATION = 15
# A product of fewer tiles than this is split along K to fill the GPU.
_ENOUGH_GROUPS = 512
_TILE = 32


def vector_limit(k: int, n: int, chip: Chip) -> int:
    """Return from how many rows on a product is a matrix product (`get_qmv_batch_limit`)."""
    size = 0 if max(k, n) <= 2048 else 1 if max(k, n) <= 4096 else 2
    if chip.letter == "d":
        return (32, 18, 12)[size]
    return ((14, 10, 6) if chip.generation in _OLD_GENERATIONS else (18, 12, 10))[size]


def split_parts(m: int, n: int, k: int, group_size: int) -> int:
    """Return into how many parts `qmm_splitk` cuts K; 1 is a plain product."""
    tiles = -(-n // _TILE) * -(-m // _TILE)
    step = max(group_size, _TILE)
    parts = min(max(1, _ENOUGH_GROUPS // tiles), k // step)
    while parts > 1 and k % (parts * step):
        parts -= 1
    return max(parts, 1)


def _fast_step(bits: int) -> int:
    """Return what K must be a multiple of for `qmv_fast`: 64 packs, 32 of two bits."""
    pack = {3: 8, 5: 8, 6: 4}.get(bits, 32 // bits)
    return pack * 32 * (1 if bits == 2 else 2)


def kernels(
    m: int,
    n: int,
    k: int,
    batch: int,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    transposed: bool,
    chip: Chip,
) -> tuple[str, ...]:
    """Name the kernels of x [batch, m, k] times packed weights, `transposed` for [n, k]."""
    limit = vector_limit(k, n, chip) if transposed else 4
    if m >= limit:
        if transposed and batch == 1:
            parts = split_parts(m, n, k, group_size)
            if parts > 1:
                return (f"{mode}_qmm_t_splitk_{parts}", "col_reduce (split K)")
        letter = "t" if transposed else "n"
        nax = "_nax" if chip.nax and transposed and k % 64 == 0 else ""
        return (f"{mode}_qmm_{letter}{nax}",)
    if not transposed:
        if k < 1024:
            return (f"{mode}_qvm",)
        return (f"{mode}_qvm_split_k", "col_reduce (split K)")
    if k in (64, 128) and bits in (2, 4, 8):
        return (f"{mode}_qmv_quad",)
    if m >= 2 and (mode != "affine" or chip.generation >= _WIDE_GENERATION):
        return (f"{mode}_qmv_wide",)
    fast = n % 8 == 0 and k % _fast_step(bits) == 0
    return (f"{mode}_qmv_fast" if fast else f"{mode}_qmv",)
