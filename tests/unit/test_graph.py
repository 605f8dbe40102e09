"""What the tower computes, counted in MLX's graph; nothing here measures time.

Each bound was chosen from MLX's source: which formulation of each layer Metal has a fast kernel
for. The numbers other ports reach by the same count are in PERFORMANCE.md.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from benchmarks.graph_trace import (
    PRODUCTS,
    Primitive,
    compiling,
    convolutions,
    graph,
    hollow,
    is_dense,
    is_pointwise,
    metal_kernel,
    trace,
    work,
)
from fastvlm_mlx.checkpoint.layouts import LAYOUTS
from fastvlm_mlx.checkpoint.store import target_dtype
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.vision import FastViTHD
from tests.unit import small_tower

PIXELS = mx.zeros((1, 1024, 1024, 3), dtype=mx.uint8)
LAYER_NORMS = 6
MIB = 2**20


def real_tower(dtype: mx.Dtype = mx.float32) -> FastViTHD:
    """The tower of FastVLM, real sizes, each weight in the dtype that loading would keep it in."""
    tower = FastViTHD(VisionConfig())
    kept = tree_map_with_path(
        lambda path, array: array.astype(target_dtype(f"vision.{path}", dtype)),
        tower.parameters(),
    )
    tower.update(kept)
    return hollow(tower)


@pytest.fixture(scope="module")
def primitives() -> list[Primitive]:
    return trace(real_tower(), PIXELS)


def counted(module: nn.Module, *inputs: mx.array) -> Counter[str]:
    """Count as a GPU would run it: with compilation on, which the engine turns off on a CPU."""
    with compiling(True):
        return graph(module, *inputs)


# Which kernels


def test_every_convolution_has_a_fast_metal_kernel(primitives: list[Primitive]) -> None:
    """mlx-vlm's five grouped convolutions with two outputs a channel miss the depthwise kernel."""
    kernels = Counter(metal_kernel(conv) for conv in convolutions(primitives))
    # 42 blocks: 38 RepMixer with a 3x3 and a 7x7, 4+2 attention with a 7x7. Two position
    # encodings, 4 x 2 downsampling, stem and expansion. One dense convolution: the stem's first.
    depthwise = 38 * 2 + 6 + 2 + 8 + 1 + 1
    assert kernels == {"depthwise": depthwise, "implicit_gemm": 1}


def test_no_grouped_convolution_changes_the_channel_count(primitives: list[Primitive]) -> None:
    for conv in convolutions(primitives):
        groups = conv.arguments[5]
        assert groups == 1 or conv.inputs[0][0][-1] == conv.shape[-1] == groups


def test_no_1x1_is_a_convolution_and_one_convolution_is_dense(primitives: list[Primitive]) -> None:
    """Metal's convolutions run a 1x1 without the GEMM's bias epilogue; mlx-vlm has 95 of them."""
    found = convolutions(primitives)
    assert [conv.shape for conv in found if is_pointwise(conv)] == []
    assert [conv.shape for conv in found if is_dense(conv)] == [(1, 512, 512, 96)]


def test_every_gemm_of_the_tower_is_two_dimensional(primitives: list[Primitive]) -> None:
    """A 4-D residual collapses to one GEMM on Metal, but loops over rows on a CPU."""
    assert {len(p.shape) for p in primitives if p.name == "AddMM"} == {2}


