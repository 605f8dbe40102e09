"""`fastvlm verify`: what it prints, and an exit code that a script can go by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import header_folders
import pytest
from planted_faults import FAULTS

from tests.cli.command import DEMO, Run


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return header_folders.write_native(tmp_path_factory.mktemp("folders") / "native", "q4")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return header_folders.write_app(tmp_path / "app")


def test_a_native_folder_is_checked_for_all_that_load_it(run: Run, native: Path) -> None:
    ran = run("verify", native)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split(":")[0] for line in ran.out.splitlines()] == [
        "native",
        "mlx-vlm",
        "mlx-swift-lm",
    ]
    assert all(" requirements met (" in line for line in ran.out.splitlines())
    assert "requirements met (mlx-vlm 0.7.10)" in ran.out


def test_one_consumer_can_be_named(run: Run, app: Path) -> None:
    ran = run("verify", app, "--for", "app")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "app: 43 requirements met (mlx-swift-examples 2.21.2)\n"


def test_a_failure_names_the_requirement_its_line_and_what_is_wrong(run: Run, app: Path) -> None:
    """The app's trap: a rope_scaling without sections ends in a fatal error at start."""
    FAULTS["linear rope"](app)
    ran = run("verify", app)
    assert (ran.code, ran.err) == (1, "")
    line, detail, summary = ran.out.splitlines()
    assert line.startswith("app: FAILED: config.rope_scaling: rope_scaling is absent or has ")
    assert line.endswith("[apple/ml-fastvlm@5004c18e533e app/FastVLM/FastVLM.swift:98]")
    assert detail == "    config.json: rope_scaling has no list of whole numbers mrope_section"
    assert summary == "app: 1 of 43 requirements failed (mlx-swift-examples 2.21.2)"


def test_all_lists_every_requirement_with_its_line(run: Run, app: Path) -> None:
    (app / "tokenizer_config.json").unlink()
    ran = run("verify", app, "--all")
    assert ran.code == 1
    lines = [line for line in ran.out.splitlines() if not line.startswith("    ")]
    assert len(lines) == 43 + 1
    assert sum(line.startswith("app: ok: ") for line in lines) == 40
    assert sum(line.startswith("app: unchecked: ") for line in lines) == 2
    assert lines[-1].startswith("app: 1 of 43 requirements failed, 2 not checked for that (")


def test_json_holds_every_finding(run: Run, native: Path, app: Path) -> None:
    said = json.loads(run("verify", native, "--json").out)
    assert said["folder"] == str(native)
    assert set(said["consumers"]) == {"native", "mlx-vlm", "mlx-swift-lm"}
    FAULTS["no <image>"](app)
    ran = run("verify", app, "--for", "app", "--json")
    found = json.loads(ran.out)["consumers"]["app"]
    assert (ran.code, found["passed"], found["version"]) == (1, False, "mlx-swift-examples 2.21.2")
    (failed,) = (each for each in found["requirements"] if each["passed"] is False)
    assert failed["id"] == "tokenizer.image"
    assert failed["detail"] == "tokenizer.json has no added token <image>"
    assert failed["cite"].endswith("app/FastVLM/FastVLM.swift:548")


def test_a_small_model_is_not_failed_for_its_size_unless_one_asks(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert run("convert", "demo", folder).code == 0
    ran = run("verify", folder)
    assert ran.code == 0
    assert "mlx-vlm: takes only towers of Apple's size; all else is met" in ran.out
    told = json.loads(run("verify", folder, "--json").out)["consumers"]
    assert {name: told[name]["only_tower_sizes_differ"] for name in told} == {
        "native": False, "mlx-vlm": True, "mlx-swift-lm": False,
    }  # fmt: skip
    ran = run("verify", folder, "--for", "mlx-vlm")
    assert ran.code == 1
    assert "mm_hidden_size is 512, not 3072" in ran.out


def test_what_cannot_be_checked_is_one_line(run: Run, tmp_path: Path) -> None:
    assert (
        run("verify", tmp_path / "none").refused() == f"folder {tmp_path / 'none'} does not exist"
    )
    assert "convert it first" in run("verify", "demo").refused()
    assert "convert it first" in run("verify", "demo", "--for", "app").refused()
    assert "there is no *.safetensors" in run("verify", tmp_path).refused()
    assert "convert it first" in run("verify", DEMO).refused()
    assert "'torch' is not one of" in run("verify", tmp_path, "--for", "torch").refused()


def test_the_consumers_offered_are_those_there_are() -> None:
    from fastvlm_mlx.cli.verify import CONSUMERS
    from fastvlm_mlx.convert import verify

    assert verify.CONSUMERS == CONSUMERS


def test_no_weights_are_read_and_mlx_is_not_needed(native: Path) -> None:
    """A machine without an MLX backend, CI say, can check an artifact."""
    code = (
        "import sys; from fastvlm_mlx.cli.main import main; code = main(['verify', sys.argv[1]]);"
        "sys.exit(code or 'mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(native)], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
