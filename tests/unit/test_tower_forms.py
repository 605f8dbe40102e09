"""Forms of the tower chosen at load: paired attention heads, and step by step for little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import small_tower
from mlx.utils import tree_flatten, tree_map

import fastvlm_mlx as fv
from benchmarks.graph_trace import compiling, graph, hollow, trace, work
from fastvlm_mlx.checkpoint import fuse
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint, target_dtype
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model import cpu_tower
from fastvlm_mlx.model.vision import AttentionBlock, FastViTHD

DEMO = Path(fv.__file__).parent / "demo"
MIB = 2**20
# What low-memory mode promises over the weights, float32 at 1024 x 1024 pixels.
LOW_MEMORY_MIB = 300


def picture(height: int, width: int, count: int = 1) -> mx.array:
    values = np.random.RandomState(height + width).randint(0, 256, (count, height, width, 3))
    return mx.array(values.astype(np.uint8))


def folded(dtype: mx.Dtype, *, paired: bool) -> FastViTHD:
    """The small tower in `dtype`, loaded as `load.py` does it."""
    weights = small_tower.folded(small_tower.canonical_weights("training"), dtype)
    tower = FastViTHD(small_tower.CONFIG, paired_heads=paired)
    named = []
    for path in fuse.module_paths(small_tower.CONFIG):
        prefix = f"{path}."
        group = {n.removeprefix(prefix): a for n, a in weights.items() if n.startswith(prefix)}
        if paired:
            group = fuse.pair_heads(path, group, small_tower.CONFIG)
        for name, array in group.items():
            kept = target_dtype(f"vision.{prefix}{name}", dtype)
            named.append((prefix + name, array.astype(kept)))
    tower.load_weights(named, strict=True)
    return tower


def relative(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.sqrt(mx.mean((found - expected) ** 2) / mx.mean(expected**2))).item()


def zeros(config: VisionConfig, **form: bool) -> FastViTHD:
    """A tower of real widths whose weights are there and zero: memory does not depend on values."""
    tower = FastViTHD(config, **form)
    tower.update(tree_map(mx.zeros_like, tower.parameters()))
    mx.eval(tower.parameters())
    return tower


# Paired heads


@pytest.mark.parametrize(
    ("height", "width", "count"), [(128, 128, 1), (64, 192, 1), (192, 64, 1), (128, 64, 3)]
)
def test_paired_heads_compute_the_same(height: int, width: int, count: int) -> None:
    pixels = picture(height, width, count)
    plain, paired = (folded(mx.float32, paired=p)(pixels) for p in (False, True))
    assert paired.shape == plain.shape
    assert relative(paired, plain) <= 1e-6


@pytest.mark.parametrize("case", ["training_128", "training_192x64"])
@pytest.mark.parametrize(
    ("dtype", "most"), [(mx.float32, 1e-5), (mx.float16, 1e-2), (mx.bfloat16, 5e-2)]
)
def test_paired_heads_stay_as_near_timm_as_plain_ones(
    dtype: mx.Dtype, most: float, case: str
) -> None:
    tower = folded(dtype, paired=True)
    assert small_tower.relative_rms(lambda x: tower(x).astype(mx.float32), case) <= most


@pytest.mark.parametrize("name", ["qkv.weight", "qkv.bias", "proj.weight"])
def test_a_head_on_its_neighbours_side_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[0|q] and [q|0] exchanged, or a column of proj that keeps the neighbour's mix."""
    original = fuse.pair_heads

    def exchanged(path: str, group: fuse.Weights, config: VisionConfig) -> fuse.Weights:
        paired = original(path, group, config)
        if name not in paired or ".blocks." not in path or "qkv.weight" not in paired:
            return paired
        array = paired[name]
        axis = 1 if name == "proj.weight" else 0
        wide = 2 * group["proj.weight"].shape[0]
        head, rest = mx.split(array, [wide], axis=axis)
        parts = mx.split(head, wide // config.head_dim, axis=axis)
        order = [i ^ 1 for i in range(len(parts))]
        mixed = [parts[i] for i in order]
        return paired | {name: mx.concatenate([*mixed, rest], axis=axis)}

    monkeypatch.setattr(fuse, "pair_heads", exchanged)
    tower = folded(mx.float32, paired=True)
    assert small_tower.relative_rms(tower, "training_128") > 1e-5


def test_only_attention_is_changed_and_only_zeros_are_added() -> None:
    weights = small_tower.folded(small_tower.canonical_weights("training"))
    for path in fuse.module_paths(small_tower.CONFIG):
        group = {
            n.removeprefix(f"{path}."): a for n, a in weights.items() if n.startswith(f"{path}.")
        }
        paired = fuse.pair_heads(path, dict(group), small_tower.CONFIG)
        changed = {name for name in group if paired[name].shape != group[name].shape}
        attends = "qkv.weight" in group
        assert changed == ({"qkv.weight", "qkv.bias", "proj.weight"} if attends else set())
        for name in changed:
            values, spread = (np.sort(np.array(a).ravel()) for a in (group[name], paired[name]))
            assert np.array_equal(spread[spread != 0], values[values != 0])


def test_an_odd_number_of_heads_is_refused_before_anything_is_read() -> None:
    config = dataclasses.replace(small_tower.CONFIG, embed_dims=(16, 32, 32, 96, 288))
    with pytest.raises(ConfigError, match=r"stage 3 .* 3 attention heads.*without paired_heads"):
        FastViTHD(config, paired_heads=True)
    checkpoint = open_checkpoint(DEMO)
    projector = dataclasses.replace(checkpoint.config.projector, in_dim=config.out_dim)
    model = dataclasses.replace(checkpoint.config, vision=config, projector=projector)
    odd = dataclasses.replace(checkpoint, config=model, tensors={})
    with pytest.raises(ConfigError, match="odd number"):
        load_model(odd, mx.float32, dequantize=False, paired_heads=True)
    with pytest.raises(ConfigError, match="odd number"):
        odd.resident_bytes(mx.float32, dequantize=False, paired_heads=True)


def test_pairing_takes_54_mib_more_in_float32() -> None:
    def size(paired: bool) -> float:
        tower = FastViTHD(VisionConfig(), paired_heads=paired)
        return sum(array.nbytes for _, array in tree_flatten(tower.parameters())) / MIB

    # 4C outputs of qkv in place of 3C, 2C columns of proj in place of C; the biases of q besides.
    matrices, biases = 2 * (4 * 768**2 + 2 * 1536**2), 4 * 768 + 2 * 1536
    assert size(True) - size(False) == (matrices + biases) * 4 / MIB
    assert 54 <= size(True) - size(False) < 54.1


@pytest.mark.parametrize("paired", [False, True])
def test_the_memory_check_knows_what_pairing_adds(paired: bool) -> None:
    checkpoint = open_checkpoint(DEMO)
    for dtype in (mx.float32, mx.float16):
        model = load_model(checkpoint, dtype, dequantize=True, paired_heads=paired)
        loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        assert loaded == checkpoint.resident_bytes(dtype, dequantize=True, paired_heads=paired)


def attention(paired: bool) -> AttentionBlock:
    return hollow(AttentionBlock(768, 4 * 768, 32, paired_heads=paired))


def test_pairing_adds_no_primitive_to_a_block() -> None:
    with compiling(True):
        counts = [graph(attention(p), mx.zeros((1, 16, 16, 768))) for p in (False, True)]
    assert work(counts[0]) == work(counts[1]) == 20


def test_paired_attention_reads_64_wide_heads_two_queries_a_key() -> None:
    """Metal has a fused attention kernel for heads of 64, none for 32."""
    for paired, width, keys in ((False, 32, 24), (True, 64, 12)):
        found = trace(attention(paired), mx.zeros((1, 16, 16, 768)))
        scores = next(p for p in found if p.name == "Matmul")
        assert scores.inputs[0][0][-1] == scores.inputs[1][0][-2] == width
        assert keys in scores.inputs[1][0]


@pytest.fixture(scope="module")
def red_square() -> np.ndarray:
    pixels = np.full((256, 256, 3), 255, np.uint8)
    pixels[64:192, 64:192] = (220, 30, 30)
    return pixels


@pytest.mark.parametrize("form", [{"paired_heads": True}, {"low_memory": True}])
def test_the_demo_model_answers_the_same(red_square: np.ndarray, form: dict[str, bool]) -> None:
    asked = [
        fv.load("demo", **kind).generate("What shape is it?", images=[red_square], logprobs=True)
        for kind in ({}, form)
    ]
    assert asked[0].text == asked[1].text != ""
    assert asked[0].token_ids == asked[1].token_ids


# Low memory


@pytest.fixture
def other_cache_limit() -> Iterator[int]:
    before = mx.set_cache_limit(123 * MIB)
    yield 123 * MIB
    mx.set_cache_limit(before)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (mx.float32, None),
        (mx.float32, cpu_tower.features),
        (mx.bfloat16, None),
        (mx.float16, None),
    ],
)
def test_low_memory_mode_gives_the_same_bits(
    dtype: mx.Dtype, form: Callable[[FastViTHD, mx.array], mx.array] | None, paired: bool
) -> None:
    tower = folded(dtype, paired=paired)
    tower.form = form
    for size in ((128, 128, 1), (64, 192, 2)):
        pixels = picture(*size)
        expected = tower(pixels)
        mx.eval(expected)
        tower.low_memory = True
        assert mx.array_equal(tower(pixels), expected).item()
        tower.low_memory = False


