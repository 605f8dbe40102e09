"""A runtime behind a process, as the harness knows runtimes, and its start from nothing, timed.

Knows which file runs which runtime and what it takes to ask it; remembers what it was given to
read and see. Takes no averages and compares nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.harness import FIRST_ANSWER_TOKENS, PAPER_STAGES, Measured
from fastvlm_mlx.bench.inputs import FOLLOW_UP, InputFiles, prompt_text
from fastvlm_mlx.bench.peer import Work
from fastvlm_mlx.bench.peer_process import PATIENCE_S, PeerProcess
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.errors import FastVLMError

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Contender:
    """A runtime to compare: what it is called, the file that runs it, the Python to run that."""

    name: str
    file: Path
    python: Path | None = None


OURS = Contender("fastvlm-mlx", _HERE / "peer_ours.py")


def mlx_vlm(python: Path | None) -> Contender:
    """Return mlx-vlm under `python`, by default this one. Raises FastVLMError if it is not here."""
    if python is None and find_spec("mlx_vlm") is None:
        raise FastVLMError(
            "mlx-vlm is not installed here: name a Python that has it with --peer-python (python "
            "-m venv peers && peers/bin/pip install mlx-vlm, on Linux also 'mlx[cpu]')"
        )
    return Contender("mlx-vlm", _HERE / "peer_mlx_vlm.py", python)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What every contender loads: a folder, the dtype it computes in, "cpu" or "gpu"."""

    folder: Path
    dtype: str
    device: str


class PeerRuntime:
    """A contender, started and loaded, to be asked what the harness's `OurRuntime` is.

    `about` is what it says of itself, `shown` what it makes of each case prepared.
    """

    def __init__(
        self,
        contender: Contender,
        weights: Weights,
        files: InputFiles,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Start its process and load. Raises FastVLMError; no process is left then."""
        self.name, self.files, self.patience_s = contender.name, files, patience_s
        self.shown: dict[Case, dict[str, Any]] = {}
        self.process = PeerProcess(contender.name, contender.file, python=contender.python)
        try:
            self.loaded = _load(self.process, contender, weights, patience_s)
            self.about = self._ask("about")
        except BaseException:
            self.process.kill()
            raise

    def prepare(self, case: Case) -> None:
        """Make the case's files and have it say what it makes of them, once."""
        if case not in self.shown:
            self.shown[case] = self._ask("show", case)

    def ttft(self, case: Case) -> Measured:
        """Answer unfenced. Raises FastVLMError if the answer is not as long as was asked."""
        answered = self._ask("ttft", case)
        _require_length(self.name, answered, case.max_tokens)
        return _measured(answered)

    def profile(self, case: Case) -> dict[str, float]:
        """Answer fenced; return stages and the paper's sum of them."""
        stages = self._ask("profile", case)
        return stages | {"paper_ttft_ms": sum(stages[name] for name in PAPER_STAGES)}

    def second_turn(self, case: Case) -> Measured:
        """Answer the case, then FOLLOW_UP; return the latter, of one token."""
        answered = self._ask("second_turn", case)
        _require_length(self.name, answered, 1)
        return _measured(answered)

    def cannot(self, case: Case) -> dict[str, str]:
        """Return what it must not be asked with a case prepared, and why."""
        reasons: dict[str, str] = self.shown[case]["cannot"]
        return reasons

    def memory(self) -> dict[str, int]:
        """Return the bytes its process holds now, and the most during the latest answer."""
        return self._ask("memory")

    def close(self) -> None:
        """End its process."""
        self.process.close()

    def _ask(self, do: str, case: Case | None = None) -> dict[str, Any]:
        given = {} if case is None else {"work": dataclasses.asdict(work(case, self.files))}
        return self.process.ask(do, patience_s=self.patience_s, **given)


def work(case: Case, files: InputFiles) -> Work:
    """Return a case as files and text, the files written."""
    return Work(
        pictures=tuple(str(path) for path in files.paths(case)),
        prompt=case.prompt,
        question=prompt_text(case.prompt),
        follow_up=FOLLOW_UP,
        resolution=case.resolution,
        max_tokens=case.max_tokens,
        first_answer_tokens=FIRST_ANSWER_TOKENS,
        photo=files.photo,
    )


def start_cold(
    contender: Contender,
    weights: Weights,
    case: Case,
    files: InputFiles,
    *,
    patience_s: float = PATIENCE_S,
) -> dict[str, float]:
    """Start a fresh process, load, answer once; return where the milliseconds went.

    By the runtimes' public functions, so the figures begin with "api_": `fastvlm bench --cold`
    times a whole command. `api_cold_overhead_ms` is everything before the answer but the weights:
    interpreter, imports, configuration, tokenizer. Weights are there once they are in the dtype
    that all compute in, even if a runtime reads them in another one and has them cast. The file
    cache is as it was found.
    """
    with PeerProcess(contender.name, contender.file, python=contender.python) as process:
        given = dataclasses.asdict(work(case, files))
        loaded = _load(process, contender, weights, patience_s)
        answered = process.ask("ttft", patience_s=patience_s, work=given)
    _require_length(contender.name, answered, case.max_tokens)
    weights_ms = loaded["weights_ms"] + loaded["cast_ms"]
    start_ms = (loaded["started_s"] - process.spawned_s) * 1000
    overhead_ms = start_ms + loaded["import_ms"] + loaded["load_ms"] - loaded["weights_ms"]
    return {
        "api_cold_ttft_ms": overhead_ms + weights_ms + answered["ttft_ms"],
        "api_cold_overhead_ms": overhead_ms,
        "api_cold_start_ms": start_ms,
        "api_cold_import_ms": loaded["import_ms"],
        "api_cold_weights_ms": weights_ms,
        "api_cold_first_answer_ms": answered["ttft_ms"],
    }


def _load(
    process: PeerProcess, contender: Contender, weights: Weights, patience_s: float
) -> dict[str, Any]:
    try:
        return process.ask(
            "load",
            patience_s=patience_s,
            model=str(weights.folder),
            dtype=weights.dtype,
            device=weights.device,
        )
    except FastVLMError as error:
        if "ModuleNotFoundError" not in str(error):
            raise
        raise FastVLMError(f"{error}: install it for {contender.python or 'this Python'}") from None


def _require_length(name: str, answered: dict[str, Any], tokens: int) -> None:
    """Refuse an answer that took less, or more, work than the others'."""
    given = len(answered["token_ids"])
    if given != tokens:
        raise FastVLMError(f"{name} answered {given} tokens where {tokens} were asked for")


def _measured(answered: dict[str, Any]) -> Measured:
    return Measured(
        ttft_ms=answered["ttft_ms"],
        decode_tps=answered["decode_tps"],
        peak_bytes=answered["peak_bytes"],
        token_ids=tuple(answered["token_ids"]),
        prompt_tokens=answered["prompt_tokens"],
        cpu_s=answered["cpu_s"],
    )
