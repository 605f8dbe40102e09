"""How cost grows: counts and bytes beside their formulas, the fit on known numbers; no clock."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks import growth, growth_plot
from benchmarks.graph_trace import trace
from benchmarks.growth_fit import fit
from benchmarks.growth_points import (
    Point,
    filled_cache,
    grown,
    kv_bytes,
    measure_decode,
    measure_prefill,
    measure_vision,
    prefill_bound,
    tower_bound,
)
from fastvlm_mlx.backend import has_scalar_cpu, select_device
from fastvlm_mlx.bench.costs import Storage
from fastvlm_mlx.bench.machine import machine_card
from fastvlm_mlx.bench.synthetic import synthetic_engine
from fastvlm_mlx.config import PRESETS, DecoderConfig, VisionConfig
from fastvlm_mlx.generate.loop import prefill
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.unit.test_bench_limits import traced_flops

FLOAT32 = Storage(dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> Iterator[None]:
    """The bounds on memory are those of MLX's CPU backend."""
    before = mx.default_device().type
    select_device("cpu")
    yield
    select_device("cpu" if before == mx.DeviceType.cpu else "gpu")


@pytest.fixture(scope="module")
def model(on_a_cpu: None) -> FastVLM:
    """The demo's sizes in the forms that a GPU runs, which the formulas count."""
    return synthetic_engine("demo", device="cpu", cpu_forms=False).pipeline.model


SMALL = 256


def settled_bytes() -> int:
    """What MLX holds once its thread has let go of what it ran last, to a few scalars.

    Its pool is emptied: a buffer taken from there may be larger than asked for, and counts whole.
    """
    mx.eval(mx.zeros(1))
    mx.clear_cache()
    return mx.get_active_memory()


# Counts: nothing is worse than its formula


def test_what_is_measured_computes_what_its_formula_says(model: FastVLM) -> None:
    """Points carry the formula's counts; the graph that is timed must have the same."""
    decoder = model.decoder
    (point,) = measure_prefill(model, FLOAT32, [48])
    embeddings = mx.zeros((1, 48, decoder.config.hidden_size))
    done = traced_flops(trace(lambda x: prefill(decoder, x, decoder.make_cache()), embeddings))
    masked = 4 * decoder.config.hidden_size * (decoder.config.num_layers - 1) * 48 * 47 // 2
    assert done - masked == point.flops
    (point,) = measure_vision(model, FLOAT32, [128])
    pixels = mx.zeros((1, 128, 128, 3), dtype=mx.uint8)
    assert traced_flops(trace(model.vision, pixels)) == point.flops


def test_the_kv_cache_holds_its_formulas_bytes_and_no_more(model: FastVLM) -> None:
    config = model.decoder.config
    for positions in (1, 200, 256, 257, 700):
        before = settled_bytes()
        cache = filled_cache(model.decoder, positions)
        held = settled_bytes() - before
        assert kv_bytes(cache) == FLOAT32.kv(grown(positions), config)
        assert held == pytest.approx(kv_bytes(cache), abs=SMALL)
        del cache


def test_decoding_within_its_buffers_makes_the_kv_cache_no_larger(model: FastVLM) -> None:
    points = list(measure_decode(model, FLOAT32, [240, 496]))
    assert [point.held_bytes for point in points] == [point.bound_bytes for point in points]
    assert points[1].held_bytes == 2 * points[0].held_bytes


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("tokens", [64, 256, 500])
def test_a_prefill_holds_one_layers_arrays_however_many_layers(layers: int, tokens: int) -> None:
    config = DecoderConfig(
        hidden_size=128,
        num_layers=layers,
        intermediate_size=384,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=640,
        tied=True,
    )
    decoder = Decoder(config)
    mx.eval(decoder.parameters())
    embeddings = decoder.embed(mx.zeros((1, tokens), dtype=mx.int32))
    mx.eval(embeddings)
    point, cache = Point("prefill", tokens, 0, 0), decoder.make_cache()
    point.count(lambda: mx.eval(prefill(decoder, embeddings, cache)))
    assert 0 < point.peak_bytes <= prefill_bound(config, FLOAT32, tokens)


def test_logits_of_all_positions_would_exceed_a_prefills_bound() -> None:
    config = PRESETS["0.5b"].decoder
    all_logits = 1024 * config.vocab_size * 4
    assert all_logits > prefill_bound(config, FLOAT32, 1024)


def test_a_low_memory_tower_stays_under_its_bound(model: FastVLM) -> None:
    model.vision.low_memory = True
    try:
        for point in measure_vision(model, FLOAT32, [64, 256, 512]):
            assert point.bound_bytes is not None
            assert 0.5 * point.bound_bytes < point.peak_bytes <= point.bound_bytes
    finally:
        model.vision.low_memory = False


def test_the_real_towers_bound_is_what_low_memory_mode_promises() -> None:
    """300 MiB at 1024 px in float32; with the square of the pixels from there on."""
    bounds = [tower_bound(VisionConfig(), FLOAT32, side) for side in (512, 1024, 1536, 3072)]
    assert bounds[1] <= 300 * 2**20
    assert bounds[1] / bounds[0] == pytest.approx(4, rel=1e-3)
    assert bounds[3] / bounds[2] == pytest.approx(16, rel=0.05)


# The fit


def test_a_fit_finds_the_factors_it_was_made_of() -> None:
    xs = [1.0, 2.0, 5.0, 10.0, 40.0]
    found = fit(xs, [3 + 2 * x + 0.5 * x * x for x in xs], ("constant", "linear", "square"))
    assert found.coefficients == pytest.approx({"constant": 3, "linear": 2, "square": 0.5})
    assert found.worst_residual == pytest.approx(0, abs=1e-9)
    assert sum(found.shares(7.0).values()) == pytest.approx(1)