def test_low_memory_mode_leaves_the_cache_limit_as_it_was(other_cache_limit: int) -> None:
    """Also when the tower fails half-way."""
    tower = folded(mx.float32, paired=False)
    tower.low_memory = True
    mx.eval(tower(picture(64, 64)))
    assert mx.set_cache_limit(other_cache_limit) == other_cache_limit
    tower.expansion.conv.weight = mx.zeros((3, 3, 3, 1))
    with pytest.raises(ValueError, match="groups=3"):
        mx.eval(tower(picture(64, 64)))
    assert mx.set_cache_limit(other_cache_limit) == other_cache_limit


def peak_over_weights_mib(tower: FastViTHD, side: int) -> float:
    """The most that was held beside the weights, MLX's pool of freed buffers included."""
    pixels = mx.zeros((1, side, side, 3), dtype=mx.uint8)
    mx.eval(pixels, mx.zeros(50 * MIB // 4))  # the second is in the pool now
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    features = tower(pixels)
    mx.eval(features)
    # Nothing freed stays in the pool, so what is in use is all there is.
    assert mx.get_cache_memory() == 0
    return (mx.get_peak_memory() - before) / MIB


def test_low_memory_mode_keeps_its_promise_on_a_sixteenth_of_the_pixels() -> None:
    """One block a stage: every block of a stage takes the same."""
    config = dataclasses.replace(VisionConfig(), layers=(1, 1, 1, 1, 1))
    peak = peak_over_weights_mib(zeros(config, low_memory=True), 256)
    assert peak <= LOW_MEMORY_MIB / 16


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("form", [None, cpu_tower.features])
def test_low_memory_mode_takes_under_300_mib_at_1024_pixels(
    form: Callable[[FastViTHD, mx.array], mx.array] | None, paired: bool
) -> None:
    """Without it 800 MiB: MLX allocates for many steps ahead of the one that is running."""
    config = dataclasses.replace(VisionConfig(), layers=(1, 1, 1, 1, 1))
    tower = zeros(config, low_memory=True, paired_heads=paired)
    tower.form = form
    assert peak_over_weights_mib(tower, 1024) <= LOW_MEMORY_MIB
