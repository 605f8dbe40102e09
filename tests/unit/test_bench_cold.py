"""A cold start: a fresh process of the real command each run, its parts in order and complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.bench import cold
from fastvlm_mlx.bench.cold import cold_start, parts
from fastvlm_mlx.bench.file_cache import file_cache_state, forget
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.errors import FastVLMError

CASE = Case(resolution=64, images=1, prompt="short", max_tokens=9)
PARTS = {name for name, _, _ in cold._PARTS}


def test_each_run_is_a_process_of_its_own_and_every_part_has_a_value_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    found = cold_start("demo", CASE, runs=2, loading={"dtype": "float32"}, say=said.append)
    assert len(commands) == len(said) == 2
    assert all(command[0] == sys.executable for command in commands)
    assert commands[0][-2:] == ["--resolution", "64"]
    assert found.series.keys() == PARTS | {"cold_ttft_ms", "cold_overhead_ms"}
    assert {series.n for series in found.series.values()} == {2}
    assert all(min(series.values) > 0 for series in found.series.values())
    for run_number in range(2):
        each = {name: series.values[run_number] for name, series in found.series.items()}
        assert sum(each[name] for name in PARTS) == pytest.approx(each["cold_ttft_ms"])
        compute = each["cold_weights_ms"] + each["cold_first_answer_ms"]
        assert each["cold_overhead_ms"] + compute == pytest.approx(each["cold_ttft_ms"])


def test_parts_are_named_times_between_what_was_passed() -> None:
    names = ["spawned", *(end for _, _, end in cold._PARTS)]
    took = parts({name: float(2**place) for place, name in enumerate(names)})
    assert [took[name] for name, _, _ in cold._PARTS] == [1000, 2000, 4000, 8000, 16000, 32000]
    assert took["cold_ttft_ms"] == 63000
    assert took["cold_overhead_ms"] == 15000


def test_the_child_imports_nothing_the_command_would_not() -> None:
    """What the watching adds is in the standard library."""
    code = (
        "import sys; import fastvlm_mlx.bench.cold_child;"
        "print(*(n for n in sys.modules if n.startswith(('fastvlm_mlx.', 'mlx', 'numpy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = set(done.stdout.split()) - {"fastvlm_mlx._blas"}
    assert extra == {"fastvlm_mlx.bench", "fastvlm_mlx.bench.cold_child"}


def test_a_run_that_fails_says_the_commands_own_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FastVLMError, match=r"exit code 2.*model type None") as error:
        cold_start(tmp_path, CASE, runs=1)
    assert "\n" not in str(error.value)


def test_no_runs_are_refused() -> None:
    with pytest.raises(FastVLMError, match="at least once"):
        cold_start("demo", CASE, runs=0)


def test_only_a_system_that_can_is_asked_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(FastVLMError, match="only Linux"):
        forget([Path(__file__)])


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise")
def test_a_forgotten_file_is_whole_and_no_longer_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    content = os.urandom(1 << 20)
    file.write_bytes(content)
    if file_cache_state([file]) != "warm":
        pytest.skip("this file system keeps nothing in memory, or does not say")
    forget([file])
    state = file_cache_state([file])
    assert file.read_bytes() == content
    if _is_memory(tmp_path):
        pytest.skip("a file system in memory forgets nothing")
    assert state == "cold"


def _is_memory(folder: Path) -> bool:
    done = subprocess.run(["df", "--output=fstype", str(folder)], capture_output=True, text=True)
    return "tmpfs" in done.stdout
