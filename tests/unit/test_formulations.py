"""Other forms compute the same, and each costs in the graph what it is compared for.

Which of them is faster only a device says (`benchmarks/formulations.py`); nothing here times.
"""

from __future__ import annotations

import json
from collections import Counter

import mlx.core as mx
import pytest
import small_tower
from mlx.utils import tree_flatten

from benchmarks import decoder_variants, formulations, tower_variants
from benchmarks.graph_trace import (
    compiling,
    convolutions,
    graph,
    hollow,
    is_pointwise,
    metal_kernel,
    trace,
    work,
)
from benchmarks.two_forms import LEAST_ROUNDS, Comparison, Result, compare, relative, verdict
from fastvlm_mlx.backend import has_scalar_cpu, select_device
from fastvlm_mlx.bench.synthetic import synthetic_checkpoint
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import FastViTHD

PIXELS = mx.zeros((1, 1024, 1024, 3), dtype=mx.uint8)
FORMS = tower_variants.FORMS


@pytest.fixture(scope="module")
def small() -> FastViTHD:
    return small_tower.tower(small_tower.folded(small_tower.canonical_weights("training")))


@pytest.fixture(scope="module")
def real() -> FastViTHD:
    """Real sizes; its weights take no memory and are never computed with."""
    return hollow(FastViTHD(VisionConfig()))


# The same


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", ["training_128", "training_192x64"])
def test_each_form_of_the_tower_equals_timm(small: FastViTHD, name: str, case: str) -> None:
    run = tower_variants.reform(small, dict([FORMS[name]]))
    assert small_tower.relative_rms(run, case) <= 1e-5


def test_the_towers_own_steps_are_the_tower(small: FastViTHD) -> None:
    assert small_tower.relative_rms(tower_variants.reform(small, {}), "training_128") <= 1e-5
    assert small_tower.relative_rms(tower_variants.paired(small), "training_128") <= 1e-5
    assert small_tower.relative_rms(tower_variants.step_by_step(small), "training_128") <= 1e-5


@pytest.mark.parametrize(("dtype", "most"), [(mx.float16, 1e-2), (mx.bfloat16, 5e-2)])
def test_a_cast_tower_is_scaled_as_the_loader_scales_it(
    small: FastViTHD, dtype: mx.Dtype, most: float
) -> None:
    cast = tower_variants.in_dtype(small, dtype)
    assert cast.stem.weight.dtype == dtype
    run = tower_variants.reform(cast, {})
    assert small_tower.relative_rms(lambda x: run(x).astype(mx.float32), "training_128") <= most


@pytest.fixture(scope="module", params=[16, 4])
def demo(request: pytest.FixtureRequest) -> FastVLM:
    return load_model(synthetic_checkpoint("demo", request.param), mx.float32, dequantize=False)


def test_forms_of_the_decoder_give_the_same_logits(demo: FastVLM) -> None:
    ours = demo.decoder
    others = decoder_variants.as_mlx_lm(ours, demo.config), decoder_variants.turned_apart(ours)
    for other in others:
        both = [decoder_variants.decoding(d, context=20, steps=3) for d in (ours, other)]
        assert relative(both[1](), both[0]()) <= 1e-5
        assert mx.array_equal(both[1](), both[1]())  # a run leaves the cache as it was
        both = [decoder_variants.prefilling(d, positions=20) for d in (ours, other)]
        assert relative(both[1](), both[0]()) <= 1e-5


def test_a_gpus_decoder_is_compared_with_other_forms_of_a_gpu(demo: FastVLM) -> None:
    """On a CPU in float32 the engine multiplies one position in pieces: no form of a GPU's."""
    plain = decoder_variants.as_a_gpu_runs_it(demo.decoder)
    if demo.config.quant is None and has_scalar_cpu():
        assert decoder_variants.has_cpu_forms(demo.decoder)
    assert not decoder_variants.has_cpu_forms(plain)
    assert not decoder_variants.has_cpu_forms(decoder_variants.turned_apart(plain))
    both = tree_flatten(demo.decoder.parameters()), tree_flatten(plain.parameters())
    assert [name for name, _ in both[0]] == [name for name, _ in both[1]]
    assert all(a is b for (_, a), (_, b) in zip(*both, strict=True))
    runs = [decoder_variants.decoding(d, context=20, steps=3) for d in (demo.decoder, plain)]
    assert relative(runs[1](), runs[0]()) <= 1e-5


