"""Result files: refused before measuring, written whole, never over what is not ours."""

from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import pytest
from bench_reports import made_case, made_report

from fastvlm_mlx.bench import files
from fastvlm_mlx.bench.spreadsheet import CSV_COLUMNS, csv_rows
from fastvlm_mlx.errors import FastVLMError


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(FastVLMError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_report_is_read_back_equal(tmp_path: Path) -> None:
    report, path = made_report(made_case(256), made_case(512)), tmp_path / "result.json"
    files.write_json(path, report.to_json())
    assert files.read_reports(path) == (report,)
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweeps_result_is_read_back_as_a_report_a_model(tmp_path: Path) -> None:
    one, two, path = made_report(), made_report(quantization="8"), tmp_path / "result.json"
    files.write_json(path, one.to_json() | {"more": [two.to_json()]})
    assert files.read_reports(path) == (one, two)


def test_a_result_may_be_read_by_others_as_any_file(tmp_path: Path) -> None:
    """Session files are private; a benchmark's result is not."""
    path = tmp_path / "result.json"
    before = os.umask(0o022)
    try:
        files.write_json(path, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_csv_file_has_the_columns_and_a_line_a_figure(tmp_path: Path) -> None:
    report, path = made_report(), tmp_path / "result.csv"
    files.write_csv(path, csv_rows(report))
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 1 + len(report.cases[0].series)


def test_a_failed_write_leaves_the_old_result_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, made_report().to_json())
    old = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"value": float("nan")})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_place_that_could_not_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert "it is a folder" in refusal(files.require_place, folder, ".json")
    assert "its folder is missing" in refusal(files.require_place, tmp_path / "no/a.json", ".json")
    file = tmp_path / "file"
    file.write_text("")
    assert "its folder is a file" in refusal(files.require_place, file / "a.json", ".json")
    assert "is a file" in refusal(files.require_folder, file)
    assert "its folder is missing" in refusal(files.require_folder, tmp_path / "no" / "plots")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_beforehand(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "no permission" in refusal(files.require_place, tmp_path / "a.json", ".json")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder of Linux that takes no files")
def test_a_folder_that_takes_no_files_is_not_called_missing() -> None:
    message = refusal(files.require_place, "/proc/x.csv", ".csv")
    assert message.startswith("/proc/x.csv cannot be written: ") and "missing" not in message


def test_only_an_empty_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    assert files.require_folder(folder) and not files.require_folder(folder)
    (folder / "mine").touch()
    files.remove_if_empty(folder)
    assert folder.is_dir()
    (folder / "mine").unlink()
    files.remove_if_empty(folder)
    assert not folder.exists()


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_only_results_and_empty_files_are_replaced(tmp_path: Path, suffix: str) -> None:
    photo = tmp_path / f"photo{suffix}"
    photo.write_bytes(b"\xff\xd8\xff a photograph")
    message = refusal(files.require_place, photo, suffix)
    assert "choose another name" in message
    assert photo.read_bytes().endswith(b"a photograph")
    ours = tmp_path / f"ours{suffix}"
    files.require_place(ours, suffix)
    ours.touch()
    files.require_place(ours, suffix)
    if suffix == ".json":
        files.write_json(ours, made_report().to_json())
    else:
        files.write_csv(ours, csv_rows(made_report()))
    files.require_place(ours, suffix)
    assert sorted(tmp_path.iterdir()) == sorted([photo, ours])


def test_trying_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    files.require_place(tmp_path / "a.json", ".json")
    files.require_folder(tmp_path / "plots")
    assert [path.name for path in tmp_path.rglob("*")] == ["plots"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no result"),
        ("{}", "no result"),
        (json.dumps({"schema": 99}), "schema 99"),
        (json.dumps(made_report().to_json() | {"cases": [{}]}), "no result"),
        (json.dumps(made_report().to_json() | {"machine": {"chip": "x"}}), "no result"),
        (json.dumps(made_report().to_json() | {"more": 1}), "no result"),
        (json.dumps(made_report().to_json() | {"more": [{}]}), "no result"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    message = refusal(files.read_reports, path)
    assert "some.json" in message and what in message
    assert "Error" not in message, "Python's own words tell a user nothing"


def test_a_missing_file_a_folder_and_a_pipe_are_no_results(tmp_path: Path) -> None:
    assert "no such file" in refusal(files.read_reports, tmp_path / "none.json")
    assert "cannot be read" in refusal(files.read_reports, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read" in refusal(files.read_reports, tmp_path / "pipe")
