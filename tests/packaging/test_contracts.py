"""The tools that hold the architecture see all of the package, the linked folders included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.tree import copy_repository


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_repository(tmp_path / "tree")


def tool(tree: Path, name: str, *arguments: str) -> str:
    """Output of a tool of this environment, run in `tree`; it must have found something."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode != 0, f"{name} passed a planted fault"
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("convert/planted.py", "import torch", "no torch, transformers or timm at run time"),
        ("convert/planted.py", "import fastvlm_mlx.cli", "floors"),
        ("quantize/planted.py", "import fastvlm_mlx.convert", "floors"),
        ("fastvlm_mlx/prompt/planted.py", "import mlx.core", "prompt and the lowest floor"),
        ("fastvlm_mlx/engine_planted.py", "", "floors"),
        ("fastvlm_mlx/generate/planted.py", "import mlx_lm.models", "mlx-lm is imported by one"),
    ],
)
def test_import_linter_finds_a_planted_fault(
    tree: Path, module: str, statement: str, contract: str
) -> None:
    """A module on no floor is a fault too: a new one must be given its place in pyproject.toml."""
    (tree / module).write_text(f"{statement}\n")
    assert f"{contract} " in tool(tree, "lint-imports")
    assert "1 broken" in tool(tree, "lint-imports")


@pytest.mark.slow
def test_mypy_checks_the_linked_folders(tree: Path) -> None:
    (tree / "convert" / "planted.py").write_text("planted: int = 'text'\n")
    assert "convert/planted.py:1: error" in tool(tree, "mypy")


def test_ruff_refuses_the_folders_as_top_level_packages(tree: Path) -> None:
    (tree / "quantize" / "planted.py").write_text("import convert\n")
    assert "`convert` is banned" in tool(tree, "ruff", "check", "quantize")