# The cost


def kernels(tower: FastViTHD, *names: str) -> Counter[str]:
    run = tower_variants.reform(tower, dict(FORMS[name] for name in names))
    return Counter(metal_kernel(conv) for conv in convolutions(trace(run, PIXELS)))


def test_grouped_convolutions_are_five_slow_ones(real: FastViTHD) -> None:
    found = kernels(real, "downsample: grouped convolution", "expansion: grouped convolution")
    assert found["implicit_gemm_grouped"] == 5


def test_repeated_channels_have_a_fast_kernel_and_a_copy(real: FastViTHD) -> None:
    assert set(kernels(real, "downsample: repeated channels")) == {"depthwise", "implicit_gemm"}
    assert kernels(real)["depthwise"] - kernels(real, "downsample: repeated channels")[
        "depthwise"
    ] == len(real.stages[1:])


def test_1x1_convolutions_miss_the_gemms_epilogue(real: FastViTHD) -> None:
    kind, form = FORMS["1x1 as a convolution"]
    run = tower_variants.reform(real, {kind: form})
    found = [conv for conv in convolutions(trace(run, PIXELS)) if is_pointwise(conv)]
    blocks = sum(VisionConfig().layers[:3])
    assert len(found) == 2 * blocks


@pytest.mark.parametrize(
    ("name", "stage", "ours", "other"),
    [
        ("bias after fc2", 1, 6, 7),
        ("1x1 as a convolution", 1, 6, 8),
        ("LayerNorm from its parts", 3, 20, 21),
    ],
)
def test_primitives_of_a_block(
    real: FastViTHD, name: str, stage: int, ours: int, other: int
) -> None:
    """`mx.fast.layer_norm` is one kernel on Metal, nine primitives on a CPU, ten by hand."""
    block = real.stages[stage].blocks[0]
    x = mx.zeros((1, 16, 16, VisionConfig().embed_dims[stage]))
    with compiling(True):
        assert work(graph(block, x)) == ours
        assert work(graph(FORMS[name][1](block), x)) == other


# The decision


@pytest.mark.parametrize(
    ("ratios", "noise", "said"),
    [
        ([0.90, 0.91, 0.92, 0.90, 0.93], 0.02, "faster: load it so"),
        ([0.90, 0.91, 0.99, 0.90, 0.93], 0.02, "no difference: keep ours"),
        ([0.90, 0.91, 1.20, 0.90, 0.93], 0.02, "no difference: keep ours"),
        ([1.10, 1.08, 1.20, 1.09, 1.30], 0.02, "slower: keep ours"),
        ([1.10, 1.08, 1.20, 1.09, 1.30], 0.10, "no difference: keep ours"),
        ([0.5] * (LEAST_ROUNDS - 1), 0.0, "undecided: it takes 5 rounds or more"),
    ],
)
def test_a_form_must_win_every_round_by_more_than_the_noise(
    ratios: list[float], noise: float, said: str
) -> None:
    assert verdict(ratios, noise, "load it so") == said


def test_forms_that_do_not_agree_are_not_timed() -> None:
    x = mx.ones((4, 4))
    timings: list[float] = []

    def clock() -> float:
        timings.append(0.0)
        return 0.0

    wrong = Comparison("a sum", lambda: x + 1, lambda: x + 1.1, "", 1e-5)
    with pytest.raises(SystemExit, match=r"a sum: the outputs differ by 5\.0e-02"):
        compare(wrong, rounds=3, clock=clock)
    assert timings == []


def test_a_comparison_takes_turns_and_reports_the_rounds_ratios() -> None:
    """By a clock that ticks as the runs say: ours 2, the other 1."""
    ran: list[str] = []
    now = 0.0

    def run(name: str, ticks: float) -> mx.array:
        nonlocal now
        ran.append(name)
        now += ticks
        return mx.ones(3)

    found = compare(
        Comparison("x", lambda: run("ours", 2), lambda: run("other", 1), "set it", 1e-5),
        rounds=6,
        clock=lambda: now,
    )
    assert (found.ratio, found.lowest, found.highest, found.noise) == (0.5, 0.5, 0.5, 0.0)
    assert found.verdict == "faster: set it"
    assert Counter(ran)["ours"] == Counter(ran)["other"] + 1  # one more finds how often to repeat


