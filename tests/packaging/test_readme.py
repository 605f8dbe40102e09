"""Every ```console block of README.md is run in a scratch copy and must show the real output.

console.py holds the rules. `make demo` and `make test` are run by `.ci/run`, not from here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.packaging.console import blocks, commands, matches, run
from tests.packaging.tree import REPOSITORY, copy_repository

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONSOLE = blocks(README, "console")

# They need a network or set up an environment: shown in ```sh blocks, run elsewhere or by hand.
NOT_HERE = re.compile(r"\b(make|pip|pipx|uv|uvx|brew|apt|apt-get|git|curl|wget)\s")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CONSOLE)))
def test_a_console_block_shows_what_happens(number: int, tmp_path: Path) -> None:
    if "export-app" in CONSOLE[number]:
        pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python")
    folder = copy_repository(tmp_path / "fastvlm-mlx")
    environment = {
        # This interpreter's `python` and `fastvlm`, as in an activated environment.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "80",
    }
    for command in commands(CONSOLE[number]):
        output, code = run(command, folder, environment)
        assert code == command.exit_code, f"$ {command.text}\n{output}"
        if not matches(command.shown, output):
            shown = "\n".join(command.shown)
            pytest.fail(f"$ {command.text}\nREADME.md shows:\n{shown}\nit prints:\n{output}")


def test_console_blocks_hold_only_commands_that_run_anywhere() -> None:
    for block in CONSOLE:
        for command in commands(block):
            assert not NOT_HERE.search(command.text), f"belongs into a ```sh block: {command.text}"


def test_the_two_commands_of_the_readme_exist() -> None:
    shell = "\n".join(blocks(README, "sh"))
    assert re.search(r"^make demo\b", shell, re.MULTILINE)
    assert re.search(r"^make test\b", shell, re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_is_named_exists(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_relative_link_leads_somewhere(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
        assert (REPOSITORY / target).exists(), target
