"""The command that compares all runtimes: refused before it measures, its files written whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import scripted
from test_bench_compare import SUBJECT

from benchmarks import compare_all


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run it with scripted runtimes and weights that nobody writes; return code, stdout, stderr."""

    class Weights:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return SUBJECT

        def __exit__(self, *_: Any) -> None:
            pass

    def run(*words: Any, **script: Any) -> tuple[int, str, str]:
        ids = {"ids": [1, 2]} | script
        ours, peer = scripted(tmp_path, "ours", ids=[1, 2]), scripted(tmp_path, "mlx-vlm", **ids)
        monkeypatch.setattr(compare_all, "OURS", ours)
        monkeypatch.setattr(compare_all, "mlx_vlm", lambda _: peer)
        monkeypatch.setattr(compare_all, "synthetic_subject", Weights)
        once = ("--max-tokens", 2, "--resolution", 64, "--rounds", 1, "--cold", 1)
        monkeypatch.setattr(sys, "argv", ["compare_all", *map(str, (*once, *words))])
        code = compare_all.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_both_files_are_written_and_the_table_is_printed(call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    code, out, _ = call("--out", folder / "peers.json")
    assert code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["peers.json", "peers.md"]
    assert out.startswith((folder / "peers.md").read_text())
    values = json.loads((folder / "peers.json").read_text())
    assert [report["runtime"] for report in values["reports"]] == ["ours 1", "mlx-vlm 1"]
    assert json.loads(out.splitlines()[-1])["mlx-vlm 1"]["ttft_ms"] == 1
    code, *_ = call("--out", folder / "peers.json")
    assert code == 0, "results of its own are replaced"


@pytest.mark.parametrize("out", ["none/peers.json", ".", "peers.md", "photo.json"])
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_measured(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.json").write_bytes(b"\xff\xd8\xff")
    code, printed, said = call("--out", out)
    assert (code, printed) == (2, "")
    assert said.startswith("compare_all: error: ") and said.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_a_failure_is_one_line_and_leaves_the_old_results(call: Any, tmp_path: Path) -> None:
    place = tmp_path / "peers.json"
    place.write_text('{"old": 1}')
    code, out, said = call("--out", place, at="load", do="raise MemoryError('full')")
    assert (code, out) == (2, "") and "Traceback" not in said
    assert said.splitlines()[-1] == ("compare_all: error: mlx-vlm cannot load: MemoryError: full")
    assert place.read_text() == '{"old": 1}' and not (tmp_path / "peers.md").exists()