# The command


@pytest.mark.parametrize(("dtype", "bits"), [(mx.float32, [16, 4]), (mx.float16, [8])])
def test_names_are_known_before_anything_is_loaded(
    dtype: mx.Dtype, bits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--only` is checked against them: one that is missing could not be asked for."""
    monkeypatch.setattr(formulations, "PROMPT_POSITIONS", 2)  # read when a comparison is made
    on_cpu = select_device().type == mx.DeviceType.cpu
    made = formulations.comparisons("demo", resolution=64, dtype=dtype, bits=bits)
    assert formulations.names(on_cpu=on_cpu, dtype=dtype, bits=bits) == [one.name for one in made]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--resolution 250", "argument --resolution: 250 is no multiple of 64 up to 4096"),
        ("--resolution 0", "argument --resolution: '0' is no whole number above zero"),
        ("--size 3b", "argument --size: invalid choice: '3b'"),
        ("--bits 5", "argument --bits: invalid choice: 5"),
        ("--rounds 0", "argument --rounds: '0' is no whole number above zero"),
        ("--only xyz", "no comparison has 'xyz' in its name: tower: paired heads; attention: pa"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_anything_is(
    asked: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        formulations.main(asked.split())
    found = capsys.readouterr()
    assert refused.value.code == 2
    assert found.err.startswith(f"python -m benchmarks.formulations: error: {said}")
    assert found.err.count("\n") == 1
    assert found.out == ""


def test_only_one_comparison_runs_where_one_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = "--size demo --resolution 64 --rounds 1 --dtype float32 --bits 16 --only expansion"
    formulations.main(asked.split())
    lines = capsys.readouterr().out.splitlines()
    found = [one["name"] for one in json.loads(lines[-1])["comparisons"]]
    assert found == ["expansion: grouped convolution"]


@pytest.mark.parametrize(
    ("verdicts", "rounds", "said"),
    [
        (["faster: set it", "slower: keep ours"], 5, ["form 0 is faster: set it"]),
        (["slower: keep ours"], 5, ["nothing to change: no other form is faster here"]),
        (["undecided: …"], 4, ["nothing decided: it takes 5 rounds or more"]),
    ],
)
def test_the_conclusion_is_what_to_do(verdicts: list[str], rounds: int, said: list[str]) -> None:
    results = [
        Result(f"form {i}", *[1.0] * 4, rounds, *[0.0] * 5, verdict)
        for i, verdict in enumerate(verdicts)
    ]
    assert list(formulations.conclusion(results, rounds)) == said


def test_the_help_says_how_long_and_from_how_many_rounds() -> None:
    told = " ".join(formulations.parser().format_help().split())
    assert "It takes minutes" in told
    assert "a decision takes 5 or more; default: 7" in told
    assert "a multiple of 64; default: 1024" in told


@pytest.mark.slow
def test_the_command_runs_every_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--size demo --resolution 128 --rounds 1 --dtype float32 --bits 16 4"
    formulations.main(asked.split())
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    names = [found["name"] for found in report["comparisons"]]
    decoder = [
        f"{stage}, {bits} bits: {form}"
        for bits in (16, 4)
        for form in ("as mlx-lm has it", "RoPE of q and k apart")
        for stage in ("prefill", "decode")
    ]
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    own_forms = on_cpu and has_scalar_cpu()
    if own_forms:
        decoder.insert(4, "decode, 16 bits: as a GPU runs it")  # packed weights have no other form
    paired = ["tower: paired heads", "attention: paired heads"]
    here = ["tower: as a GPU runs it"] if own_forms else []
    if not on_cpu:
        here = ["tower: one mx.compile around it"]
    assert names == [*paired, *FORMS, *here, "tower: low-memory mode", *decoder]
    assert len(lines) == 1 + len(names) + 2
    assert lines[-2] == "nothing decided: it takes 5 rounds or more"
    assert (report["size"], report["resolution"]) == ("demo", 128)
    assert all(found["verdict"].startswith("undecided") for found in report["comparisons"])
    assert all(found["difference"] <= 1e-5 for found in report["comparisons"])
