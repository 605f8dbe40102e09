"""Packing in chunks: the same bits as one `mx.quantize` call, in little memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from fastvlm_mlx.config import QUANT_MODES
from fastvlm_mlx.quantize import apply
from fastvlm_mlx.quantize.apply import packed_specs, quantize_weight
from fastvlm_mlx.quantize.recipes import Setting

EVERY_SETTING = [
    Setting(bits, group_size, mode)
    for mode, (widths, group_sizes) in QUANT_MODES.items()
    for bits in widths
    for group_size in group_sizes
]


def matrix(rows: int, columns: int, dtype: mx.Dtype) -> mx.array:
    """Weights as they are met: small, some groups far larger, one group and one row of zeros."""
    key = mx.random.key(rows + columns)
    weight = mx.random.normal((rows, columns), key=key) * 0.02
    weight[1] = 0
    weight[2, :128] = 0
    weight[3, 128:256] *= 100
    return weight.astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("setting", EVERY_SETTING, ids=str)
def test_chunks_have_the_bits_of_one_call(
    setting: Setting, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "_CHUNK_ELEMENTS", 3 * 384 + 5)  # three rows, the last chunk one
    weight = matrix(10, 384, dtype)
    whole = mx.quantize(weight, group_size=setting.group_size, bits=setting.bits, mode=setting.mode)
    packed = quantize_weight(weight, setting)
    assert len(packed) == len(whole)
    for array, expected in zip(packed.values(), whole, strict=True):
        assert array.dtype == expected.dtype
        assert mx.array_equal(array, expected).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("setting", EVERY_SETTING, ids=str)
def test_the_sizes_foretold_are_those_that_come(setting: Setting, dtype: mx.Dtype) -> None:
    weight = matrix(6, 256, dtype)
    name = str(dtype).removeprefix("mlx.core.")
    found = {
        leaf: (tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
        for leaf, array in quantize_weight(weight, setting).items()
    }
    assert found == packed_specs((6, 256), setting, name)


def test_a_row_wider_than_a_chunk_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_CHUNK_ELEMENTS", 64)
    packed = quantize_weight(matrix(5, 256, mx.float32), Setting(4, 64))
    assert packed["weight"].shape == (5, 32)


def test_the_result_is_evaluated() -> None:
    """A lazy result would keep its source alive, module after module."""
    weight = matrix(512, 1024, mx.float32)
    mx.eval(weight)
    before = mx.get_active_memory()
    packed = quantize_weight(weight, Setting(4, 64))
    held = mx.get_active_memory() - before
    assert held < 1.1 * sum(array.nbytes for array in packed.values())


@pytest.mark.parametrize("setting", [Setting(4, 32, "mxfp4"), Setting(4, 16, "nvfp4")], ids=str)
def test_memory_is_that_of_a_chunk_beside_the_result(setting: Setting) -> None:
    """One call on a whole matrix takes 50 bytes an element for mxfp4 on a CPU: 3 GB for a 7B's."""
    weight = matrix(2048, 1024, mx.bfloat16)
    mx.eval(weight)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    packed = quantize_weight(weight, setting)
    beside = mx.get_peak_memory() - before - 2 * sum(a.nbytes for a in packed.values())
    assert beside < 32 * 2**20


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible"):
        quantize_weight(mx.zeros((4, 96)), Setting(4, 64))
