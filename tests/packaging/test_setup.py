"""`.ci/venv`, which `make` calls: finds a Python that works, or says in one line what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.tree import REPOSITORY


def make_venv(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(REPOSITORY / ".ci" / "venv"), str(folder)],
        env={**os.environ, "PYTHON": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


@pytest.mark.slow
def test_a_python_that_is_on_path_but_does_not_run_is_passed_over(tmp_path: Path) -> None:
    """pyenv leaves a shim for each version it has, and those not active exit 127."""
    shims = tmp_path / "shims"
    for minor in (14, 13, 12, 11):
        fake_python(shims, f"python3.{minor}", "exit 127")
    good = fake_python(tmp_path / "good", "python3.12", f'exec "{sys.executable}" "$@"')
    done = make_venv(tmp_path / "venv", PATH=f"{shims}:{good.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [tmp_path / "venv/bin/python", "-m", "pip", "--version"], capture_output=True, check=False
    )
    assert said.returncode == 0


def test_an_environment_that_works_is_kept(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("")
    fake_python(venv / "bin", "python", f'exec "{sys.executable}" "$@"')
    done = make_venv(venv)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (venv / "pyvenv.cfg").read_text() == ""


def test_a_named_python_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    old = fake_python(tmp_path, "python3", "exit 1")
    done = make_venv(tmp_path / "venv", PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr == f"PYTHON={old} is no Python >=3.11,<3.15 with its venv module\n"


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("mine")
    done = make_venv(tmp_path / "venv")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "venv" / "mine.txt").exists()