def test_a_fits_factors_are_never_below_zero() -> None:
    xs = [1.0, 2.0, 3.0, 4.0]
    found = fit(xs, [10.0, 18.0, 24.0, 28.0], ("constant", "linear", "square"))
    assert min(found.coefficients.values()) == 0
    assert found.worst_residual > 0


def test_a_fit_weighs_small_sizes_as_much_as_large_ones() -> None:
    """By absolute errors the constant 5 would drown in the largest point."""
    xs = [1.0, 10.0, 1e4, 1e5]
    found = fit(xs, [5 + x for x in xs[:3]] + [1.02e5], ("constant", "linear"))
    assert found.coefficients["constant"] == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize(
    ("xs", "ys"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, 0.0])]
)
def test_a_fit_without_enough_points_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match="as many points"):
        fit(xs, ys, ("constant", "linear"))


# The report


def known(kind: str, factor: float = 1.0) -> list[Point]:
    points = []
    for x in (10, 20, 40):
        point = Point(kind, x, flops=1000 * x, moved_bytes=500 * x, bound_bytes=None)
        point.ms, point.cpu_ms = [2.0 * x + 5, 2.0 * x], [x, 3.0 * x]
        points.append(point)
    points[-1].ms.append(factor * points[-1].ms.pop())
    return points


def test_growing_as_the_formula_is_1_and_faster_is_above() -> None:
    assert growth.worse(known("vision")) == pytest.approx(1)
    assert growth.worse(known("decode", 1.02)) == pytest.approx(1.02)


def test_the_fastest_round_counts_and_all_are_kept() -> None:
    merged = growth.merge([known("vision"), known("vision", 0.5)])
    assert merged[-1].best_ms == 40.0
    assert len(merged[0].ms) == 4
    assert growth.summary(merged)["points"][0]["ms"] == merged[0].ms


def test_csv_has_every_point_and_the_plot_is_a_png() -> None:
    kinds = {kind: known(kind) for kind in ("vision", "prefill", "decode")}
    table = list(csv.DictReader(io.StringIO(growth.rows(kinds))))
    assert [(row["kind"], row["x"]) for row in table] == [
        (kind, str(point.x)) for kind, points in kinds.items() for point in points
    ]
    assert table[0]["bound_bytes"] == "" and float(table[0]["best_ms"]) == 20.0
    assert growth_plot.draw(whole(kinds)).startswith(b"\x89PNG")


def whole(kinds: dict[str, list[Point]]) -> dict[str, Any]:
    machine = asdict(machine_card())
    about = {"model": "m", "dtype": "float32", "forms": "a GPU's forms", "machine": machine}
    return {kind: growth.summary(points) for kind, points in kinds.items()} | about


def test_the_result_says_which_forms_were_timed(model: FastVLM) -> None:
    assert growth.forms_of(model) == "a GPU's forms"
    chosen = synthetic_engine("demo", device="cpu").pipeline.model
    own = "a CPU's own forms" if has_scalar_cpu() else "a GPU's forms"
    assert growth.forms_of(chosen) == own


# The files


def test_results_are_written_whole_or_the_old_ones_stay(tmp_path: Path) -> None:
    kinds = {kind: known(kind) for kind in ("vision", "prefill", "decode")}
    growth.save(tmp_path, whole(kinds), kinds)
    names = ["growth.csv", "growth.json", "growth.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before = {name: (tmp_path / name).read_bytes() for name in names}
    with pytest.raises(ValueError, match="JSON"):
        growth.save(tmp_path, whole(kinds) | {"seconds": float("nan")}, kinds)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(SystemExit, match=r"growth\.json cannot be written: its folder is missing"):
        growth.save(tmp_path / "missing", whole(kinds), kinds)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as refused:
        growth.main(["--size", "demo", "--save", str(tmp_path / "file")])
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert "is a file: give a folder's name" in said.err and "round" not in said.out


# The options


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--sides 256,512", "--sides needs 3 sizes or more, to fit its terms"),
        ("--sides 250,256,512", "argument --sides: 250 is no multiple of 64 up to 4096"),
        ("--tokens 32,64,99999", "--tokens needs 3 sizes or more that leave room in 1024 pos"),
        ("--contexts 240", "--contexts needs 2 sizes or more, to fit its terms"),
        ("--tokens 8,x", "argument --tokens: 'x' is no whole number above zero"),
        ("--rounds 0", "argument --rounds: '0' is no whole number above zero"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line_before_anything_is_measured(
    asked: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        growth.main(["--size", "demo", *asked.split()])
    found = capsys.readouterr()
    assert refused.value.code == 2
    assert found.err.startswith(f"python -m benchmarks.growth: error: {said}")
    assert found.err.count("\n") == 1
    assert found.out == ""


def test_the_help_says_how_many_sizes_a_fit_needs() -> None:
    told = " ".join(growth.parser().format_help().split())
    assert "pixels a side, multiples of 64: needs 3 sizes or more; default: 256,384" in told
    assert "of prompts: needs 3 sizes or more; default: 32,64" in told
    assert "positions in the KV cache: needs 2 sizes or more; default: 240,1008" in told


def test_sizes_are_ascending_and_each_once() -> None:
    given = growth.parser().parse_args(["--sides", "512, 256,512,128"])
    assert given.sides == [128, 256, 512]
    assert given.tokens == list(growth.TOKENS)
