"""The audit: stand-ins, hidden copies, and the committed counts of our stages.

When a change of the graph makes the last tests fail, look whether it is meant, then run
    python -m benchmarks.metal_dispatch --write
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks import metal_dispatch, metal_stages
from benchmarks.graph_trace import compiling
from benchmarks.metal_rules import UnknownRule
from benchmarks.metal_rules.chips import CHIPS
from benchmarks.metal_rules.kernels import Kernel
from benchmarks.metal_rules.replay import replay
from benchmarks.metal_rules.standins import Trace, standing_in, take
from benchmarks.metal_summary import failures, of_chips, summarize
from fastvlm_mlx.model import layers, mlx_lm_parts

CHIP = CHIPS["m1"]


def traced(function: Callable[..., Any], *inputs: mx.array) -> Trace:
    with standing_in() as calls:
        return take(calls, function, *inputs)


def launched(function: Callable[..., Any], *inputs: mx.array) -> list[Kernel]:
    return replay(traced(function, *inputs), CHIP)


def names(kernels: list[Kernel]) -> list[str]:
    return [kernel.name for kernel in kernels]


def some(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    array = mx.zeros(shape, dtype=dtype)
    mx.eval(array)
    return array


# Stand-ins

STOOD_FOR: dict[str, tuple[Callable[..., Any], tuple[mx.array, ...]]] = {
    "rms_norm": (lambda x, w: mx.fast.rms_norm(x, w, 1e-6), (some(1, 4, 8), some(8))),
    "layer_norm": (lambda x: mx.fast.layer_norm(x, None, None, 1e-5), (some(1, 2, 2, 8),)),
    "rope": (
        lambda x: mx.fast.rope(x, 8, traditional=False, base=1e6, scale=1.0, offset=3),
        (some(1, 2, 4, 8),),
    ),
    "scaled_dot_product_attention": (
        lambda q, k: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask="causal"),
        (some(1, 4, 9, 64), some(1, 2, 9, 64)),
    ),
    "compiled": (layers.bias_gelu, (some(4, 8), some(8))),
    "zeros": (lambda x: mx.zeros(x.shape, x.dtype), (some(4, 8, dtype=mx.bfloat16),)),
    "dequantize": (
        lambda w, s, b: mx.dequantize(w, s, b, group_size=64, bits=4),
        (some(8, 8, dtype=mx.uint32), some(8, 1), some(8, 1)),
    ),
}


@pytest.mark.parametrize("name", STOOD_FOR)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_stand_in_gives_what_the_real_operation_gives(name: str, dtype: mx.Dtype) -> None:
    function, inputs = STOOD_FOR[name]
    if name == "zeros":
        dtype = mx.bfloat16
    inputs = tuple(a if a.dtype == mx.uint32 else a.astype(dtype) for a in inputs)
    real = function(*inputs)
    with standing_in() as calls:
        # Looked up in its module, as the model does.
        called = layers.bias_gelu if name == "compiled" else function
        stood = called(*inputs)
    assert (stood.shape, stood.dtype) == (real.shape, real.dtype)
    assert [call.name for call in calls.calls] == [name]


def test_everything_is_put_back() -> None:
    before = (mx.fast.rms_norm, mx.zeros, layers.gelu, nn.relu)
    with pytest.raises(RuntimeError, match="inside"), standing_in():
        assert mx.zeros is not before[1]
        raise RuntimeError("inside")
    assert (mx.fast.rms_norm, mx.zeros, layers.gelu, nn.relu) == before


def test_a_compiled_function_is_as_many_launches_as_mlx_makes_of_it() -> None:
    x, bias = some(1, 8, 8, 16), some(16)
    both = launched(lambda x, b: layers.two_biases(x, b, b), x, bias)
    assert [kernel.kind for kernel in both] == ["elementwise"]
    assert (both[0].read_bytes, both[0].written_bytes) == (4096 + 2 * 64, 2 * 4096)
    two_sums = mx.compile(lambda x, b, c: (x + b, x + c))
    layers.two_sums = two_sums  # type: ignore[attr-defined]
    try:
        apart = launched(lambda x, b: layers.two_sums(x, b, b * 2), x, bias)  # type: ignore[attr-defined]
    finally:
        del layers.two_sums  # type: ignore[attr-defined]
    assert [kernel.kind for kernel in apart] == ["elementwise"] * 3


def test_a_compiled_function_inside_another_is_part_of_it() -> None:
    x = some(1, 4, 8)
    assert len(launched(lambda x: mlx_lm_parts.swiglu(x, x), x)) == 1
    held = mlx_lm_parts.swiglu
    with compiling(True):
        assert len(launched(lambda x: held(x, x), x)) == 2  # not found: its product, and `silu`
        ones = mx.ones((2, 3))  # a shape it was not compiled for
        assert mx.allclose(held(ones, ones), nn.silu(ones))  # nothing that stood in is left in it


def test_equal_arrays_of_zeros_are_two_launches() -> None:
    assert names(launched(lambda x: (mx.zeros((2, 2)), mx.zeros((2, 2)), x + 1), some(2))) == [
        "fill",
        "fill",
        "Add",
    ]


def test_a_difference_written_twice_is_launched_twice() -> None:
    """The exporter merges equal nodes, MLX's eager evaluation does not."""
    found = launched(lambda x: mx.square(x - 1) * (x - 1), some(4))
    assert Counter(names(found)) == {"Subtract": 2, "Square": 1, "Multiply": 1}


