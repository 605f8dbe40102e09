"""`fastvlm bench`: real runs of the demo model, their files and exit codes, and what is refused.

No test looks at how long anything took: what is asserted of a time is that it is there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from bench_reports import made_machine, made_report
from PIL import Image

from fastvlm_mlx.bench.results import STAGES, Report, Series
from fastvlm_mlx.bench.spreadsheet import CSV_COLUMNS
from fastvlm_mlx.bench.sweeps import PROMPT_WORDS
from tests.cli.command import Ran, Run, spawn, wait

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

QUICK = ("--runs", 3, "--warm-up", 0, "--max-tokens", 4)


@dataclasses.dataclass(frozen=True)
class Whole:
    """One run with every kind of output, and where those are."""

    ran: Ran
    folder: Path

    @property
    def saved(self) -> Path:
        return self.folder / "result.json"

    @property
    def report(self) -> Report:
        return Report.from_json(json.loads(self.saved.read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("bench")
    outputs = ("--save", folder / "result.json", "--csv", folder / "result.csv")
    process = spawn(
        "bench", "--model", "demo", *QUICK, "--resolution", "128,64",
        *outputs, "--plots", folder / "plots",
    )  # fmt: skip
    return Whole(wait(process), folder)


def doctored(report: Report, factor: float) -> Report:
    """The same report, every time of it `factor` times as long and memory so many times as much."""

    def scaled(series: Series) -> Series:
        by = 1 / factor if series.unit == "tokens/s" else factor
        return Series(series.unit, tuple(value * by for value in series.values))

    return dataclasses.replace(
        report,
        once={name: scaled(one) for name, one in report.once.items()},
        cases=tuple(
            dataclasses.replace(
                result, series={name: scaled(one) for name, one in result.series.items()}
            )
            for result in report.cases
        ),
    )


def written(path: Path, report: Report, **more: Any) -> Path:
    path.write_text(json.dumps(report.to_json() | more))
    return path


def test_a_run_prints_a_table_and_writes_every_file(whole: Whole) -> None:
    assert whole.ran.code == 0, whole.ran.err
    assert whole.ran.err == ""
    for words in ("128 px, 1 image, short prompt, 4 tokens", "TTFT", "second turn TTFT", "limit:"):
        assert words in whole.ran.out
    names = sorted(str(path.relative_to(whole.folder)) for path in whole.folder.rglob("*.*"))
    assert names == [
        "plots/resolution.png", "plots/ttft-stages.png", "result.csv", "result.json",
    ]  # fmt: skip


def test_the_saved_report_has_every_figure_of_every_run(whole: Whole) -> None:
    report = whole.report
    assert report.runtime.startswith("fastvlm-mlx ") and report.model.name == "demo"
    assert "--resolution 128,64" in report.command
    assert [result.case.resolution for result in report.cases] == [128, 64]
    for result in report.cases:
        assert {
            "ttft_ms",
            "paper_ttft_ms",
            "decode_tps",
            "second_turn_ttft_ms",
            "peak_bytes",
        } < set(result.series)
        assert set(STAGES) < set(result.series)
        assert {series.n for series in result.series.values()} == {3}
        assert result.generated_tokens == 4
        assert result.image_tokens == (result.case.resolution // 64) ** 2
        for name in ("vision_ms", "prefill_ms", "first_token_ms", "decode_tps"):
            assert result.limits[name].limit_ms is not None and result.limits[name].source
    assert {"load_ms", "warm_up_ms", "active_bytes"} == set(report.once)


def test_parameters_and_bytes_of_the_demo_are_its_weights(whole: Whole) -> None:
    card = whole.report.model
    assert card.weight_bytes == 4 * card.parameters and card.dtype == "float32"
    assert card.quantization == "16" and not card.synthetic and len(card.fingerprint) == 32


def test_the_csv_and_the_plots_are_what_they_are_called(whole: Whole) -> None:
    rows = list(csv.DictReader(io.StringIO((whole.folder / "result.csv").read_text())))
    assert tuple(rows[0]) == CSV_COLUMNS
    found = {(row["resolution"], row["metric"]) for row in rows}
    assert {("128", "ttft_ms"), ("64", "decode_tps"), ("", "load_ms")} < found
    for path in (whole.folder / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 960


@pytest.mark.slow
def test_json_is_one_object_on_the_last_line(run: Run) -> None:
    ran = run("bench", "--size", "demo", "--bits", 8, *QUICK, "--resolution", 64, "--json")
    assert ran.code == 0 and ran.err == ""
    *before, last = ran.out.splitlines()
    assert before == []
    report = Report.from_json(json.loads(last))
    assert report.model.synthetic and report.model.quantization == "8"
    assert "load_ms" not in report.once, "making random weights is no loading"


@pytest.mark.slow
def test_the_default_is_the_demo_and_says_so_in_one_line(run: Run) -> None:
    ran = run("bench", *QUICK, "--resolution", 64)
    assert ran.code == 0 and ran.err.count("\n") == 1
    assert "measuring the demo model" in ran.err and "--size 0.5b" in ran.err


@pytest.mark.slow
def test_no_worse_than_the_baseline_is_success(run: Run, whole: Whole, tmp_path: Path) -> None:
    """A baseline ten thousand times as slow: no load of this machine makes that fail."""
    baseline = written(tmp_path / "slow.json", doctored(whole.report, 1e4))
    ran = run("bench", "--model", "demo", *QUICK, "--resolution", 64, "--check", baseline)
    assert ran.code == 0
    lines = ran.err.splitlines()
    name = "128 px, 1 image, short prompt, 4 tokens"
    assert lines[0] == f"fastvlm: not checked: {name} (not measured now)"
    few = "(measured fewer than 3 times, so its noise is unknown)"
    assert f"fastvlm: not checked: once a process: warm-up, model's size {few}" in lines
    assert "no worse than the baseline" in lines[-1]


@pytest.mark.slow
def test_a_regression_is_exit_code_1_and_a_line_each(
    run: Run, whole: Whole, tmp_path: Path
) -> None:
    baseline = written(tmp_path / "quick.json", doctored(whole.report, 1e-4))
    ran = run(
        "bench", "--model", "demo", *QUICK, "--resolution", "128,64", "--check", baseline, "--json"
    )
    assert ran.code == 1
    Report.from_json(json.loads(ran.out.splitlines()[-1]))
    # What reads files is not checked if the file cache was in another state.
    # What is measured once a process has no noise to go by.
    lines = [line for line in ran.err.splitlines() if "not checked: once" not in line]
    assert all(line.startswith("fastvlm: worse than the baseline: ") for line in lines)
    assert any("64 px" in line and "TTFT" in line for line in lines)
    assert any("decode" in line and "tok/s" in line for line in lines)


@pytest.mark.slow
def test_a_sweep_of_bits_measures_a_model_each(run: Run, tmp_path: Path) -> None:
    ran = run(
        "bench", "--size", "demo", "--sweep", "quantization", *QUICK, "--resolution", 64, "--json",
        "--csv", tmp_path / "all.csv",
    )  # fmt: skip
    values = json.loads(ran.out)
    reports = [Report.from_json(one) for one in (values, *values["more"])]
    assert [report.model.quantization for report in reports] == ["16", "8", "4"]
    sizes = [report.model.weight_bytes for report in reports]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3, "kept packed"
    assert ("keeps 8 and 4 bits packed" in ran.err) == (reports[0].machine.device == "cpu")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [row["quantization"] for row in rows if row["metric"] == "ttft_ms"] == ["16", "8", "4"]


@pytest.mark.slow
def test_a_sweep_leaves_out_and_names_what_the_model_has_no_room_for(run: Run) -> None:
    """The demo's context is 1024 positions: the longest of the built-in prompts do not fit."""
    ran = run(
        "bench", "--model", "demo", "--sweep", "prompt", "--resolution", 64, "--runs", 1,
        "--warm-up", 0, "--max-tokens", 2, "--json",
    )  # fmt: skip
    cases = Report.from_json(json.loads(ran.out)).cases
    lengths = [result.prompt_tokens for result in cases]
    assert lengths == sorted(lengths) and 4 <= len(lengths) < len(PROMPT_WORDS)
    left_out = [line for line in ran.err.splitlines() if "left out of the sweep" in line]
    assert len(lengths) + len(left_out) == len(PROMPT_WORDS)
    assert all("context of 1024" in line for line in left_out)


