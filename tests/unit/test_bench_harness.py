"""The measuring loop does all the work it reports, counts it, and leaves warm-up out."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.bench import harness
from fastvlm_mlx.bench.harness import OurRuntime, run_cases
from fastvlm_mlx.bench.inputs import InputFiles, input_files
from fastvlm_mlx.bench.results import METRICS, STAGES, Case
from fastvlm_mlx.bench.synthetic import synthetic_engine
from fastvlm_mlx.engine import Engine, load
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generate.pipeline import Pipeline

ONE = Case(resolution=64, images=1, prompt="short", max_tokens=5)
TWO = Case(resolution=128, images=2, prompt="20 words", max_tokens=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return synthetic_engine("demo")


def count_towers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shape of the features of each run of the tower from now on."""
    ran: list[tuple[int, ...]] = []
    real = Pipeline._features

    def features(self: Pipeline, pixels: Any, *rest: Any) -> Any:
        ran.append(tuple(pixels.shape))
        return real(self, pixels, *rest)

    monkeypatch.setattr(Pipeline, "_features", features)
    return ran


def test_every_figure_has_one_value_a_run_and_warm_up_is_left_out(engine: Engine) -> None:
    said: list[str] = []
    results = run_cases(
        engine, [ONE, TWO], runs=3, warm_up_runs=2, second_turn=True, say=said.append
    )
    expected = {
        "ttft_ms",
        "paper_ttft_ms",
        *STAGES,
        "decode_tps",
        "second_turn_ttft_ms",
        "peak_bytes",
        "resident_bytes",
    }
    assert [result.case for result in results] == [ONE, TWO]
    for result in results:
        assert result.series.keys() == expected <= METRICS.keys()
        assert {series.n for series in result.series.values()} == {3}
        assert all(series.unit == METRICS[name].unit for name, series in result.series.items())
    assert len(said) == (3 + 2) * 2
    assert sum(line.startswith("warm-up") for line in said) == 2 * 2


def test_counts_are_those_of_the_prompt_the_pictures_and_the_answer(engine: Engine) -> None:
    one, two = run_cases(engine, [ONE, TWO], runs=1, warm_up_runs=0)
    assert (one.image_tokens, two.image_tokens) == (1, 2 * 4)
    assert (one.generated_tokens, two.generated_tokens) == (5, 3)
    tokens = engine.generate("Describe the image.", max_tokens=1).stats.prompt_tokens
    newline = len(engine.pipeline.processor.tokenizer.encode("\nDescribe the image.")) - 4
    assert one.prompt_tokens == tokens + newline + 1


def test_cases_take_turns_so_that_heat_falls_on_all(engine: Engine) -> None:
    said: list[str] = []
    run_cases(engine, [ONE, TWO], runs=2, warm_up_runs=0, say=said.append)
    assert [ONE.name in line for line in said] == [True, False, True, False]


def test_every_picture_goes_through_the_tower_in_every_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with input_files() as files:
        runtime = OurRuntime(engine, files)
        for call, towers in ((runtime.ttft, 2), (runtime.profile, 2), (runtime.second_turn, 2)):
            call(TWO)
            with monkeypatch.context() as patch:
                ran = count_towers(patch)
                call(TWO)
            assert len(ran) == towers, call.__name__


def test_an_engine_that_remembers_pictures_and_stops_does_neither_here() -> None:
    """The demo model ends its answers; its engine remembers what it saw."""
    engine = load("demo")
    with input_files() as files:
        runtime = OurRuntime(engine, files)
        case = dataclasses.replace(ONE, max_tokens=300)
        ids = [runtime.ttft(case).token_ids for _ in range(2)]
    assert [len(each) for each in ids] == [300, 300]
    assert ids[0] == ids[1]
    assert engine.pipeline.stop_ids, "the caller's engine is as it was"


