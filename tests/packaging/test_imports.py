"""Importing the package or asking for help loads nothing heavy; no part needs torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("mlx", "mlx_lm", "transformers", "starlette", "huggingface_hub", "PIL", "numpy")
NEVER = ("torch", "torchvision", "timm", "transformers")


def modules_after(code: str, *arguments: str) -> set[str]:
    """Top-level names in sys.modules when `code` has run in a fresh interpreter."""
    report = "import atexit, json, sys\n" + (
        "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


CLI = "import sys; sys.argv[0] = 'fastvlm'; from fastvlm_mlx.cli.main import main; sys.exit(main())"


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import mlx_lm` alone costs 0.8 s through transformers, 2.4 s where torch is installed."""
    loaded = modules_after("import fastvlm_mlx")
    assert "fastvlm_mlx" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("generate", "--help")])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    loaded = modules_after(CLI, *arguments)
    assert "click" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_is_found_without_torch_or_transformers() -> None:
    """transformers comes with mlx-lm, so it is installed; it must not be imported."""
    code = "import fastvlm_mlx\nfor name in fastvlm_mlx.__all__: getattr(fastvlm_mlx, name)"
    loaded = modules_after(code)
    assert "mlx" in loaded
    assert not loaded & set(NEVER)


@pytest.mark.slow
def test_an_answer_is_given_without_torch_or_transformers() -> None:
    code = (
        "import fastvlm_mlx as fv, numpy as np\n"
        "engine = fv.load('demo')\n"
        "picture = np.zeros((64, 96, 3), np.uint8)\n"
        "engine.generate('What is this?', images=[picture], max_tokens=4)"
    )
    assert not modules_after(code) & set(NEVER)