@pytest.mark.slow
def test_ratios_to_a_saved_result_stand_below_the_table(run: Run, whole: Whole) -> None:
    ran = run("bench", "--model", "demo", *QUICK, "--resolution", 64, "--compare", whole.saved)
    assert ran.code == 0
    assert "ratio: now / saved, of medians of runs apart" in ran.out


@pytest.mark.slow
def test_a_cold_start_is_measured_in_processes_of_its_own_part_by_part(run: Run) -> None:
    ran = run("bench", "--model", "demo", *QUICK, "--resolution", 64, "--cold", 2, "--json")
    once = Report.from_json(json.loads(ran.out)).once
    parts = ("start", "command_import", "engine_import", "open", "weights", "first_answer")
    series = [once[f"cold_{part}_ms"].values for part in parts]
    for total, *split in zip(once["cold_ttft_ms"].values, *series, strict=True):
        assert total == pytest.approx(sum(split))
    assert once["cold_ttft_ms"].n == 2


@pytest.mark.skipif(find_spec("mlx_vlm") is not None, reason="mlx-vlm is installed here")
def test_mlx_vlm_that_is_not_there_is_refused_before_weights_are_written(run: Run) -> None:
    message = run("bench", "--size", "7b", "--compare", "mlx-vlm").refused()
    assert "--peer-python" in message


