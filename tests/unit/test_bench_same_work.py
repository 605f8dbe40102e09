"""Nobody is asked what another cannot answer, and nobody's figures, cards or files are guessed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_peer import MACHINE, asked, scripted
from test_bench_compare import CASE, SUBJECT, no_process_left

from benchmarks.comparison_table import markdown
from fastvlm_mlx.bench import compare as comparing
from fastvlm_mlx.bench.baseline import check
from fastvlm_mlx.bench.compare import Comparison, compare
from fastvlm_mlx.bench.file_cache import file_cache_state, weight_files
from fastvlm_mlx.bench.peer import Work
from fastvlm_mlx.bench.peer_mlx_vlm import CHUNK, MlxVlm
from fastvlm_mlx.bench.peer_runtime import Contender
from fastvlm_mlx.bench.ratios import comparison_table, differences
from fastvlm_mlx.bench.results import STAGES, Report, Series
from fastvlm_mlx.bench.turns import Plan
from fastvlm_mlx.errors import FastVLMError

pytestmark = pytest.mark.slow  # many small ones: left to `make test`


def run(contenders: list[Contender], **plan: Any) -> Comparison:
    chosen = {"rounds": 2, "warm_up_runs": 0, "second_turns": 2} | plan
    return compare(contenders, SUBJECT, [CASE], Plan(**chosen))


# What not all can be asked


@pytest.mark.parametrize(
    ("request_", "figure", "absent"),
    [
        ("second_turn", "second turn", {"second_turn_ttft_ms"}),
        ("profile", "stages", {*STAGES, "paper_ttft_ms"}),
    ],
)
def test_what_one_cannot_be_asked_nobody_is_and_a_note_says_why(
    tmp_path: Path, request_: str, figure: str, absent: set[str]
) -> None:
    ours = scripted(tmp_path, "ours")
    theirs = scripted(tmp_path, "theirs", cannot={request_: "too much"})
    whole = run([ours, scripted(tmp_path, "able")])
    found = run([ours, theirs])
    assert not {f"theirs {request_}"} & set(asked(tmp_path, request_))
    for report in found.reports:
        assert whole.reports[0].cases[0].series.keys() - report.cases[0].series.keys() == absent
    note = f"{CASE.name}: no {figure}, as not all can be asked (theirs: too much)"
    assert found.notes == (note,) and whole.notes == ()
    assert found.to_json()["notes"] == [note]
    assert f"- {note}" in markdown(found, {})


def test_what_nobody_wanted_is_no_note(tmp_path: Path) -> None:
    theirs = scripted(tmp_path, "theirs", cannot={"second_turn": "no", "profile": "no"})
    assert run([theirs, theirs], second_turns=0, profiled_rounds=0).notes == ()


class _Config:
    patch_size = 32


class _Model:
    class config:  # noqa: N801  (as theirs is called)
        vision_config = _Config


@pytest.mark.parametrize(
    ("pictures", "words", "cannot"),
    [
        (1, 10, set()),
        (2, 10, {"second_turn"}),
        (1, CHUNK - 4 + 1, set()),
        (1, CHUNK - 4 + 2, {"profile"}),
        (2, CHUNK, {"second_turn", "profile"}),
    ],
)
def test_mlx_vlm_says_what_it_cannot_be_asked_by_its_own_sizes(
    monkeypatch: pytest.MonkeyPatch, pictures: int, words: int, cannot: set[str]
) -> None:
    """A picture of 64 pixels is 4 positions of 32: a prompt of CHUNK just fits."""
    peer = MlxVlm()
    peer.model = _Model()
    inputs = {
        "input_ids": np.zeros((1, words), int),
        "pixel_values": np.zeros((pictures, 3, 64, 64)),
    }
    monkeypatch.setattr(MlxVlm, "_inputs", lambda *_: inputs)
    work = Work(
        pictures=("a.jpg",) * pictures, prompt="short", question="?", follow_up="?",
        resolution=64, max_tokens=1, first_answer_tokens=1,
    )  # fmt: skip
    shown = peer.show(work)
    assert shown.cannot.keys() == cannot and len(shown.pixels) == pictures


# Who alone is left


@pytest.mark.parametrize("at", ["load", "show", "ttft"])
def test_without_anybody_to_compare_with_it_ends_in_their_own_line(tmp_path: Path, at: str) -> None:
    """Measuring ours alone for an hour was once what came of a peer that could not load."""
    bad = scripted(tmp_path, "theirs", at=at, do="raise MemoryError('full')")
    with pytest.raises(FastVLMError, match=rf"^theirs cannot {at}: MemoryError: full$"):
        compare(
            [scripted(tmp_path, "ours"), bad],
            SUBJECT,
            [CASE],
            Plan(rounds=100_000, warm_up_runs=0),
            dropped=lambda name, error: pytest.fail(f"{name} was dropped: {error}"),
        )
    assert no_process_left(tmp_path)


# The same work


@pytest.mark.parametrize(
    ("changed", "plan", "said"),
    [
        ({"ids": [5, 6]}, {}, "theirs answered 2 tokens where 3 were asked for"),
        ({"again": [1, 2]}, {}, "theirs answered 2 tokens where 1 were asked for"),
    ],
)
def test_an_answer_of_another_length_is_no_measurement(
    tmp_path: Path, changed: dict[str, Any], plan: dict[str, Any], said: str
) -> None:
    contenders = [scripted(tmp_path, "ours"), scripted(tmp_path, "theirs", **changed)]
    with pytest.raises(FastVLMError, match=f"^{said}$"):
        run(contenders, **plan)
    assert no_process_left(tmp_path)


def test_a_cold_answer_of_another_length_is_none_either(tmp_path: Path) -> None:
    case = dataclasses.replace(CASE, max_tokens=4)
    with pytest.raises(FastVLMError, match=r"^ours answered 3 tokens where 4 were asked for$"):
        run([scripted(tmp_path, "ours")], cold_runs=1, cold=case)


def test_a_pictures_positions_are_by_the_models_own_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(SUBJECT.config.vision), "tokens", lambda *_: 7)
    (report,) = run([scripted(tmp_path, "ours")]).reports
    assert report.cases[0].image_tokens == 7


def test_weights_held_unpacked_are_said_and_are_a_difference(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", unpacked=True)
    mine, theirs = run([ours, scripted(tmp_path, "theirs")]).reports
    assert list(differences(mine, theirs)) == ["weights in memory: unpacked against as stored"]
    assert "not the same: weights in memory: unpacked" in comparison_table(
        mine, theirs, interleaved=True
    )
    assert Report.from_json(mine.to_json()).model.unpacked


# Whose card


def test_what_a_runtime_computes_with_is_its_own_to_say(tmp_path: Path) -> None:
    card = MACHINE | {"chip": "Chip", "blas": "OpenBLAS of ours", "backend": "ours", "mlx": "9"}
    ours = scripted(tmp_path, "ours", machine=card)
    silent = scripted(tmp_path, "silent", machine={})
    telling = scripted(tmp_path, "telling", machine={"blas": "its own"})
    cards = [report.machine for report in run([ours, silent, telling]).reports]
    assert [card.chip for card in cards] == ["Chip"] * 3
    assert [card.blas for card in cards] == ["OpenBLAS of ours", "", "its own"]
    assert [card.backend for card in cards] == ["ours", "", ""]
    assert [card.mlx for card in cards] == ["9", "", ""]


# Loading and starting


def stored(folder: Path) -> Any:
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(bytes(1 << 16))
    weights = dataclasses.replace(SUBJECT.weights, folder=folder / "model")
    return dataclasses.replace(SUBJECT, weights=weights)


def test_the_weights_are_read_before_each_load_and_their_state_is_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = stored(tmp_path)
    order: list[str] = []
    real = comparing.read_through

    def read(paths: list[Path]) -> None:
        log = tmp_path / "log"
        loads = asked(tmp_path, "load") if log.exists() else []
        order.append(f"{len(loads)} loads, then {paths[0].name}")
        real(paths)

    monkeypatch.setattr(comparing, "read_through", read)
    plan = Plan(rounds=1, warm_up_runs=0, cold_runs=1)
    both = [scripted(tmp_path, "ours"), scripted(tmp_path, "theirs")]
    report, _ = compare(both, subject, [CASE], plan).reports
    assert order == [f"{loads} loads, then model.safetensors" for loads in range(4)]
    assert report.settings.file_cache == file_cache_state(weight_files(subject.weights.folder))


def test_files_that_were_not_found_alike_before_each_load_are_in_no_known_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(("warm", "cold"))
    monkeypatch.setattr(comparing, "file_cache_state", lambda _: next(states))
    plan = Plan(rounds=1, warm_up_runs=0, cold_runs=1)
    (report,) = compare([scripted(tmp_path, "ours")], stored(tmp_path), [CASE], plan).reports
    assert report.settings.file_cache == "unknown"


def test_a_comparisons_cold_start_is_no_baseline_of_the_commands(tmp_path: Path) -> None:
    """One is of the API, the other of `fastvlm generate`: they share no figure's name."""
    (before,) = run([scripted(tmp_path, "ours")], cold_runs=1).reports
    assert {name for name in before.once if "cold" in name} == {
        f"api_cold_{part}_ms"
        for part in ("ttft", "overhead", "start", "import", "weights", "first_answer")
    }
    once = {"load_ms": before.once["load_ms"], "cold_ttft_ms": Series("ms", (1e9,))}
    found = check(dataclasses.replace(before, once=once), before)
    assert found.regressions == ()
    assert "once a process: api cold ttft (not measured now)" in found.missing


# The table


def test_targets_are_judged_by_mlx_vlm_alone(tmp_path: Path) -> None:
    ours = scripted(tmp_path, "ours", ttft=[75.0])
    torch = scripted(tmp_path, "transformers", ttft=[750.0])
    without = markdown(run([ours, torch], rounds=1, second_turns=1), {"mlx-vlm": "out"})
    assert "| met |" not in without and "| missed |" not in without
    peer = scripted(tmp_path, "mlx-vlm", ttft=[50.0])
    rows = markdown(run([ours, torch, peer], rounds=1, second_turns=1), {}).splitlines()
    (ttft,) = [row for row in rows if row.startswith("| TTFT |")]
    assert ttft == "| TTFT | 75.0 ms | 750 ms | 50.0 ms | 0.10 | 1.50 | ≤ 0.75 | missed |"
