"""Runs the command line, in a process of its own, and copies the demo model to be damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
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


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own; every stream is a pipe unless said."""
    environment = os.environ | options.pop("env", {})
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **streams)


def wait(process: subprocess.Popen[bytes], stdin: bytes = b"") -> Ran:
    out, err = process.communicate(stdin, timeout=120)
    return Ran(process.returncode, (out or b"").decode(), (err or b"").decode())


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