def test_a_result_without_a_case_of_this_run_is_refused_before_measuring(
    run: Run, whole: Whole
) -> None:
    ran = run(
        "bench", "--model", "demo", "--runs", 100_000, "--resolution", 192,
        "--compare", whole.saved,
    )  # fmt: skip
    assert "no case of this run" in ran.refused() and "128 px, 1 image" in ran.err


def test_a_baseline_without_a_case_of_this_run_is_refused_before_measuring(
    run: Run, whole: Whole
) -> None:
    """Memory after loading is in both: alone it is no success."""
    options = ("--runs", 100_000, "--resolution", 192, "--check", whole.saved)
    assert (
        "no case of this run is in the result"
        in run("bench", "--model", "demo", *options).refused()
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--size", "demo"), "a real model's there, random, seed 0 here"),
        (("--model", "demo", "--low-memory"), "plain there, --low-memory here"),
        (("--model", "demo", "--paired-heads"), "plain there, --paired-heads here"),
    ],
)
def test_a_baseline_of_other_weights_is_refused_before_measuring(
    run: Run, whole: Whole, options: tuple[str, ...], what: str
) -> None:
    rest = ("--runs", 100_000, "--max-tokens", 4, "--resolution", 64, "--check", whole.saved)
    assert what in run("bench", *options, *rest).refused()