@pytest.mark.parametrize(
    ("shape", "weight", "groups", "stride", "kernel"),
    [
        ((1, 64, 64, 96), (96, 7, 7, 1), 96, 1, "depthwise"),
        ((1, 64, 64, 96), (192, 7, 7, 1), 96, 2, "implicit_gemm_grouped"),
        ((1, 64, 64, 90), (90, 7, 7, 1), 90, 1, "implicit_gemm_grouped"),
        ((1, 64, 64, 160), (160, 3, 3, 10), 16, 1, "explicit_gemm_grouped"),
        ((1, 64, 64, 96), (100, 1, 1, 96), 1, 1, "implicit_gemm_general"),
        ((1, 4, 4, 90), (100, 1, 1, 90), 1, 1, "explicit_gemm"),
        ((1, 64, 64, 128), (128, 3, 3, 128), 1, 1, "winograd"),
    ],
)
def test_the_replayed_rule_knows_the_slow_kernels(
    shape: tuple[int, ...], weight: tuple[int, ...], groups: int, stride: int, kernel: str
) -> None:
    convolve = partial(mx.conv2d, stride=stride, padding=weight[1] // 2, groups=groups)
    found = convolutions(trace(convolve, mx.zeros(shape), mx.zeros(weight)))
    assert [metal_kernel(conv) for conv in found] == [kernel]


# How many


def test_the_tower_is_under_400_primitives() -> None:
    """mlx-vlm: 861 as it runs, 447 under one whole-tower mx.compile. More in any later change
    needs a reason in PERFORMANCE.md."""
    assert work(counted(real_tower(), PIXELS)) == 396


def test_a_repmixer_block_is_6_primitives() -> None:
    """mlx-vlm: 16. Two convolutions, two GEMMs, one kernel for two biases, one GELU."""
    block = real_tower().stages[1].blocks[0]
    counts = counted(block, mx.zeros((1, 128, 128, 192)))
    assert work(counts) == 6
    assert (counts["Convolution"], counts["AddMM"]) == (2, 2)


def test_an_attention_block_is_20_primitives() -> None:
    """mlx-vlm: 34. Nine are the CPU's LayerNorm, one kernel on Metal; a gather would be a copy."""
    block = real_tower().stages[3].blocks[0]
    counts = counted(block, mx.zeros((1, 16, 16, 768)))
    assert work(counts) == 20
    fallback = {"Subtract": 1, "Square": 1, "Rsqrt": 1}
    others = ("Power", "Sqrt", "Divide", "Gather", "Copy", "Contiguous")
    assert {name: counts[name] for name in (*fallback, *others) if counts[name]} == fallback


def test_compilation_is_left_as_it_was() -> None:
    def compiled_now() -> bool:
        gelu = mx.compile(lambda x: x * mx.sigmoid(x))
        return any(name.startswith("Compiled") for name in graph(gelu, mx.array(1.0)))

    before = compiled_now()
    for on in (True, False):
        with compiling(on):
            assert compiled_now() is on
        assert compiled_now() is before


# What is left of training, and the weights' size


def test_nothing_of_batch_norm_or_layer_scale_is_loaded() -> None:
    tower = small_tower.tower(small_tower.folded(small_tower.canonical_weights("training")))
    mx.eval(tower.parameters())  # or the folds themselves would be counted
    residue = re.compile(r"running_|\bbn\b|batch|norm|layer_scale|gamma|num_batches|head")
    names = [name for name, _ in tree_flatten(tower.parameters())]
    assert [name for name in names if residue.search(name)] == []
    counts = counted(tower, mx.zeros((1, 128, 128, 3), dtype=mx.uint8))
    attention_blocks = sum(small_tower.CONFIG.layers[3:])
    assert counts["Rsqrt"] == counts["Subtract"] == attention_blocks
    assert not {"Sqrt", "Power", "Divide"} & set(counts)


def test_the_real_tower_has_a_square_root_for_its_layer_norms_only() -> None:
    counts = counted(real_tower(), PIXELS)
    assert (counts["Rsqrt"], counts["Sqrt"], counts["Power"], counts["Divide"]) == (
        LAYER_NORMS, 0, 0, 0,
    )  # fmt: skip


def test_the_tower_takes_under_470_mib_in_float32_and_half_in_half_precision() -> None:
    def size(dtype: mx.Dtype) -> float:
        return sum(a.nbytes for _, a in tree_flatten(real_tower(dtype).parameters())) / MIB

    assert 460 < size(mx.float32) <= 470
    assert size(mx.bfloat16) == size(mx.float32) / 2
    assert size(mx.bfloat16) < size(mx.float16) < size(mx.float32)


def test_the_classifier_head_of_apples_towers_is_not_read() -> None:
    """mlx-vlm loads it, 9 MiB in float32, and never runs it."""
    heads = {
        "llava_qwen2": "model.vision_tower.vision_tower.model.head.proj",
        "mlx-vlm": "vision_tower.vision_model.head.proj",
    }
    for layout in LAYOUTS:
        if layout.name in heads:
            assert layout.rename(heads[layout.name]) is None


# Dtypes


def casts(primitives: list[Primitive]) -> list[mx.Dtype]:
    return [p.dtype for p in primitives if p.name == "AsType"]


def products(primitives: list[Primitive]) -> list[mx.Dtype]:
    return [p.dtype for p in primitives if p.name in PRODUCTS]


def test_float32_casts_only_the_pixels(primitives: list[Primitive]) -> None:
    assert casts(primitives) == [mx.float32]
    assert set(products(primitives)) == {mx.float32}


def test_bfloat16_leaves_its_precision_only_inside_layer_norms() -> None:
    """A float32 constant or scalar somewhere would raise everything after it to float32."""
    found = trace(real_tower(mx.bfloat16), PIXELS)
    assert Counter(casts(found)) == {mx.bfloat16: 1 + LAYER_NORMS, mx.float32: LAYER_NORMS}
    assert set(products(found)) == {mx.bfloat16}


def test_float16_goes_on_in_float32_from_the_second_position_encoding() -> None:
    """Another project measured 60,928 after it and NaN later: float16 ends at 65,504."""
    found = trace(real_tower(mx.float16), PIXELS)
    stage_3, stage_4 = 4, 2
    assert Counter(casts(found)) == {mx.float16: 1 + stage_3, mx.float32: stage_3 + 1}
    # Position encoding, then 4 AddMM, 2 Matmul, 1 convolution a block, then the expansion's 3.
    tail = 1 + stage_4 * 7 + 3
    kinds = products(found)
    assert set(kinds[-tail:]) == {mx.float32}
    assert set(kinds[:-tail]) == {mx.float16}


def half_tower(dtype: mx.Dtype) -> FastViTHD:
    folded = small_tower.folded(small_tower.canonical_weights("training"), dtype)
    return small_tower.tower(
        {name: a.astype(target_dtype(f"vision.{name}", dtype)) for name, a in folded.items()}
    )


@pytest.mark.parametrize("case", ["training_128", "training_192x64"])
@pytest.mark.parametrize(("dtype", "most"), [(mx.float16, 1e-2), (mx.bfloat16, 5e-2)])
def test_half_precision_stays_near_timm(dtype: mx.Dtype, most: float, case: str) -> None:
    """Folded in float32 and cast once; casting first costs float16 ten times the error."""
    tower = half_tower(dtype)
    error = small_tower.relative_rms(lambda pixels: tower(pixels).astype(mx.float32), case)
    assert np.isfinite(error)
    assert 0 < error <= most


def test_float16_is_finite_on_black_white_and_noise() -> None:
    tower = half_tower(mx.float16)
    noise = np.random.RandomState(0).randint(0, 256, (128, 128, 3))
    for values in (np.zeros((128, 128, 3)), np.full((128, 128, 3), 255), noise):
        features = tower(mx.array(values.astype(np.uint8))[None])
        assert mx.isfinite(features).all().item()
