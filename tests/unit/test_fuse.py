"""Folding is exact: branch by branch against the unfolded forward, and whole against timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_tower

from fastvlm_mlx.checkpoint import fuse
from fastvlm_mlx.config import VisionConfig

TOLERANCE = 1e-5  # float32 against float64 over 30 layers; measured below 2e-6

CASES = [
    ("fused", "fused_128"),
    ("fused", "fused_64x192"),
    ("training", "training_128"),
    ("training", "training_192x64"),
]


@pytest.mark.parametrize(("form", "case"), CASES)
def test_folded_tower_equals_timm(form: str, case: str) -> None:
    tower = small_tower.tower(small_tower.folded(small_tower.canonical_weights(form)))
    assert small_tower.relative_rms(tower, case) < TOLERANCE


def _reparameterized(form: str) -> dict[str, mx.array]:
    weights = small_tower.canonical_weights(form)
    whole = {}
    for path in fuse.module_paths(small_tower.CONFIG):
        group = {
            name.removeprefix(f"{path}."): weights.pop(name)
            for name in list(weights)
            if name.startswith(f"{path}.")
        }
        arrays = fuse.reparameterize_module(path, group)
        assert not group
        whole |= {f"{path}.{name}": array for name, array in arrays.items()}
    return whole


def test_reparameterized_training_form_is_the_inference_form_and_computes_the_same() -> None:
    training, fused = _reparameterized("training"), small_tower.canonical_weights("fused")
    assert {n: a.size for n, a in training.items()} == {n: a.size for n, a in fused.items()}
    tower = small_tower.tower(small_tower.folded(training))
    assert small_tower.relative_rms(tower, "training_128") < TOLERANCE


def test_reparameterizing_the_inference_form_changes_no_value() -> None:
    fused = small_tower.canonical_weights("fused")
    again = _reparameterized("fused")
    assert all(mx.array_equal(again[name], fused[name]) for name in fused | again)


def _shift(kernel: mx.array) -> mx.array:
    """Move a kernel by one tap."""
    return mx.roll(kernel, 1, axis=2)


def _late(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def _first(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda pair: (change(pair[0]), pair[1])


def _second(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda pair: (pair[0], change(pair[1]))


def _entry(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda arrays: {**arrays, name: change(arrays[name])}


def _one_tap(array: mx.array) -> mx.array:
    """Change a single element by the array's RMS."""
    step = mx.zeros(array.size)
    step[array.size // 2] = mx.sqrt(mx.mean(array * array))
    return array + step.reshape(array.shape)


def _zero(array: mx.array) -> mx.array:
    return mx.zeros_like(array)


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "identity off the centre": ("_identity", _shift),
    "small kernel off the centre": ("_pad_kernel", _shift),
    "BatchNorm scale": ("_batch_norm", _first(_one_tap)),
    "BatchNorm shift dropped": ("_batch_norm", _second(_zero)),
    "one tap of a unit": ("_unit", _first(_one_tap)),
    "bias of a unit dropped": ("_unit", _second(_zero)),
    "one tap of a mixer": ("_mixer", _first(_one_tap)),
    "mixer bias": ("_mixer", _second(_zero)),
    "one tap of the 7x7": ("_ffn", _entry("ffn.conv.weight", _one_tap)),
    "BatchNorm shift not in fc1": ("_ffn", _entry("ffn.fc1.bias", _zero)),
    "layer scale of fc2": ("_ffn", _entry("ffn.fc2.weight", _one_tap)),
    "layer scale of fc2's bias": ("_ffn", _entry("ffn.fc2.bias", lambda b: b * 1.5)),
    "gamma in qkv": ("_attention_block", _entry("qkv.weight", _one_tap)),
    "beta in qkv": ("_attention_block", _entry("qkv.bias", _zero)),
    "layer scale of proj": ("_attention_block", _entry("proj.weight", _one_tap)),
    "layer scale of proj's bias": ("_attention_block", _entry("proj.bias", _zero)),
    "one tap of a downsampling": ("_downsample", _entry("multiples.0.weight", _one_tap)),
    "columns of a downsampling": ("_downsample", _entry("pointwise.0", _one_tap)),
    "one tap of a position encoding": ("_pos_emb", _entry("weight", _one_tap)),
    "one tap of the expansion": ("_expansion", _entry("conv.weight", _one_tap)),
    "gate": ("_expansion", _entry("se.reduce.bias", _zero)),
    "one tap of the stem": ("_stem", _entry("weight", _one_tap)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_any_fold_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = FAULTS[fault]
    monkeypatch.setattr(fuse, name, _late(getattr(fuse, name), change))
    tower = small_tower.tower(small_tower.folded(small_tower.canonical_weights("training")))
    assert small_tower.relative_rms(tower, "training_128") > TOLERANCE


def test_two_depthwise_parts_in_swapped_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The even and odd outputs of a grouped 7x7 must meet their own columns of the 1x1."""

    def swapped(unit: Any, multiple: int) -> fuse.Weights:
        arrays = original(unit, multiple)
        if multiple > 1:
            first, second = arrays["pointwise.0"], arrays["pointwise.1"]
            arrays |= {"pointwise.0": second, "pointwise.1": first}
        return arrays

    original = fuse._downsample
    monkeypatch.setattr(fuse, "_downsample", swapped)
    tower = small_tower.tower(small_tower.folded(small_tower.canonical_weights("training")))
    assert small_tower.relative_rms(tower, "training_128") > TOLERANCE


def _batch_norm(rng: np.random.Generator, channels: int) -> dict[str, mx.array]:
    return {
        "weight": mx.array(rng.uniform(0.5, 1.5, channels).astype(np.float32)),
        "bias": mx.array(rng.normal(size=channels).astype(np.float32)),
        "running_mean": mx.array(rng.normal(size=channels).astype(np.float32)),
        "running_var": mx.array(rng.uniform(0.5, 2, channels).astype(np.float32)),
    }


def _apply(bn: dict[str, mx.array], x: mx.array) -> mx.array:
    normal = (x - bn["running_mean"]) / mx.sqrt(bn["running_var"] + 1e-5)
    return normal * bn["weight"] + bn["bias"]


def _named(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize("groups", [1, 4])
def test_parallel_branches_become_one_convolution(groups: int) -> None:
    """MobileOne: two k x k branches, a 1x1 branch and a BatchNorm skip, summed."""
    rng = np.random.default_rng(groups)
    channels, x = 8, mx.array(rng.normal(size=(2, 6, 7, 8)).astype(np.float32))
    weights: fuse.Weights = {}
    total = _apply(skip := _batch_norm(rng, channels), x)
    weights |= _named("skip.bn", skip)
    for name, kernel in (("kxk.0", 3), ("kxk.1", 3), ("scale", 1)):
        shape = (channels, kernel, kernel, channels // groups)
        conv = mx.array(rng.normal(size=shape).astype(np.float32))
        bn = _batch_norm(rng, channels)
        total = total + _apply(bn, mx.conv2d(x, conv, padding=kernel // 2, groups=groups))
        weights |= {f"{name}.conv.weight": conv, **_named(f"{name}.bn", bn)}
    weight, bias = fuse._unit(fuse._Reader(weights))
    assert not weights
    folded = mx.conv2d(x, weight, padding=1, groups=groups) + bias
    assert mx.allclose(folded, total, atol=1e-4).item()


def test_batch_norm_shift_is_exact_at_the_border() -> None:
    """Folding BatchNorm's shift past a padded convolution would be wrong in the border rows."""
    rng = np.random.default_rng(0)
    dim, hidden = 8, 16
    x = mx.array(rng.normal(size=(1, 5, 5, dim)).astype(np.float32))
    conv = mx.array(rng.normal(size=(dim, 7, 7, 1)).astype(np.float32))
    fc1 = mx.array(rng.normal(size=(hidden, 1, 1, dim)).astype(np.float32))
    bn = _batch_norm(rng, dim)
    bias = mx.array(rng.normal(size=hidden).astype(np.float32))
    plain = (
        _apply(bn, mx.conv2d(x, conv, padding=3, groups=dim)) @ fc1.reshape(hidden, dim).T + bias
    )
    weights = {
        "conv.conv.weight": conv,
        **_named("conv.bn", bn),
        "fc1.weight": fc1,
        "fc1.bias": bias,
        "fc2.weight": mx.zeros((dim, 1, 1, hidden)),
        "fc2.bias": mx.zeros(dim),
    }
    arrays = fuse._ffn(fuse._Reader(weights), mx.ones(dim))
    folded = mx.conv2d(x, arrays["ffn.conv.weight"], padding=3, groups=dim)
    folded = folded @ arrays["ffn.fc1.weight"].T + arrays["ffn.fc1.bias"]
    assert mx.allclose(folded, plain, atol=1e-4).item()


def test_folds_are_computed_in_float32_from_half_precision_sources() -> None:
    """Folding in bfloat16 and casting again would round twice."""
    weights = small_tower.canonical_weights("training")
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    full, half = small_tower.folded(weights), small_tower.folded(halves)
    for name, array in half.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, full[name]).item(), name  # sources are bfloat16 values


def test_a_missing_array_is_named() -> None:
    weights = {"0.weight": mx.zeros((8, 3, 3, 3))}
    with pytest.raises(KeyError, match=r"0\.bias"):
        fuse.fuse_module("stem", weights, VisionConfig(), pixel_scale=1.0)