def test_an_operation_without_a_rule_stops_the_audit() -> None:
    with pytest.raises(UnknownRule, match="no rule for MLX's"):
        launched(mx.sort, some(4))


# Copies that nobody wrote


def test_merging_heads_after_unfused_attention_copies_and_after_fused_does_not() -> None:
    def attend(q: mx.array) -> mx.array:
        mixed = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)
        return mixed.transpose(0, 2, 1, 3).reshape(1, 64, -1)

    narrow, wide = launched(attend, some(1, 4, 64, 32)), launched(attend, some(1, 4, 64, 64))
    assert [kernel.kind for kernel in narrow] == ["elementwise", "gemm", "softmax", "gemm", "copy"]
    assert names(wide) == ["steel_attention_bd64"]


def test_a_slice_update_copies_the_whole_only_if_it_is_held() -> None:
    def write(cache: mx.array, row: mx.array) -> mx.array:
        fresh = cache + 0
        fresh[:, 1:2] = row
        return fresh

    def write_and_keep(cache: mx.array, row: mx.array) -> tuple[mx.array, mx.array]:
        fresh = cache + 0
        kept = fresh * 1
        fresh[:, 1:2] = row
        return fresh, kept

    def write_and_return_both(cache: mx.array, row: mx.array) -> tuple[mx.array, mx.array]:
        before = cache + 0
        fresh = before[None]
        fresh[:, :, 1:2] = row
        return fresh, before

    def write_to_view(cache: mx.array, row: mx.array) -> mx.array:
        return write_and_return_both(cache, row)[0]

    given = (some(1, 4, 8), some(1, 1, 8))
    assert names(launched(write, *given)) == ["Add", "copy"]
    assert names(launched(write_and_keep, *given)).count("copy") == 2
    assert names(launched(write_and_return_both, *given)).count("copy") == 2
    assert names(launched(write_to_view, *given)).count("copy") == 1


def test_a_cast_to_the_same_dtype_is_a_copy_only_of_what_is_held() -> None:
    x = some(4, 8)
    assert names(launched(lambda x: mx.array(x + 1), x)) == ["Add"]

    def both(x: mx.array) -> tuple[mx.array, mx.array]:
        y = x + 1
        return y, mx.array(y)

    assert names(launched(both, x)) == ["Add", "copy_cast"]


def test_half_of_a_joined_row_is_copied_before_its_product_unless_reshaped() -> None:
    """What one position of SwiGLU over joined gate and up would cost in every layer."""
    weight, residual = some(8, 32), some(1, 1, 8)

    def product(x: mx.array, *, reshaped: bool) -> mx.array:
        gate, up = mx.split(x, 2, axis=-1)
        mixed = gate * up
        rows = mixed.reshape(-1, 32) if reshaped else mixed
        return mx.addmm(residual.reshape(*rows.shape[:-1], 8), rows, weight.T)

    x = some(1, 1, 64)
    assert [k.kind for k in launched(lambda x: product(x, reshaped=False), x)].count("copy") == 1
    assert [k.kind for k in launched(lambda x: product(x, reshaped=True), x)].count("copy") == 0


def test_a_1x1_and_a_grouped_convolution_are_flagged() -> None:
    def convolve(x: mx.array) -> mx.array:
        y = mx.conv2d(x, mx.zeros((16, 1, 1, 16)))
        return mx.conv2d(y, mx.zeros((32, 7, 7, 1)), padding=3, groups=16)

    slow = [kernel.slow for kernel in launched(convolve, some(1, 16, 16, 16)) if kernel.slow]
    assert len(slow) == 2
    assert "1x1" in slow[0]
    assert "grouped" in slow[1]


