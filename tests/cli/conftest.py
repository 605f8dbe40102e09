"""The command line in this process, and checkpoints and pictures to give it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.cli.command import TESTS, Ran, Run, copy_of_demo, edit_json

# Folders of every layout (parity) and a local hub (unit) are written by the helpers there.
sys.path += [str(TESTS / "parity"), str(TESTS / "unit")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process; `stdin` is bytes."""
    from fastvlm_mlx.cli.main import main

    def call(*arguments: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return copy_of_demo(tmp_path / "model")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes token 0 until it is stopped: its final norm makes all logits equal.

    Token 0 is the terminal's escape character, which no answer should bring to a terminal.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = copy_of_demo(tmp_path_factory.mktemp("models") / "endless")
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"] = np.zeros_like(
        weights["model.language_model.norm.weight"]
    )
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", text_config__max_position_embeddings=8192)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    escape = chr(0x100 + 0x1B)  # how byte-level BPE spells byte 27
    first = next(token for token, number in vocabulary.items() if number == 0)
    vocabulary[first], vocabulary[escape] = vocabulary[escape], 0
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def red_circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red circle.png"
    image = Image.new("RGB", (256, 256), (235, 235, 235))
    ImageDraw.Draw(image).ellipse((70, 70, 180, 180), fill=(220, 30, 30))
    image.save(path)
    return path
