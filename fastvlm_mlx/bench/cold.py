"""A start from nothing: from the process being made to its first token, and where the time goes.

Each run is a fresh process of the real `fastvlm generate` (`cold_child.py`), one token long. Says
whether the weights were in the system's file cache, and can empty it for them on Linux. Knows no
engine: this process loads nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvlm_mlx.bench.file_cache import file_cache_state, forget, weight_files
from fastvlm_mlx.bench.inputs import input_files, prompt_text
from fastvlm_mlx.bench.results import Case, Series
from fastvlm_mlx.checkpoint.hub import model_folder
from fastvlm_mlx.errors import FastVLMError

PATIENCE_S = 1800.0
"""How long one start may take."""

# In the order they happen; they add up to `cold_ttft_ms`.
_PARTS = (
    ("cold_start_ms", "spawned", "python_up"),
    ("cold_command_import_ms", "python_up", "command_imported"),
    ("cold_engine_import_ms", "command_imported", "engine_imported"),
    ("cold_open_ms", "engine_imported", "load_model_began"),
    ("cold_weights_ms", "load_model_began", "load_model_ended"),
    ("cold_first_answer_ms", "load_model_ended", "first_token"),
)
_NO_OVERHEAD = ("cold_weights_ms", "cold_first_answer_ms")

# The `fastvlm` command as its script starts it, but for the times that are taken.
_BOOT = """
import time
up = time.monotonic()
import sys
from fastvlm_mlx.bench import cold_child
cold_child.watch(up)
from fastvlm_mlx.cli.main import main
cold_child.passed("command_imported")
code = main()
cold_child.report()
sys.exit(code)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """Series by name, all beginning with "cold_", and how the weights were found.

    `cold_ttft_ms` is from just before the process was made to its first token. `cold_overhead_ms`
    is that less reading weights and less the answer: interpreter, imports, command line,
    configuration and tokenizer. Pictures are decoded meanwhile, as the command does it.
    `file_cache` is "unknown" too if not all runs found the same.
    """

    series: dict[str, Series]
    file_cache: Literal["warm", "cold", "unknown"]


def cold_start(
    model: str | Path,
    case: Case,
    *,
    runs: int,
    loading: Mapping[str, Any] | None = None,
    photo: bool = False,
    empty_file_cache: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> ColdStart:
    """Start `fastvlm generate` `runs` times on the case, one token each.

    `loading` has options of `fastvlm_mlx.load` by name, as a command line can give them.
    `empty_file_cache` asks Linux to forget the weights' files before each run. The first run is
    counted as any other: it differs by the file cache alone, and `file_cache` says how that was.
    Raises FastVLMError if a run fails, with the command's own line.
    """
    if runs < 1:
        raise FastVLMError(f"a cold start is measured at least once, not {runs} times")
    folder, given = model_folder(model), dict(loading or {})
    folders = [folder]
    if given.get("vision_from") is not None:
        folders.append(model_folder(given["vision_from"]))
        given["vision_from"] = str(folders[1])
    weights = weight_files(*folders)
    found: dict[str, list[float]] = {}
    states = set()
    with input_files(photo=photo) as files:
        arguments = _arguments(folder, case, files.paths(case), given)
        for run in range(runs):
            say(f"cold start {run + 1} of {runs}: {case.name}")
            if empty_file_cache:
                forget(weights)
            states.add(file_cache_state(weights))
            for name, value in parts(_run(arguments)).items():
                found.setdefault(name, []).append(value)
    state = states.pop() if len(states) == 1 else "unknown"
    return ColdStart(
        series={name: Series("ms", tuple(values)) for name, values in found.items()},
        file_cache=state,
    )


def parts(times: dict[str, float]) -> dict[str, float]:
    """Return milliseconds by name of times in seconds: total, overhead, and each part."""
    took = {name: (times[end] - times[begin]) * 1000 for name, begin, end in _PARTS}
    total = sum(took.values())
    overhead = total - sum(took[name] for name in _NO_OVERHEAD)
    return {"cold_ttft_ms": total, "cold_overhead_ms": overhead} | took


def _arguments(
    folder: Path, case: Case, pictures: Sequence[Path], loading: Mapping[str, Any]
) -> list[str]:
    return [
        "generate",
        *map(str, pictures),
        *("--model", str(folder), "-p", prompt_text(case.prompt), "--max-tokens", "1"),
        *_words(loading),
        *(("--resolution", str(case.resolution)) if pictures else ()),
    ]


def _words(loading: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as the command line writes them, those that were given."""
    for name, value in loading.items():
        if value is None or value is False:
            continue
        yield "--" + name.replace("_", "-")
        if name == "memory_limit":
            yield f"{value / 1000:.3f}K"  # a size needs a unit
        elif value is not True:
            yield str(value)


def _run(arguments: Sequence[str]) -> dict[str, float]:
    """Run the command once in a new process; return its times, and when it was made."""
    command = [sys.executable, "-P", "-c", _BOOT, *arguments]
    spawned = time.monotonic()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired as error:
        raise FastVLMError(f"a cold start took longer than {PATIENCE_S:g} s") from error
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode or not lines:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise FastVLMError(
            f"a cold start ended with exit code {done.returncode}: {said[-1] if said else 'silent'}"
        )
    times: dict[str, float] = json.loads(lines[-1])
    return times | {"spawned": spawned}