def test_a_float32_scalar_array_in_a_bfloat16_graph_is_seen() -> None:
    x = some(4, 8, dtype=mx.bfloat16)
    clean = summarize([traced(lambda x: x * 2, x)], CHIP)
    raised = summarize([traced(lambda x: x * mx.array(2.0), x)], CHIP)
    assert clean["float32_arrays"] == 0
    assert raised["float32_arrays"] > 0
    assert failures({"s": {"m1": clean}}, {}) == []
    assert "float32" in failures({"s": {"m1": raised}}, {})[0]


# What is committed


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(metal_dispatch.OURS.read_text())


@pytest.fixture(scope="module")
def now() -> metal_dispatch.Stages:
    return metal_dispatch.ours(["0.5b"], [16, 4], metal_dispatch.SHOWN)


def differing(now: metal_dispatch.Stages, committed: dict[str, Any]) -> list[str]:
    stored = {
        stage: {chip: committed["stages"].get(stage, {}).get(chip) for chip in chips}
        for stage, chips in now.items()
    }
    found = json.loads(json.dumps({"stages": now}))
    return metal_dispatch.differences(found, {"stages": stored})


def test_our_stages_launch_what_the_committed_file_says(
    now: metal_dispatch.Stages, committed: dict[str, Any]
) -> None:
    assert differing(now, committed) == []


@pytest.mark.slow
def test_every_size_and_width_launches_what_the_committed_file_says(
    committed: dict[str, Any],
) -> None:
    found = json.loads(metal_dispatch.spelled(metal_dispatch.all_of_ours()))
    assert metal_dispatch.differences(found, committed) == []


def test_nothing_is_slow_in_float32_or_over_its_limit(committed: dict[str, Any]) -> None:
    """355 for the tower, 331 with paired heads, 350 a decode step of 24 layers."""
    assert set(metal_dispatch.LIMITS) <= set(committed["stages"])
    assert failures(committed["stages"], metal_dispatch.LIMITS) == []
    too_low = {"tower": 354}
    assert "355 kernels, more than 354" in failures(committed["stages"], too_low)[0]


def test_no_stage_converts_slowly_or_by_1x1(now: metal_dispatch.Stages) -> None:
    for chips in (now["tower"], now["tower, paired heads"]):
        for summary in chips.values():
            assert summary["convolutions"] == {"depthwise": 94, "implicit_gemm": 1}
            assert summary["slow"] == {}


def test_paired_heads_have_a_fused_kernel_and_single_ones_do_not(
    now: metal_dispatch.Stages,
) -> None:
    assert now["tower"]["m1"]["attention"] == {}
    assert now["tower, paired heads"]["m1"]["attention"] == {"steel_attention_bd64": 6}
    assert now["tower, paired heads"]["m5"]["attention"] == {"steel_attention_nax_bd64": 6}


def test_the_tables_are_those_of_the_two_committed_reports(committed: dict[str, Any]) -> None:
    peer = json.loads(metal_dispatch.PEER.read_text())
    assert metal_dispatch.TABLES.read_text() == metal_dispatch.tables(committed, peer)


def test_a_planted_kernel_is_found(committed: dict[str, Any]) -> None:
    """One needless cast in the projector."""
    (model,) = [name for name in committed["stages"] if name == "projector 0.5b 16-bit"]

    def project(x: mx.array) -> mx.array:
        return layers.gelu(x).astype(mx.float32)

    planted = of_chips([traced(project, some(4, 8, dtype=mx.bfloat16))], ["m1"])
    assert differing({model: planted}, committed) != []


def test_a_prompt_is_one_pass_with_one_row_under_the_head(now: metal_dispatch.Stages) -> None:
    heads = [p for p in now["prefill 0.5b 16-bit"]["m1"]["products"] if " N151936 " in p[0]]
    assert heads == [["M1 N151936 K896", "gemv", 1]]
    assert metal_stages.PROMPT_POSITIONS == 286


# The command


def test_the_help_keeps_each_example_on_a_line_of_its_own() -> None:
    told = metal_dispatch.parser().format_help().splitlines()
    assert metal_dispatch.__doc__ is not None
    examples = [line for line in metal_dispatch.__doc__.splitlines() if "python -m" in line]
    assert len(examples) == 4 and set(examples) <= set(told)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--chip", "m9"], "argument --chip: invalid choice: 'm9'"),
        (["--json", "{folder}/no/a.json"], "{folder}/no/a.json cannot be written: its folder is m"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_traced(
    asked: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        metal_dispatch.main([word.format(folder=tmp_path) for word in asked])
    found = capsys.readouterr()
    told = said.format(folder=tmp_path)
    assert refused.value.code == 2
    assert found.err.startswith(f"python -m benchmarks.metal_dispatch: error: {told}")
    assert (found.err.count("\n"), found.out) == (1, "")
