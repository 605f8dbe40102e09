"""MLX's Metal rules, each on cases made by hand from reading its source; no GPU anywhere."""

from __future__ import annotations

import mlx.core as mx
import pytest

from benchmarks.metal_rules import (
    MLX_VERSION,
    UnknownRule,
    attention,
    check_version,
    convolution,
    gemm,
    quantized,
    rows,
)
from benchmarks.metal_rules.chips import CHIPS
from benchmarks.metal_rules.layout import Layout


def test_the_installed_mlx_is_the_one_whose_rules_are_replayed() -> None:
    """If this fails: re-read the rules at the files of SOURCES, correct them, raise MLX_VERSION."""
    check_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0"])
def test_another_minor_version_is_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(UnknownRule, match=r"re-read the rules in .*matmul\.cpp"):
        check_version(version)
    check_version(f"{MLX_VERSION}.99")


def test_matrix_units_begin_with_m5_and_with_a19() -> None:
    assert {name for name, chip in CHIPS.items() if chip.nax} == {"m5", "m5-max", "a19"}
    assert {name for name, chip in CHIPS.items() if chip.large and chip.generation == 13} == {
        "m1-max",
        "m1-ultra",
    }


# Convolutions; the choice of family is in test_graph.py


def test_a_1x1_and_a_grouped_convolution_are_slow_paths() -> None:
    assert convolution.slow_reason("depthwise", (96, 7, 7, 1)) == ""
    assert convolution.slow_reason("implicit_gemm", (96, 3, 3, 3)) == ""
    assert "1x1" in convolution.slow_reason("implicit_gemm", (96, 1, 1, 96))
    for family in ("implicit_gemm_grouped", "implicit_gemm_general", "explicit_gemm"):
        assert convolution.slow_reason(family, (96, 7, 7, 1))


