"""Runtimes take turns on the same work, and a ratio says what was measured side by side."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import asked, processes, scripted

from benchmarks.comparison_table import markdown
from fastvlm_mlx.bench import peer_runtime
from fastvlm_mlx.bench.compare import Comparison, compare, compare_with_earlier, same_ids
from fastvlm_mlx.bench.peer_runtime import OURS, Contender, Weights, mlx_vlm
from fastvlm_mlx.bench.results import STAGES, Case, Report
from fastvlm_mlx.bench.subject import Subject, stored_subject, synthetic_subject
from fastvlm_mlx.bench.turns import Plan, rotated
from fastvlm_mlx.config import PRESETS
from fastvlm_mlx.errors import FastVLMError

CASE = Case(resolution=64, images=1, prompt="short", max_tokens=3)
SUBJECT = Subject(
    weights=Weights(folder=Path("weights"), dtype="float32", device="cpu"),
    config=PRESETS["0.5b"],
    name="scripted",
    synthetic=True,
    quantization="16",
)


def run(contenders: list[Contender], **plan: Any) -> Comparison:
    return compare(contenders, SUBJECT, [CASE], Plan(**{"rounds": 3, "warm_up_runs": 0} | plan))


def no_process_left(folder: Path) -> bool:
    """Whether every child that ever loaded is gone and waited for."""
    pids = {int(line.split()[2]) for line in (folder / "log").read_text().splitlines()}
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return bool(pids)


def ratios(found: Comparison, figure: str) -> dict[str, Any]:
    (of,) = found.to_json()["ratios"].values()
    row: dict[str, Any] = (of[CASE.name] | of["once"])[figure]
    return row


def test_a_ratio_is_the_median_over_rounds_of_what_was_measured_side_by_side(
    tmp_path: Path,
) -> None:
    ours = scripted(tmp_path, "ours", ttft=[10.0, 20.0, 30.0])
    theirs = scripted(tmp_path, "theirs", ttft=[20.0, 80.0, 60.0])
    found = run([ours, theirs])
    assert ratios(found, "ttft_ms") == {"median": 0.5, "lowest": 0.25, "highest": 0.5, "rounds": 3}
    assert [report.runtime for report in found.reports] == ["ours 1", "theirs 1"]
    assert found.interleaved
    assert no_process_left(tmp_path)


def test_another_one_is_first_in_each_round_and_each_computes_alone(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    run([scripted(tmp_path, name) for name in names], rounds=4, second_turns=2, profiled_rounds=1)
    kinds = ("ttft", "profile", "second_turn")
    whole = [f"{name} {kind}" for name in "abc" for kind in kinds]
    turned = [f"{name} {kind}" for name in "bca" for kind in ("ttft", "second_turn")]
    assert asked(tmp_path, *kinds) == [
        *whole,
        *turned,
        *(f"{name} ttft" for name in "cab"),
        *(f"{name} ttft" for name in "abc"),
    ]


def test_rotating_goes_round_and_round() -> None:
    assert [rotated("ab", number) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_warm_up_is_asked_and_forgotten(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", ttft=[1000.0, 1000.0, 10.0])
    theirs = scripted(tmp_path, "theirs", ttft=[9.0, 9.0, 20.0])
    found = run([ours, theirs], rounds=2, warm_up_runs=2)
    assert ratios(found, "ttft_ms")["highest"] == 0.5
    assert len(asked(tmp_path, "ttft")) == 8


def test_a_cold_start_is_a_process_of_its_own_and_its_overhead_no_reading_and_no_answer(
    tmp_path: Path,
) -> None:
    found = run([scripted(tmp_path, "ours"), scripted(tmp_path, "theirs")], rounds=1, cold_runs=2)
    for name, report in zip(("ours", "theirs"), found.reports, strict=True):
        assert len(set(processes(tmp_path, name))) == 3
        once = {figure: series.values for figure, series in report.once.items()}
        assert once["load_ms"] == (6.0,)  # 5 and the cast
        for run_number in range(2):
            start_ms = once["api_cold_start_ms"][run_number]
            assert start_ms > 0
            # Imports 2, loading 5, of which weights are 4, a cast 1; an answer of 10.
            assert once["api_cold_overhead_ms"][run_number] == pytest.approx(start_ms + 3)
            assert once["api_cold_weights_ms"][run_number] == 5
            assert once["api_cold_ttft_ms"][run_number] == pytest.approx(start_ms + 2 + 5 + 1 + 10)
    assert no_process_left(tmp_path)


def test_what_was_not_the_same_is_said(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", pixels=["a", "b"])
    theirs = scripted(tmp_path, "theirs", pixels=["a", "c"], prompt=[1, 3, 2], ids=[5, 6, 8])
    found = run([ours, theirs], rounds=1)
    assert found.agreement == {
        "theirs 1": (
            f"{CASE.name}: prompt parts at id 2 of 3: a picture in ours, 3 in theirs",
            f"{CASE.name}: other pixels in picture 2",
            f"{CASE.name}: answer parts at id 3 of 3: 7 in ours, 8 in theirs",
        )
    }


def test_equal_ids_are_counted() -> None:
    assert same_ids("answer", [5, 6], [5, 6]) == "same answer, 2 ids"


def test_one_that_fails_ends_the_comparison_in_one_line_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    bad = scripted(tmp_path, "theirs", at="ttft", after=1, do="raise ValueError('no\\nroom')")
    with pytest.raises(FastVLMError, match=r"^theirs cannot ttft: ValueError: no$"):
        run([scripted(tmp_path, "ours"), bad])
    assert no_process_left(tmp_path)


def test_one_that_fails_is_left_out_if_it_may_be_and_keeps_the_rounds_it_had(
    tmp_path: Path,
) -> None:
    dropped: list[tuple[str, str]] = []
    contenders = [
        scripted(tmp_path, "ours"),
        scripted(tmp_path, "dies", at="ttft", after=2, do="os._exit(7)"),
        scripted(tmp_path, "refuses", at="load", do="raise MemoryError('full')"),
        scripted(tmp_path, "stays", ttft=[40.0]),
    ]
    found = compare(
        contenders,
        SUBJECT,
        [CASE],
        Plan(rounds=3, warm_up_runs=0, cold_runs=1),
        dropped=lambda name, error: dropped.append((name, str(error))),
    )
    assert dropped == [
        ("refuses", "refuses cannot load: MemoryError: full"),
        ("dies", "dies ended with exit code 7 when it was to ttft"),
    ]
    assert {r.runtime: r.cases[0].series["ttft_ms"].n for r in found.reports} == {
        "ours 1": 3,
        "dies 1": 2,
        "stays 1": 3,
    }
    assert [len(processes(tmp_path, name)) for name in ("ours", "dies", "stays")] == [2, 1, 2]
    assert no_process_left(tmp_path)


def test_ours_is_never_left_out(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", at="profile", do="os._exit(7)")
    with pytest.raises(FastVLMError, match=r"^ours ended with exit code 7"):
        compare(
            [ours, scripted(tmp_path, "theirs")],
            SUBJECT,
            [CASE],
            Plan(rounds=1, warm_up_runs=0),
            dropped=lambda name, error: pytest.fail(f"{name} was dropped: {error}"),
        )
    assert no_process_left(tmp_path)


def test_nothing_to_compare_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match="nothing is compared"):
        run([scripted(tmp_path, "ours")], rounds=0)
    assert not (tmp_path / "log").exists()


def test_without_mlx_vlm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_runtime, "find_spec", lambda _: None)
    with pytest.raises(FastVLMError, match=r"--peer-python .*pip install mlx-vlm") as raised:
        mlx_vlm(None)
    assert "\n" not in str(raised.value)
    assert mlx_vlm(Path("python")).python == Path("python")


def test_the_table_of_peers_judges_each_target_by_mlx_vlm(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", ttft=[75.0])
    found = run([ours, scripted(tmp_path, "mlx-vlm", ttft=[100.0])], rounds=1, second_turns=1)
    rows = {line.split(" | ")[0]: line for line in markdown(found, {"x": "gone"}).splitlines()}
    assert rows["| TTFT"] == "| TTFT | 75.0 ms | 100 ms | 0.75 | ≤ 0.75 | met |"
    assert rows["| second turn TTFT"].endswith("| 1.00 | ≤ 0.1 | missed |")
    assert rows["| decode"].endswith("| 1.00 | ≥ 1 | met |")
    assert rows["| vision"].endswith("| 1.00 |  |  |")
    assert "- mlx-vlm 1: same prompt, 3 ids; same pixels; same answer, 3 ids" in rows
    assert "- x failed: gone" in rows


# Beside an earlier result


def report(tmp_path: Path) -> Report:
    return run([scripted(tmp_path, "ours")], rounds=2).reports[0]


def test_an_earlier_result_gives_ratios_of_medians_that_are_not_of_rounds(tmp_path: Path) -> None:
    ours = report(tmp_path)
    found = compare_with_earlier(ours, Report.from_json(ours.to_json()))
    assert not found.interleaved
    assert ratios(found, "ttft_ms") == {
        "median": 1.0,
        "lowest": None,
        "highest": None,
        "rounds": 2,
    }


@pytest.mark.parametrize(
    ("part", "changed", "why"),
    [
        ("model", {"dtype": "bfloat16"}, "its dtype is bfloat16, not float32"),
        ("model", {"name": "other"}, "its model is other, not scripted"),
        ("model", {"quantization": "4"}, "its quantization is 4, not 16"),
        ("model", {"fingerprint": "f00"}, "its weights' fingerprint is f00, not unknown"),
        ("settings", {"inputs": {"prompt short": "0"}}, "its prompt short is 0, not "),
    ],
)
def test_an_earlier_result_of_other_work_is_refused(
    tmp_path: Path, part: str, changed: dict[str, Any], why: str
) -> None:
    ours = report(tmp_path)
    other = dataclasses.replace(ours, **{part: dataclasses.replace(getattr(ours, part), **changed)})
    for mine in (ours, dataclasses.replace(ours, cases=())):  # before measuring, too
        with pytest.raises(FastVLMError) as raised:
            compare_with_earlier(mine, other)
        assert str(raised.value).startswith(f"the earlier result cannot be compared: {why}")
        assert "\n" not in str(raised.value)


def test_an_earlier_result_without_a_common_case_is_refused(tmp_path: Path) -> None:
    ours = report(tmp_path)
    with pytest.raises(FastVLMError, match="it has none of these cases"):
        compare_with_earlier(ours, dataclasses.replace(ours, cases=()))


# The real engine


@pytest.mark.slow
def test_our_engine_beside_itself_does_the_same_work(tmp_path: Path) -> None:
    again = Contender("again", OURS.file)
    case = Case(resolution=128, images=2, prompt="20 words", max_tokens=6)
    subject = stored_subject("demo", dtype="float32", device="cpu")
    plan = Plan(rounds=2, second_turns=1, profiled_rounds=1, cold_runs=1)
    found = compare([OURS, again], subject, [case], plan)
    ours, other = found.reports
    ((prompt, pixels, answer),) = found.agreement.values()
    assert prompt.startswith(f"{case.name}: same prompt, ")
    assert pixels == f"{case.name}: same pixels"
    assert answer == f"{case.name}: same answer, 6 ids"
    assert {"ttft_ms", "decode_tps", "peak_bytes", *STAGES} <= ours.cases[0].series.keys()
    assert ours.cases[0].series["ttft_ms"].n == 2
    assert ours.cases[0].series["second_turn_ttft_ms"].n == 1
    assert ours.cases[0].image_tokens == 8
    assert (ours.model.parameters, ours.model.fingerprint) == (
        other.model.parameters,
        other.model.fingerprint,
    )
    assert Report.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.slow
def test_mlx_vlm_gives_the_same_answer_from_the_same_folder(tmp_path: Path) -> None:
    """Where mlx-vlm is installed: real sizes at the smallest side, so some 5 GB and a minute."""
    pytest.importorskip("mlx_vlm")
    case = Case(resolution=128, images=1, prompt="short", max_tokens=4)
    with synthetic_subject("0.5b", 16, dtype="float32", device="cpu") as subject:
        found = compare(
            [OURS, mlx_vlm(None)], subject, [case], Plan(rounds=1, warm_up_runs=0, second_turns=1)
        )
    ((prompt, pixels, answer),) = found.agreement.values()
    assert prompt.startswith(f"{case.name}: same prompt, ")
    assert pixels == f"{case.name}: same pixels"
    assert answer == f"{case.name}: same answer, 4 ids"
    theirs = found.reports[1].cases[0].series
    assert {"ttft_ms", "second_turn_ttft_ms", *STAGES} <= theirs.keys()