def test_of_a_sweeps_result_the_matching_model_is_the_baseline(
    run: Run, whole: Whole, tmp_path: Path
) -> None:
    card = dataclasses.replace(whole.report.model, name="other", fingerprint="f00")
    other = dataclasses.replace(whole.report, model=card)
    slow = doctored(whole.report, 1e4).to_json()
    path = written(tmp_path / "sweep.json", other, more=[slow])
    ran = run("bench", "--model", "demo", *QUICK, "--resolution", 64, "--check", path)
    assert ran.code == 0, ran.err
    assert "no worse than the baseline" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", "250"), "250 is no multiple of 64"),
        (("--resolution", "256,,512"), "'' is not a valid integer"),
        (("--prompt", "none"), "unknown prompt 'none'"),
        (("--images", "0"), "0 is not in the range"),
        (("--runs", "0"), "0 is not in the range"),
        (("--size", "3b"), "'3b' is not one of"),
        (("--size", "demo", "--bits", "5"), "'5' is not one of"),
        (("--bits", "4"), "--bits needs --size"),
        (("--seed", "0"), "--seed needs --size"),
        (("--compare", "mlx_vlm"), "did you mean mlx-vlm?"),
        (("--size", "demo", "--model", "demo"), "leave out --model"),
        (("--size", "demo", "--vision-from", "x"), "leave out --vision-from"),
        (("--sweep", "quantization"), "needs --size"),
        (("--sweep", "quantization", "--size", "demo", "--bits", "4"), "leave out --bits"),
        (("--peer-python", sys.executable), "needs --compare mlx-vlm"),
        (("--compare", "mlx-vlm", "--peer-python", "none"), "'none' does not exist"),
        (("--compare", "mlx-vlm", "--paired-heads"), "leave out --paired-heads"),
        (("--compare", "mlx-vlm", "--vision-from", "demo"), "leave out --vision-from"),
        (("--compare", "mlx-vlm", "--check", "none.json"), "leave out one of them"),
        (("--cold-files",), "--cold-files needs --cold"),
        (("--cold-files", "--cold", "1", "--compare", "mlx-vlm"), "not done with --compare"),
        (
            ("--model", "demo", "--vision-from", "demo"),
            "has its own tower: leave out --vision-from",
        ),
        (("--tolerance", "0.1"), "needs --check"),
        (("--check", "none.json", "--runs", "2"), "--check needs --runs 3 or more"),
        (("--compare", "none.json"), "none.json: no such file"),
        (("--compare", ""), "--compare needs"),
        (("--check", "none.json"), "none.json: no such file"),
        (("--save", "a", "--csv", "./a"), "name the same file"),
        (("--save", "a", "--check", "a"), "would replace the baseline"),
        (("--save", "none/a.json"), "its folder is missing"),
        (("--csv", "."), "it is a folder"),
        (("--model", "./nowhere"), "nowhere"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run("bench", *arguments).refused()
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_of_another_machine_is_refused_before_measuring(
    run: Run, whole: Whole, tmp_path: Path
) -> None:
    """A thousand runs would take minutes: the refusal comes from the cards alone."""
    other = made_machine(chip="Apple M9 Example", device=whole.report.machine.device)
    path = written(tmp_path / "other.json", dataclasses.replace(whole.report, machine=other))
    case = ("--resolution", 64, "--max-tokens", 4)
    ran = run("bench", "--model", "demo", "--runs", 100_000, *case, "--check", path)
    assert "another chip: Apple M9 Example there" in ran.refused()


def test_a_case_that_does_not_fit_the_model_is_refused_before_measuring(run: Run) -> None:
    ran = run("bench", "--model", "demo", "--runs", 100_000, "--prompt", "short,100000 words")
    assert "do not fit this model's context" in ran.refused()


def test_a_file_that_is_no_result_is_not_replaced(run: Run, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8\xff")
    assert "choose another name" in run("bench", "--save", photo).refused()
    assert photo.read_bytes() == b"\xff\xd8\xff"


def test_a_made_up_report_of_another_model_is_no_baseline(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path / "made.json", made_report())
    case = ("--resolution", 512, "--max-tokens", 64)
    assert "another" in run("bench", "--model", "demo", *case, "--check", path).refused()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_no_file(tmp_path: Path) -> None:
    process = spawn(
        "-v", "bench", "--model", "demo", "--runs", 100_000, "--save", tmp_path / "a.json",
        "--plots", tmp_path / "plots",
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if b"run 1 of 100000" in line:
            break
    process.send_signal(signal.SIGINT)
    ran = wait(process)
    assert ran.code == 130 and ran.out == "" and "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("bench", "--help"), ("bench", "--bits", "4")])
def test_help_and_mistakes_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from fastvlm_mlx.cli.main import main; main(sys.argv[1:])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "click" in loaded
    assert not loaded & {"mlx", "numpy", "matplotlib", "PIL", "tokenizers"}