@pytest.mark.parametrize(
    ("channels", "out_channels", "per_group", "family"),
    [
        (24, 24, 1, "depthwise"),  # of eights, with 5 x 5 outputs
        (20, 20, 1, "implicit_gemm_grouped"),
        (24, 48, 1, "implicit_gemm_grouped"),
        (16, 16, 8, "implicit_gemm_grouped"),
        (20, 20, 10, "explicit_gemm_grouped"),
    ],
)
def test_depthwise_wants_as_many_outputs_as_inputs_and_channels_in_eights(
    channels: int, out_channels: int, per_group: int, family: str
) -> None:
    image, output = (1, 5, 5, channels), (1, 5, 5, out_channels)
    arguments = ((1, 1), (3, 3), (3, 3), (1, 1), (1, 1), channels // per_group, False)
    weight = (out_channels, 7, 7, per_group)
    assert convolution.family(image, weight, output, arguments) == family


@pytest.mark.parametrize(("channels", "family"), [(160, "winograd"), (144, "implicit_gemm")])
def test_winograd_wants_channels_in_32s(channels: int, family: str) -> None:
    image, weight = (1, 64, 64, channels), (channels, 3, 3, channels)
    arguments = ((1, 1), (1, 1), (1, 1), (1, 1), (1, 1), 1, False)
    assert convolution.family(image, weight, image, arguments) == family


def test_families_launch_as_many_kernels_as_they_have_passes() -> None:
    launched = {name: len(convolution.launches(name)) for name in convolution.FAST}
    assert launched == {"depthwise": 1, "winograd": 4, "implicit_gemm": 1}
    assert len(convolution.launches("explicit_gemm")) == 2


# Products


def weights(n: int, k: int) -> Layout:
    return Layout.row((n, k)).transposed((1, 0))


def launched(m: int, n: int, k: int, chip: str, dtype: mx.Dtype = mx.bfloat16) -> tuple[str, ...]:
    made, copies = gemm.product(Layout.row((m, k)), weights(n, k), None, (m, n), dtype)
    assert copies == ()
    return gemm.kernels(made, CHIPS[chip])


@pytest.mark.parametrize(
    ("m", "n", "k", "chip", "names"),
    [
        (1, 896, 896, "m1", ["gemv"]),
        (4, 896, 896, "m2", ["steel_gemm_splitk_nt", "steel_gemm_splitk_accum"]),
        (4, 896, 896, "m3", ["gemv_wide"]),
        (16, 896, 896, "m3", ["steel_gemm_splitk_nt", "steel_gemm_splitk_accum"]),
        (1024, 768, 3072, "m1", ["steel_gemm_fused_nt_bm64_bn32_bk32"]),
        (256, 1536, 6144, "m1", ["steel_gemm_fused_nt_bm64_bn32_bk32"]),
        (256, 1536, 6144, "m1-max", ["steel_gemm_splitk_nt", "steel_gemm_splitk_accum"]),
        (256, 1536, 768, "m1-max", ["steel_gemm_fused_nt_bm64_bn64_bk16"]),
        (4096, 384, 1536, "m1-ultra", ["steel_gemm_fused_nt_bm64_bn64_bk16"]),
        (1024, 768, 4096, "m1-ultra", ["steel_gemm_fused_nt_bm64_bn32_bk32"]),
        (1024, 768, 3072, "m5", ["steel_gemm_splitk_nax_nt", "steel_gemm_splitk_accum"]),
        (1024, 768, 2048, "m5", ["steel_gemm_fused_nax_nt_bm128_bn128"]),
        (1024, 768, 2049, "m5-max", ["steel_gemm_splitk_nax_nt", "steel_gemm_splitk_accum"]),
        (1025, 768, 2049, "m5-max", ["steel_gemm_fused_nax_nt_bm64_bn128"]),
        (2048, 1024, 6144, "m5", ["steel_gemm_splitk_nax_nt", "steel_gemm_splitk_accum"]),
        (2048, 1024, 6143, "m5", ["steel_gemm_fused_nax_nt_bm128_bn128"]),
        (4096, 64, 64, "m5", ["steel_gemm_thin_nax_nt"]),
        (64, 4096, 64, "m5", ["steel_gemm_thin_nax_nt"]),
        (65, 4096, 64, "m5", ["steel_gemm_fused_nax_nt_bm128_bn128"]),
    ],
)
def test_a_product_takes_the_kernel_of_its_size(
    m: int, n: int, k: int, chip: str, names: list[str]
) -> None:
    assert list(launched(m, n, k, chip)) == names


def test_float32_keeps_off_the_kernels_for_half_precision() -> None:
    assert launched(4, 896, 640, "m3", mx.float32) == ("steel_gemm_fused_nt_bm64_bn32_bk32",)
    assert launched(4096, 64, 64, "m5", mx.float32) == ("steel_gemm_fused_nax_nt_bm128_bn128",)


def test_a_vector_with_a_foreign_stride_is_copied_and_a_matrix_is_not() -> None:
    """Half of the joined row of gate and up, seen as the only row there is."""
    half = Layout.row((1, 1, 128)).split([64], 2)[0]
    _, copies = gemm.product(
        half, weights(8, 64).broadcast((1, 64, 8)), None, (1, 1, 8), mx.float16
    )
    assert copies == (half,)
    block = Layout.row((4, 128)).split([64], 1)[0]
    made, copies = gemm.product(block, weights(8, 64), None, (4, 8), mx.float16)
    assert (made.letters, copies) == ("nt", ())
    holes = Layout.row((4, 8, 2)).sliced((0, 0, 0), (4, 8, 2), (1, 1, 2)).squeezed([2])
    assert gemm.product(holes, weights(8, 8), None, (4, 8), mx.float16)[1] == (holes,)


def test_a_batch_that_shares_its_matrix_is_one_product() -> None:
    x, shared = Layout.row((2, 16, 64)), weights(8, 64).broadcast((2, 64, 8))
    bias = Layout.row((8,)).broadcast((2, 16, 8))
    assert str(gemm.product(x, shared, bias, (2, 16, 8), mx.float16)[0]) == "M32 N8 K64"
    own = Layout.row((2, 64, 8))
    assert str(gemm.product(x, own, None, (2, 16, 8), mx.float16)[0]) == "M16 N8 K64 x2"


# Packed weights


def packed(m: int, n: int, k: int, chip: str, **more: object) -> tuple[str, ...]:
    options = {"group_size": 64, "bits": 4, "transposed": True} | more
    return quantized.kernels(m, n, k, 1, chip=CHIPS[chip], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("m", "n", "k", "chip", "names"),
    [
        (1, 896, 896, "m1", ["affine_qmv"]),
        (1, 4608, 3584, "m1", ["affine_qmv_fast"]),
        (1, 896, 64, "m1", ["affine_qmv_quad"]),
        (4, 896, 896, "m1", ["affine_qmv"]),
        (4, 896, 896, "m3", ["affine_qmv_wide"]),
        (14, 2048, 2048, "m1", ["affine_qmm_t_splitk_8", "col_reduce (split K)"]),
        (14, 2048, 2048, "m3", ["affine_qmv_wide"]),
        (31, 2048, 2048, "m1-ultra", ["affine_qmv_fast"]),
        (286, 896, 896, "m1", ["affine_qmm_t_splitk_2", "col_reduce (split K)"]),
        (286, 9728, 896, "m1", ["affine_qmm_t"]),
        (286, 9728, 896, "m5", ["affine_qmm_t_nax"]),
        (286, 896, 896, "m5", ["affine_qmm_t_splitk_2", "col_reduce (split K)"]),
    ],
)
def test_a_packed_product_takes_the_kernel_of_its_size(
    m: int, n: int, k: int, chip: str, names: list[str]
) -> None:
    assert list(packed(m, n, k, chip)) == names


def test_8_bits_are_fast_in_smaller_steps_than_4() -> None:
    assert packed(1, 896, 256, "m1", bits=8) == ("affine_qmv_fast",)
    assert packed(1, 896, 256, "m1", bits=4) == ("affine_qmv",)


def test_rows_of_packed_weights_are_split_along_k_when_it_is_long() -> None:
    assert packed(1, 64, 512, "m1", transposed=False) == ("affine_qvm",)
    assert len(packed(1, 64, 1024, "m1", transposed=False)) == 2


def test_a_split_is_of_whole_groups() -> None:
    assert quantized.split_parts(32, 32, 7 * 64, 64) == 7
    assert quantized.split_parts(32, 32, 6 * 64, 128) == 3
    assert quantized.split_parts(32 * 32, 32 * 32, 4096, 64) == 1


# Attention


def heads(count: int, length: int, width: int) -> Layout:
    """As a projection leaves them: positions before heads in memory."""
    return Layout.row((1, length, count, width)).transposed((0, 2, 1, 3))


@pytest.mark.parametrize(
    ("queries", "keys", "width", "sharing", "fused"),
    [
        (1024, 1024, 32, 1, False),
        (1024, 1024, 64, 2, True),
        (286, 286, 128, 7, True),
        (286, 286, 192, 1, False),
        (286, 286, 256, 1, False),
        (1, 300, 64, 7, True),
        (1, 300, 80, 7, False),
        (8, 300, 64, 4, True),
        (8, 300, 64, 5, False),
        (4, 3, 64, 1, False),
        (1, 300, 192, 1, False),
    ],
)
def test_attention_is_fused_for_some_widths_only(
    queries: int, keys: int, width: int, sharing: int, fused: bool
) -> None:
    q, k = heads(2 * sharing, queries, width), heads(2, keys, width)
    assert attention.is_fused(q, k, k, causal=False, masked=False, chip=CHIPS["m1"]) is fused


def test_values_may_be_narrower_than_queries_in_two_forms_only() -> None:
    def fused(queries: int, width: int, value_width: int) -> bool:
        q, k, v = heads(2, queries, width), heads(2, 64, width), heads(2, 64, value_width)
        return attention.is_fused(q, k, v, causal=False, masked=False, chip=CHIPS["m1"])

    assert (fused(16, 96, 64), fused(16, 192, 128), fused(16, 128, 64)) == (True, False, False)
    assert (fused(1, 96, 64), fused(1, 192, 128), fused(1, 128, 64)) == (True, True, False)


def test_more_queries_than_keys_are_not_fused_under_a_causal_mask() -> None:
    q, k = heads(2, 32, 64), heads(2, 16, 64)
    assert attention.is_fused(q, k, k, causal=False, masked=False, chip=CHIPS["m1"])
    assert not attention.is_fused(q, k, k, causal=True, masked=False, chip=CHIPS["m1"])


def test_full_attention_writes_so_that_merging_the_heads_is_free() -> None:
    q = heads(4, 1024, 64)
    names, copies, written = attention.fused(q, q, q, CHIPS["m5"])
    assert (names, copies) == (("steel_attention_nax_bd64",), ())
    assert not written.transposed((0, 2, 1, 3)).reshaped((1, 1024, 256))[1]
    unfused = Layout.row((1, 4, 1024, 64))
    assert unfused.transposed((0, 2, 1, 3)).reshaped((1, 1024, 256))[1]


@pytest.mark.parametrize(
    ("chip", "keys", "passes"),
    [("m1", 4095, 1), ("m1", 4096, 2), ("m1-max", 1023, 1), ("m1-max", 1024, 2)],
)
def test_one_query_over_many_keys_takes_two_passes(chip: str, keys: int, passes: int) -> None:
    q, k = Layout.row((1, 14, 1, 64)), Layout.row((1, 2, 8192, 64)).sliced(
        (0, 0, 0, 0), (1, 2, keys, 64), (1, 1, 1, 1)
    )  # fmt: skip
    names, copies, _ = attention.fused(q, k, k, CHIPS[chip])
    assert (len(names), copies) == (passes, ())


def test_the_cache_of_a_batch_is_copied_where_its_heads_do_not_follow_each_other() -> None:
    q = Layout.row((2, 4, 1, 64))
    whole = Layout.row((2, 4, 512, 64))
    part = whole.sliced((0, 0, 0, 0), (2, 4, 300, 64), (1, 1, 1, 1))
    assert attention.fused(q, part, part, CHIPS["m1"])[1] == ()
    other = Layout.row((2, 512, 4, 64)).transposed((0, 2, 1, 3))
    assert attention.fused(q, other, other, CHIPS["m1"])[1] == (other, other)


# Rows


def test_norms_copy_what_has_holes_between_its_rows() -> None:
    whole = Layout.row((1, 4, 128))
    assert rows.norm("rms_norm", whole) == ("rms_norm", False)
    assert rows.norm("rms_norm", whole.split([64], 2)[0]) == ("rms_norm", True)
    assert rows.norm("layer_norm", Layout.row((2, 7000))) == ("layer_norm_looped", False)
    assert rows.norm("rms_norm", Layout.row((2, 4096))) == ("rms_norm", False)


def test_rope_takes_heads_as_the_projection_leaves_them() -> None:
    assert rows.rope(heads(14, 286, 64), 64) == ("rope", False)
    sliced = heads(18, 286, 64).split([16], 1)[0]
    assert rows.rope(sliced, 64) == ("rope", False)
    assert rows.rope(sliced, 32) == ("rope", True)
    assert rows.rope(Layout.row((1, 16, 1, 64)), 64) == ("rope_single", False)
    of_two = Layout.row((2, 286, 18, 64)).transposed((0, 2, 1, 3))
    assert rows.rope(of_two, 64) == ("rope", False)
    assert rows.rope(of_two.split([16], 1)[0], 64) == ("rope", True)


@pytest.mark.parametrize(
    ("shape", "axes", "names"),
    [
        ((1, 256, 768), (2,), ["row_reduce"]),
        ((1, 16, 16, 3072), (1, 2), ["col_reduce_looped"]),
        ((1, 24, 24, 3072), (1, 2), ["col_reduce_2pass", "col_reduce_small"]),
        ((1, 5, 5, 3072), (1, 2), ["col_reduce_small"]),
        ((1, 64, 64, 8), (1, 2), ["col_reduce_longcolumn", "col_reduce_small"]),
        ((8, 8), (0, 1), ["all_reduce"]),
        ((512, 512), (0, 1), ["all_reduce", "all_reduce"]),
    ],
)
def test_a_reduction_takes_one_or_two_passes(
    shape: tuple[int, ...], axes: tuple[int, ...], names: list[str]
) -> None:
    assert rows.reduction(Layout.row(shape), axes) == (tuple(names), False)


def test_a_softmax_over_rows_with_gaps_copies() -> None:
    assert rows.softmax(Layout.row((2, 4096))) == ("softmax", False)
    assert rows.softmax(Layout.row((2, 8192)).split([4097], 1)[0]) == ("softmax_looped", True)