def test_less_work_than_asked_for_is_an_error_not_a_result(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with input_files() as files:
        runtime = OurRuntime(engine, files)
        with monkeypatch.context() as patch:
            patch.setattr(
                runtime, "engine", dataclasses.replace(engine, pipeline=remembering(engine))
            )
            runtime.ttft(ONE)
            with pytest.raises(RuntimeError, match="1 pictures and 5 tokens were to be measured"):
                runtime.ttft(ONE)


def remembering(engine: Engine) -> Pipeline:
    """Return the pipeline with room for features."""
    from fastvlm_mlx.generate.cache import FeatureCache

    return dataclasses.replace(engine.pipeline, features=FeatureCache(1 << 20))


def test_the_paper_counts_tower_projector_prefill_and_first_token(engine: Engine) -> None:
    with input_files() as files:
        stages = OurRuntime(engine, files).profile(ONE)
    counted = ("vision_ms", "projector_ms", "prefill_ms", "first_token_ms")
    assert stages["paper_ttft_ms"] == pytest.approx(sum(stages[name] for name in counted))
    assert stages.keys() == {*STAGES, "paper_ttft_ms"}
    assert min(stages[name] for name in STAGES) > 0


def test_the_second_turn_reads_the_first_from_the_cache(engine: Engine) -> None:
    with input_files() as files:
        runtime = OurRuntime(engine, files)
        first, second = runtime.ttft(TWO), runtime.second_turn(TWO)
    assert second.prompt_tokens > first.prompt_tokens + harness.FIRST_ANSWER_TOKENS
    assert len(second.token_ids) == 1 and second.decode_tps is None


def test_one_token_has_no_rate(engine: Engine) -> None:
    case = dataclasses.replace(ONE, max_tokens=1)
    (result,) = run_cases(engine, [case], runs=1, warm_up_runs=0)
    assert "decode_tps" not in result.series and "ttft_ms" in result.series


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (dataclasses.replace(ONE, resolution=100), "multiple of 64"),
        (dataclasses.replace(ONE, prompt="long"), "do not fit this model's context of 1024"),
        (dataclasses.replace(ONE, max_tokens=1020), "do not fit this model's context of 1024"),
        (dataclasses.replace(ONE, prompt="none such"), "unknown prompt"),
    ],
)
def test_a_case_that_cannot_run_is_refused_before_any_does(
    engine: Engine, case: Case, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = count_towers(monkeypatch)
    with pytest.raises(FastVLMError, match=said) as error:
        run_cases(engine, [ONE, case], runs=1, warm_up_runs=1)
    assert "\n" not in str(error.value) and not ran


@pytest.mark.parametrize(
    ("cases", "runs", "warm_up_runs"), [([], 1, 0), ([ONE], 0, 0), ([ONE], 1, -1)]
)
def test_nothing_to_measure_is_refused(
    engine: Engine, cases: list[Case], runs: int, warm_up_runs: int
) -> None:
    with pytest.raises(FastVLMError, match="nothing is measured"):
        run_cases(engine, cases, runs=runs, warm_up_runs=warm_up_runs)


def test_an_interrupted_run_leaves_no_files(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupt(line: str) -> None:
        if line.startswith("run 2"):
            assert list(tmp_path.glob("*/*.jpg")), "the files are there while it runs"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cases(engine, [ONE], runs=3, warm_up_runs=0, say=interrupt)
    assert not list(tmp_path.iterdir())


def test_resident_memory_is_what_is_held_now_not_the_most_ever() -> None:
    before = harness.resident_bytes()
    with mmap.mmap(-1, 64 << 20) as held:  # pages of its own: malloc may have some left over
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        most = harness.resident_bytes()
    after = harness.resident_bytes()
    assert most - before > 60 << 20
    assert most - after > 60 << 20


def test_files_of_a_case_are_jpegs_of_its_own_resolution(tmp_path: Path) -> None:
    from PIL import Image

    paths = InputFiles(tmp_path).paths(TWO)
    assert [Image.open(path).size for path in paths] == [(128, 128)] * 2
