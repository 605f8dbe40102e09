"""The tower's form for a CPU: GELU and convolution alone, and the network."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.graph_trace import graph
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.model import cpu_tower
from fastvlm_mlx.model.vision import FastViTHD
from tests.unit import small_tower

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"
GRID = np.concatenate(
    [np.linspace(-9, 9, 200_001), np.logspace(-30, 0, 5001), -np.logspace(-30, 0, 5001)]
).astype(np.float32)
MIB = 2**20


@pytest.fixture(scope="module")
def plain() -> FastViTHD:
    return small_tower.tower(small_tower.folded(small_tower.canonical_weights("fused")))


def gelu(values: np.ndarray) -> np.ndarray:
    return np.array(cpu_tower.gelu(mx.array(values, dtype=mx.float32)))


def normal_cdf(values: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-float(x) / math.sqrt(2)) for x in values])


# GELU


def test_its_erf_is_within_a_millionth() -> None:
    """GELU is x (1 + erf) / 2, so it may be off by |x|/2 millionths; the erf measures 5.9e-7."""
    error = np.abs(gelu(GRID) - GRID * normal_cdf(GRID))
    # GELU's own rounding: its result is a float32 too.
    assert np.all(error <= np.abs(GRID) * 0.5e-6 + 1.2e-7 * np.abs(GRID))


def test_beyond_its_limit_it_is_x_or_zero_exactly() -> None:
    """An error of Phi that stays would grow with x: at -1e6 it would be most of a unit."""
    far = np.array([5.2, 6, 10, 1e3, 1e6, 3e38], np.float32)
    assert np.array_equal(gelu(far), far)
    assert np.array_equal(gelu(-far), np.zeros_like(far))


def test_near_zero_it_is_half_of_x() -> None:
    small = np.array([0.0, 1e-38, 1e-30, 1e-20, -1e-30], np.float32)
    assert np.allclose(gelu(small), small / 2, rtol=1e-6, atol=1e-45)


def test_its_tails_do_not_turn_back() -> None:
    """Above its minimum GELU rises, below it comes back to zero; two roundings of slack."""
    rising = np.linspace(-0.7, 9, 100_001).astype(np.float32)
    tail = np.linspace(-9, -0.8, 100_001).astype(np.float32)
    assert np.diff(gelu(rising)).min() >= -1e-6
    assert np.diff(gelu(tail)).max() <= 2e-6
    assert np.abs(gelu(np.linspace(-9, -5, 10_001).astype(np.float32))).max() <= 3e-6


def test_nan_and_infinity_do_as_in_the_plain_form() -> None:
    special = np.array([np.nan, np.inf, -np.inf], np.float32)
    assert np.array_equal(np.isnan(gelu(special)), [True, False, True])
    assert gelu(special)[1] == np.inf
    assert np.array_equal(np.isnan(np.array(nn.gelu(mx.array(special)))), [True, False, True])


# Depthwise convolution


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (2, 2), (1, 3), (4, 4), (5, 9), (16, 16), (7, 66), (64, 64), (12, 130), (63, 65)],
)
def test_depthwise_equals_its_definition(height: int, width: int, kernel: int, stride: int) -> None:
    """A picture of 64 pixels has maps of 1x1; 66 and 130 leave a tile half filled."""
    x = mx.random.normal((3, height, width), key=mx.random.key(1))
    weight = mx.random.normal((3, kernel, kernel, 1), key=mx.random.key(2))
    found = cpu_tower.depthwise(x, weight, stride=stride)
    # In numpy: MLX before 0.32.4 was wrong on maps smaller than the kernel.
    pad = kernel // 2
    padded = np.pad(np.array(x, np.float64), ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    wanted = np.einsum("chwij,cij->chw", windows, np.array(weight[..., 0], np.float64))
    assert found.shape == wanted.shape
    assert np.abs(np.array(found) - wanted).max() <= 2e-5


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride"),
    [(96, 64, 7, 1), (192, 32, 3, 1), (96, 64, 7, 2), (96, 128, 3, 2), (768, 8, 7, 1)],
)
def test_depthwise_equals_mlx_at_the_towers_shapes(
    channels: int, size: int, kernel: int, stride: int
) -> None:
    x = mx.random.normal((channels, size, size), key=mx.random.key(3))
    weight = mx.random.normal((channels, kernel, kernel, 1), key=mx.random.key(4))
    wanted = mx.conv2d(
        x.transpose(1, 2, 0)[None], weight, stride=stride, padding=kernel // 2, groups=channels
    )[0].transpose(2, 0, 1)
    found = cpu_tower.depthwise(x, weight, stride=stride)
    assert mx.abs(found - wanted).max().item() <= 5e-5


# The network


@pytest.mark.parametrize("case", ["fused_128", "fused_64x192"])
def test_the_small_tower_equals_timm(plain: FastViTHD, case: str) -> None:
    """Measured: 1.0e-6."""
    form = small_tower.tower(dict(tree_flatten(plain.parameters())))
    form.form = cpu_tower.features
    assert small_tower.relative_rms(form, case) <= 1e-5


@pytest.mark.parametrize("piece", [1, 1 << 30])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128)])
def test_pieces_of_any_size_give_the_same(
    plain: FastViTHD, monkeypatch: pytest.MonkeyPatch, height: int, width: int, piece: int
) -> None:
    if piece == 1:
        piece = 4 * height  # a few pixels, or one channel
    monkeypatch.setattr(cpu_tower, "PIECE", piece)
    pixels = mx.random.randint(0, 256, (2, height, width, 3), key=mx.random.key(5))
    pixels = pixels.astype(mx.uint8)
    found, wanted = cpu_tower.features(plain, pixels), plain(pixels)
    assert found.shape == wanted.shape
    assert mx.abs(found - wanted).max().item() <= 2e-5 * mx.abs(wanted).max().item()


def test_low_memory_gives_the_same_bits(plain: FastViTHD) -> None:
    pixels = mx.random.randint(0, 256, (1, 64, 64, 3)).astype(mx.uint8)
    one = cpu_tower.features(plain, pixels)
    plain.low_memory = True
    other = cpu_tower.features(plain, pixels)
    plain.low_memory = False
    assert mx.array_equal(one, other)


# Who uses it


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="a CPU's form")
def test_a_cpu_in_float32_takes_it_and_only_then() -> None:
    checkpoint = open_checkpoint(DEMO)
    chosen = {
        (dtype, flag): load_model(checkpoint, dtype, dequantize=True, cpu_forms=flag).vision.form
        for dtype, flag in [(mx.float32, True), (mx.float32, False), (mx.bfloat16, True)]
    }
    assert chosen == {
        (mx.float32, True): cpu_tower.features,
        (mx.float32, False): None,
        (mx.bfloat16, True): None,
    }


def test_it_keeps_no_weights_of_its_own_and_leaves_other_towers_alone(plain: FastViTHD) -> None:
    """Another tower's graph is counted before and after, in one process."""
    pixels = mx.zeros((1, 64, 64, 3), dtype=mx.uint8)
    before = graph(plain, pixels)
    weights = dict(tree_flatten(plain.parameters()))
    other = small_tower.tower(weights)
    other.form = cpu_tower.features
    mx.eval(other(pixels))
    mx.synchronize()
    held = mx.get_active_memory()
    mx.eval(other(pixels))
    mx.synchronize()
    assert mx.get_active_memory() - held < MIB // 16
    assert dict(tree_flatten(other.parameters())).keys() == weights.keys()
    assert graph(plain, pixels) == before


def test_no_depthwise_convolution_and_no_erf_is_left(plain: FastViTHD) -> None:
    pixels = mx.zeros((1, 64, 64, 3), dtype=mx.uint8)
    counts = graph(lambda x: cpu_tower.features(plain, x), pixels)
    assert counts["Convolution"] == counts["Erf"] == 0
    assert counts["Matmul"] > 0
    assert graph(plain, pixels)["Convolution"] > 0
