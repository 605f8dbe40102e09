"""`fastvlm bench` loads a model as it is told: alone, in fresh processes, beside another runtime.

Beside ours stands a scripted runtime, in a process of its own, in the place of mlx-vlm.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import asked, scripted

from fastvlm_mlx.bench.results import STAGES, Report
from fastvlm_mlx.bench.run import describe
from fastvlm_mlx.bench.sweeps import PROMPT_WORDS
from fastvlm_mlx.bench.synthetic import synthetic_engine
from fastvlm_mlx.config import PRESETS
from fastvlm_mlx.convert.app import export_app
from fastvlm_mlx.errors import FastVLMError
from tests.cli.command import Run

QUICK = ("--runs", 1, "--warm-up", 0, "--max-tokens", 4, "--resolution", 64)


@pytest.fixture
def app_export(tmp_path: Path) -> Path:
    """The demo as Apple's app takes it: no vision tower is in it."""
    export_app("demo", tmp_path / "app", bits=8)
    return tmp_path / "app"


def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list to which every cold start's command line is added."""
    from fastvlm_mlx.bench import cold

    found: list[list[str]] = []
    real = cold._run

    def run(arguments: list[str]) -> dict[str, float]:
        found.append(list(arguments))
        return real(arguments)

    monkeypatch.setattr(cold, "_run", run)
    return found


