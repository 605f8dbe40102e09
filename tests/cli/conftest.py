"""The command line in this process or in one of its own, and checkpoints to give it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

TESTS = Path(__file__).parents[1]
# Folders of every layout (parity) and a local hub (unit) are written by the helpers there.
sys.path += [str(TESTS / "parity"), str(TESTS / "unit")]

DEMO = TESTS.parent / "fastvlm_mlx" / "demo"
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from fastvlm_mlx.cli.main import main; sys.exit(main())",
]


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The message of a user's mistake: one line, exit code 2, nothing on stdout."""
        assert self.code == 2, self
        assert self.out == "", self
        assert self.err.startswith("fastvlm: error: "), self
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self
        return self.err.removeprefix("fastvlm: error: ").rstrip("\n")


Run = Callable[..., Ran]


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


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own; every stream is a pipe unless said."""
    environment = os.environ | options.pop("env", {})
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **streams)


def wait(process: subprocess.Popen[bytes], stdin: bytes = b"") -> Ran:
    out, err = process.communicate(stdin, timeout=120)
    return Ran(process.returncode, (out or b"").decode(), (err or b"").decode())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return copy_of_demo(tmp_path / "model")


def copy_of_demo(folder: Path) -> Path:
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return folder


def edit_json(path: Path, **values: object) -> None:
    """Set keys of a JSON object; None removes one. `a__b` is key b of object a."""
    whole = json.loads(path.read_text())
    for name, value in values.items():
        at = whole
        *outer, last = name.split("__")
        for key in outer:
            at = at[key]
        at[last] = value
        if value is None:
            del at[last]
    path.write_text(json.dumps(whole))


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
