"""Which kernels a matrix product takes on Metal: GEMM fused, split along K, thin, or a GEMV.

Knows `Matmul` and `AddMM` of mlx/backend/metal/matmul.cpp. A bias or a residual is the epilogue of
any of them and costs no kernel; an operand without a unit stride is copied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from benchmarks.metal_rules.chips import Chip
from benchmarks.metal_rules.layout import Layout, collapsed

# From this generation on a few vectors share one reading of the matrix (`gemv_wide`).
_WIDE_GEMV_GENERATION = 15
_WIDE_VECTORS, _WIDE_PASSES = 5, 3
# Up to so many rows or columns the matrix units have a kernel for thin products.
_THIN = 64


@dataclass(frozen=True, slots=True)
class Product:
    """M x N = M x K times K x N, `batch` times; how both lie, and whether something is added."""

    m: int
    n: int
    k: int
    batch: int
    transposed: tuple[bool, bool]
    added: bool
    dtype: mx.Dtype

    @property
    def letters(self) -> str:
        """MLX's letters for how the operands lie, `nt` for x @ w.T."""
        return "".join("t" if each else "n" for each in self.transposed)

    def __str__(self) -> str:
        size = f"M{self.m} N{self.n} K{self.k}"
        return size if self.batch == 1 else f"{size} x{self.batch}"


def product(
    a: Layout, b: Layout, c: Layout | None, output: Sequence[int], dtype: mx.Dtype
) -> tuple[Product, tuple[Layout, ...]]:
    """Return the product as it is launched, and the operands that MLX copies first."""
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    copies = []
    lying = []
    for index, operand in enumerate((a, b)):
        turned = _transposed(operand, (m, n)[index] == 1)
        if turned is None:
            copies.append(operand)
            operand, turned = Layout.row(operand.shape), False
        lying.append((operand, turned))
    (a, a_turned), (b, b_turned) = lying
    operands = (a, b) if c is None else (a, b, c)
    sizes, steps = collapsed(a.shape[:-2], [each.strides[:-2] for each in operands])
    batch = math.prod(output) // (m * n)
    one_matrix = (
        batch > 1
        and not a_turned
        and len(sizes) == 1
        and a.strides[-2] == k
        and steps[0][-1] == m * k
        and steps[1][-1] == 0
        and (c is None or steps[2][-1] == m * c.strides[-2])
    )
    if one_matrix:
        m, batch = m * sizes[0], 1
    made = Product(m, n, k, batch, (a_turned, b_turned), c is not None, dtype)
    return made, tuple(copies)


def _transposed(operand: Layout, is_vector: bool) -> bool | None:
    """Whether a matrix lies transposed; None if it must be copied (`check_transpose`)."""
    (rows, columns), (down, across) = operand.shape[-2:], operand.strides[-2:]
    if across == 1 and (not is_vector or down == columns):
        return False
    if down == 1 and (not is_vector or across == rows):
        return True
    return None


def kernels(p: Product, chip: Chip) -> tuple[str, ...]:
    """Name the kernels of a product, in order."""
    half = p.dtype != mx.float32
    if p.m == p.n == p.batch == 1 and not p.added:
        return ("dot_product", "all_reduce", "copy (dot product)")
    few_vectors = 1 < p.m <= _WIDE_VECTORS * _WIDE_PASSES and p.n > 1
    if (
        chip.generation >= _WIDE_GEMV_GENERATION
        and p.letters == "nt"
        and few_vectors
        and p.k % 4 == 0
        and half
    ):
        return ("gemv_wide",)
    if min(p.m, p.n) == 1:
        turned = not p.transposed[1] if p.n != 1 else p.transposed[0]
        return ("gemv_t" if turned else "gemv",)
    return _steel(p, chip, half)


def _steel(p: Product, chip: Chip, half: bool) -> tuple[str, ...]:
    """Apply the rules of `steel_matmul_axpby`; a float32 product uses the matrix units in TF32."""
    tiles = -(-p.m // 16) * -(-p.n // 16)
    if not chip.nax:
        most = 2048 if chip.large else 1024
        if p.batch == 1 and tiles <= most and p.k // 16 >= 8 and p.k >= max(p.m, p.n):
            return (f"steel_gemm_splitk_{p.letters}", "steel_gemm_splitk_accum")
        return (f"steel_gemm_fused_{p.letters}_{_tile(p, chip, half)}",)
    longest = max(p.m, p.n)
    few = p.n <= _THIN or (p.m <= _THIN and p.transposed[1])
    if p.batch == 1 and not p.transposed[0] and few and half:
        return (f"steel_gemm_thin_nax_{p.letters}",)
    if p.batch == 1 and (p.k >= 3 * longest or (longest <= 1024 and p.k > 2 * longest)):
        return (f"steel_gemm_splitk_nax_{p.letters}", "steel_gemm_splitk_accum")
    rows = 64 if chip.large else 128
    return (f"steel_gemm_fused_nax_{p.letters}_bm{rows}_bn128",)


def _tile(p: Product, chip: Chip, half: bool) -> str:
    """Return the tile of GEMM_TPARAM_MACRO: rows, columns and depth of a threadgroup's block."""
    straight = p.letters == "nt"
    if chip.letter in "gp":
        return "bm64_bn32_bk32" if straight else "bm64_bn64_bk16"
    if chip.letter != "d":
        return "bm64_bn64_bk16"
    if p.batch * p.m * p.n >= 2**20:
        if not half or 2 * max(p.m, p.n) > p.k:
            return "bm64_bn64_bk16"
        return "bm64_bn32_bk32" if straight else "bm32_bn64_bk16"
    if half:
        return "bm64_bn32_bk32" if straight else "bm64_bn64_bk16"
    return "bm32_bn64_bk16" if straight else "bm64_bn32_bk32"