@pytest.mark.slow
def test_an_export_for_the_app_is_measured_with_the_tower_from_elsewhere(
    run: Run, app_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = commands(monkeypatch)
    ran = run(
        "bench", "--model", app_export, "--vision-from", "demo", *QUICK, "--cold", 1, "--json"
    )
    assert ran.code == 0, ran.err
    report = Report.from_json(json.loads(ran.out))
    assert report.model.quantization == "8 bits affine" and report.cases[0].generated_tokens == 4
    assert report.once["cold_ttft_ms"].n == 1
    (words,) = started
    tower = words[words.index("--vision-from") + 1]
    assert (Path(tower) / "config.json").exists() and tower != str(app_export)


def test_an_export_for_the_app_alone_is_refused_with_what_to_add(
    run: Run, app_export: Path
) -> None:
    assert "add --vision-from" in run("bench", "--model", app_export, *QUICK).refused()


@pytest.mark.slow
def test_a_cold_start_loads_the_model_as_the_run_does(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = commands(monkeypatch)
    ran = run(
        "bench", "--size", "demo", "--bits", 8, *QUICK, "--cold", 1, "--json", "--low-memory",
        "--paired-heads", "--keep-quantized", "--memory-limit", "2GB", "--device", "cpu",
        "--dtype", "float32",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    settings = Report.from_json(json.loads(ran.out)).settings
    assert settings.low_memory and settings.paired_heads
    (words,) = started
    assert {"--low-memory", "--paired-heads", "--keep-quantized"} < set(words)
    pairs = dict(pairwise(words))
    assert pairs["--memory-limit"] == "2000000.000K"
    assert (pairs["--device"], pairs["--dtype"]) == ("cpu", "float32")
    assert "--vision-from" not in words


def test_a_cold_start_that_may_not_have_the_memory_is_refused_by_the_command(run: Run) -> None:
    """The limit is the child's own, in bytes, to the byte but for a thousandth."""
    from fastvlm_mlx.bench.cold import cold_start
    from fastvlm_mlx.bench.results import Case

    case = Case(resolution=64, images=0, prompt="short", max_tokens=1)
    with pytest.raises(FastVLMError, match=r"exit code 2.*memory"):
        cold_start("demo", case, runs=1, loading={"memory_limit": 1001})


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux alone forgets files")
def test_forgotten_files_are_said_to_be_cold_for_starts_and_loading(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found is asserted, not what the disk did: a file system in memory forgets nothing."""
    from fastvlm_mlx.bench import cold
    from fastvlm_mlx.cli import bench_weights

    forgot: list[str] = []
    for module in (cold, bench_weights):
        monkeypatch.setattr(module, "forget", lambda files: forgot.extend(f.name for f in files))
        monkeypatch.setattr(module, "file_cache_state", lambda _: "cold" if forgot else "warm")
    ran = run("bench", "--model", "demo", *QUICK, "--cold", 2, "--cold-files", "--json")
    assert ran.code == 0, ran.err
    assert len(forgot) == 3, "before each of two starts, and before loading"
    assert Report.from_json(json.loads(ran.out)).settings.file_cache == "cold"


def test_where_files_cannot_be_forgotten_it_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    ran = run("bench", "--model", "demo", "--cold", 1, "--cold-files")
    assert "--cold-files needs Linux" in ran.refused()


# Beside another runtime


def beside(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: Any, **script: Any
) -> Any:
    """Run the comparison with a scripted runtime in mlx-vlm's place; return its JSON and stderr."""
    from fastvlm_mlx.cli import bench_runs

    peer = scripted(folder, "mlx-vlm", **({"ids": [1, 2, 3, 4]} | script))
    monkeypatch.setattr(bench_runs, "mlx_vlm", lambda _: peer)
    monkeypatch.setattr(bench_runs, "require_their_tower", lambda _: None)  # it takes any
    ran = run("bench", "--size", "demo", "--compare", "mlx-vlm", *QUICK, *words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out), ran.err


@pytest.mark.slow
def test_several_pictures_beside_mlx_vlm_have_no_second_turn_and_say_why(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = {"second_turn": "its chat takes one picture"}
    values, _ = beside(run, tmp_path, monkeypatch, "--images", 2, cannot=cannot)
    (case,) = Report.from_json(values).cases
    assert case.case.images == 2 and "second_turn_ttft_ms" not in case.series
    assert set(STAGES) < case.series.keys() and asked(tmp_path, "second_turn") == []
    (note,) = values["compared"]["notes"]
    assert "no second turn" in note and "its chat takes one picture" in note


@pytest.mark.slow
def test_a_sweep_of_prompts_beside_mlx_vlm_leaves_out_what_does_not_fit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's context is 1024 positions: the longest prompts once ended the comparison."""
    values, said = beside(
        run, tmp_path, monkeypatch, "--sweep", "prompt", cannot={"profile": "in chunks"}
    )
    report = Report.from_json(values)
    left_out = [line for line in said.splitlines() if "left out of the sweep" in line]
    assert 4 <= len(report.cases) < len(PROMPT_WORDS)
    assert len(report.cases) + len(left_out) == len(PROMPT_WORDS)
    assert all("vision_ms" not in case.series for case in report.cases)
    assert len(values["compared"]["notes"]) == len(report.cases)


def test_a_prompt_that_does_not_fit_is_refused_before_anybody_is_started(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.cli import bench_runs

    peer = scripted(tmp_path, "mlx-vlm")
    monkeypatch.setattr(bench_runs, "mlx_vlm", lambda _: peer)
    monkeypatch.setattr(bench_runs, "require_their_tower", lambda _: None)  # it takes any
    ran = run("bench", "--model", "demo", "--compare", "mlx-vlm", "--prompt", "short,100000 words")
    assert "do not fit this model's context" in ran.refused()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("options", [("--size", "demo"), ("--model", "demo")])
def test_a_tower_of_another_size_than_apples_is_refused_before_anybody_is_started(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    from fastvlm_mlx.cli import bench_runs

    peer = scripted(tmp_path, "mlx-vlm")
    monkeypatch.setattr(bench_runs, "mlx_vlm", lambda _: peer)
    ran = run("bench", *options, "--compare", "mlx-vlm")
    assert "mlx-vlm takes only towers of Apple's size" in ran.refused()
    assert not (tmp_path / "log").exists()
    for config in PRESETS.values():
        bench_runs.require_their_tower(config)


@pytest.mark.slow
def test_mlx_vlm_that_fails_later_leaves_what_was_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, said = beside(
        run, tmp_path, monkeypatch, "--runs", 3, at="ttft", after=1, do="raise MemoryError('full')"
    )
    ours, theirs = (values, values["compared"]["reports"][0])
    assert [r["cases"][0]["series"]["ttft_ms"]["n"] for r in (ours, theirs)] == [3, 1]
    assert said.startswith("fastvlm: mlx-vlm is out from here on: mlx-vlm cannot ttft: MemoryError")


@pytest.mark.slow
def test_packed_weights_that_ours_unpacks_on_a_cpu_are_said_to_be(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _ = beside(run, tmp_path, monkeypatch, "--bits", 8, "--device", "cpu")
    assert values["model"]["unpacked"] and values["model"]["quantization"] == "8"
    assert not values["compared"]["reports"][0]["model"]["unpacked"]


@pytest.mark.parametrize(
    ("bits", "keep", "unpacked"), [(16, False, False), (8, False, True), (8, True, False)]
)
def test_a_report_says_whether_packed_weights_are_held_as_floats(
    bits: int, keep: bool, unpacked: bool
) -> None:
    engine = synthetic_engine("demo", bits, device="cpu", keep_quantized=keep)
    report = describe(
        engine, (), synthetic=True, quantization=str(bits), runs=1, warm_up_runs=0, seed=0
    )
    assert report.model.unpacked is unpacked
