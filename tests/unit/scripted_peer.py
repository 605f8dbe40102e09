"""A runtime that computes nothing: it answers by a script and notes in a file what it was asked.

Written out as a file of its own for each test, and run in a real process by the real worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.peer_runtime import Contender

MACHINE = {
    "chip": "none", "cpu_cores": 1, "gpu_cores": None, "memory_bytes": None, "os": "", "power": "",
    "device": "cpu", "python": "3", "mlx": "", "backend": "", "blas": "", "load_average": None,
    "virtual": None,
}  # fmt: skip

_SOURCE = """
import os, signal, sys, time
from fastvlm_mlx.bench.peer import About, Answered, Loaded, Shown
from fastvlm_mlx.bench.worker import serve

SCRIPT = {script}
STAGES = ("image_decode", "preprocess", "vision", "projector", "prompt", "prefill", "first_token")

class Scripted:
    answers = 0

    def note(self, what):
        with open(SCRIPT["log"], "a") as log:
            log.write(f"{{SCRIPT['name']}} {{what}} {{os.getpid()}}\\n")
        if what == SCRIPT.get("at") and self.answers >= SCRIPT.get("after", 0):
            exec(SCRIPT["do"])

    def load(self, model, *, dtype, device):
        self.note("load")
        return Loaded(import_ms=2.0, load_ms=5.0, weights_ms=4.0, cast_ms=1.0)

    def about(self):
        return About(name=SCRIPT["name"] + " 1", versions={{"python": "3"}}, weight_bytes=7,
                     machine=SCRIPT["machine"], unpacked=SCRIPT["unpacked"])

    def show(self, work):
        self.note("show")
        return Shown(prompt_ids=SCRIPT["prompt"], pixels=SCRIPT["pixels"],
                     cannot=SCRIPT["cannot"])

    def ttft(self, work):
        self.note("ttft")
        self.answers += 1
        took = SCRIPT["ttft"]
        return Answered(ttft_ms=took[min(self.answers, len(took)) - 1], token_ids=SCRIPT["ids"],
                        prompt_tokens=9, cpu_s=0.5, decode_tps=4.0)

    def profile(self, work):
        self.note("profile")
        return {{f"{{stage}}_ms": 1.0 for stage in STAGES}}

    def second_turn(self, work):
        self.note("second_turn")
        return Answered(ttft_ms=3.0, token_ids=SCRIPT["again"], prompt_tokens=9, cpu_s=0.5)

    def memory(self):
        return {{}}

serve(Scripted())
"""


def scripted(folder: Path, name: str, **changed: Any) -> Contender:
    """Return a contender whose n-th answer takes `ttft[n]`, and that runs `do` when asked for `at`.

    `after` is how many answers it gives before that. What it is asked goes to `folder/log`.
    """
    script = {
        "name": name,
        "log": str(folder / "log"),
        "machine": MACHINE,
        "prompt": [1, -200, 2],
        "pixels": ["a"],
        "cannot": {},
        "unpacked": False,
        "ids": [5, 6, 7],
        "again": [1],
        "ttft": [10.0],
    } | changed
    file = folder / f"{name}.py"
    file.write_text(_SOURCE.format(script=repr(script)))
    return Contender(name, file)


def asked(folder: Path, *kinds: str) -> list[str]:
    """Return "NAME KIND" for each request of these kinds, in the order they came."""
    lines = [line.rsplit(" ", 1)[0] for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if line.split()[1] in kinds]


def processes(folder: Path, name: str) -> list[str]:
    """Return the process ids that loaded `name`, in order."""
    lines = (folder / "log").read_text().splitlines()
    return [line.split()[2] for line in lines if line.startswith(f"{name} load ")]
