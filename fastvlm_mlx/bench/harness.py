"""The measuring loop: warm up apart, then every case in turn, run after run.

Cases interleave, so that a machine that heats up slows all of them alike. TTFT is from an unfenced
call with paths; the stages are from another, profiled, call. Knows no statistics (`results.py` has
them) and prints nothing: `say` hears what is going on. Only pictures are written, into a temporary
folder, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm_mlx.bench.inputs import FOLLOW_UP, InputFiles, input_files, prompt_text
from fastvlm_mlx.bench.results import METRICS, PAPER_STAGES, STAGES, Case, CaseResult, Series
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.events import Generation, Stats
from fastvlm_mlx.generate.cache import FeatureCache
from fastvlm_mlx.generate.session import collect
from fastvlm_mlx.prompt.processor import Processor
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message

FIRST_ANSWER_TOKENS = 16
"""Length of the first turn's answer where the second turn is measured."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One unfenced answer. `decode_tps` is None if it has one token; `cpu_s` is of all threads.

    `token_ids` are all it generated; `prompt_tokens` counts positions, the pictures' included.
    """

    ttft_ms: float
    decode_tps: float | None
    peak_bytes: int | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cpu_s: float


class OurRuntime:
    """An engine whose answers never end early, and that remembers nothing of the calls before.

    It answers a case's prompt about its files, greedily, in exactly `max_tokens` tokens.
    """

    def __init__(self, engine: Engine, files: InputFiles) -> None:
        pipeline = dataclasses.replace(
            engine.pipeline, stop_ids=frozenset(), features=FeatureCache(0)
        )
        self.engine = dataclasses.replace(engine, pipeline=pipeline)
        self.files = files

    def prepare(self, case: Case) -> None:
        """Make the case's files. Raises ConfigError for a resolution off the model's grid, and
        FastVLMError for a case beyond its context."""
        require_room(case, self.engine.config, self.engine.pipeline.processor)
        self.files.paths(case)

    def ttft(self, case: Case) -> Measured:
        """Answer unfenced, from paths."""
        paths, prompt = self.files.paths(case), prompt_text(case.prompt)
        cpu = time.process_time()
        answer = self.engine.generate(
            prompt, images=paths, resolution=case.resolution, max_tokens=case.max_tokens
        )
        cpu_s = time.process_time() - cpu
        _require(answer.stats, encoded=case.images, generated=case.max_tokens)
        return _measured(answer, cpu_s)

    def profile(self, case: Case) -> dict[str, float]:
        """Answer one token with every stage fenced; return the stages and the paper's sum."""
        answer = self.engine.generate(
            prompt_text(case.prompt),
            images=self.files.paths(case),
            resolution=case.resolution,
            max_tokens=1,
            profile=True,
        )
        _require(answer.stats, encoded=case.images, generated=1)
        stages = {name: float(getattr(answer.stats, name)) for name in STAGES}
        return stages | {"paper_ttft_ms": sum(stages[name] for name in PAPER_STAGES)}

    def second_turn(self, case: Case) -> Measured:
        """Answer FOLLOW_UP in a chat whose first turn was the case.

        Random weights answer with tokens that hardly ever are how their text is tokenized, so the
        first answer is read again too: its tokens are part of what is prefilled.
        """
        chat = self.engine.chat()
        pictures = [
            self.engine.encode(path, resolution=case.resolution) for path in self.files.paths(case)
        ]
        collect(chat.stream(prompt_text(case.prompt), pictures, max_tokens=FIRST_ANSWER_TOKENS))
        cpu = time.process_time()
        answer = chat.ask(FOLLOW_UP, max_tokens=1)
        cpu_s = time.process_time() - cpu
        _require(answer.stats, encoded=0, generated=1)
        if not answer.stats.reused_tokens:
            raise RuntimeError("the second turn reused nothing of the first")
        return _measured(answer, cpu_s)


def require_room(case: Case, config: ModelConfig, processor: Processor) -> None:
    """Raise ConfigError for a resolution off the model's grid, FastVLMError for a case beyond its
    context."""
    pictures = case.images * config.vision.tokens(case.resolution, case.resolution)
    prompt = processor.prompt(
        [
            Message("system", (DEFAULT_SYSTEM,)),
            user_message(prompt_text(case.prompt), case.images),
        ]
    )
    needed = pictures + len(prompt.text_ids) + case.max_tokens
    limit = config.decoder.max_positions
    if needed > limit:
        raise FastVLMError(
            f"{case.name}: {needed} tokens do not fit this model's context of {limit}"
        )


def _measured(answer: Generation, cpu_s: float) -> Measured:
    stats = answer.stats
    assert stats.ttft_ms is not None  # a token came, unprofiled
    return Measured(
        ttft_ms=stats.ttft_ms,
        decode_tps=stats.decode_tps,
        peak_bytes=stats.peak_bytes,
        token_ids=answer.token_ids,
        prompt_tokens=stats.prompt_tokens,
        cpu_s=cpu_s,
    )


def _require(stats: Stats, *, encoded: int, generated: int) -> None:
    """Refuse a measurement of less work than was asked for: a bug, never a result."""
    done = (stats.encoded_images, stats.generated_tokens)
    if done != (encoded, generated):
        raise RuntimeError(
            f"{encoded} pictures and {generated} tokens were to be measured, {done} were"
        )


@dataclass(slots=True)
class Tally:
    """What one case took so far; `token_ids` and `prompt_tokens` are the latest answer's."""

    case: Case
    values: dict[str, list[float]] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0

    def add(self, **figures: float | None) -> None:
        """Add one run's figures by METRICS' names; None is no figure."""
        for name, value in figures.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)

    def result(self, image_tokens: int) -> CaseResult:
        """Return the series, in METRICS' order."""
        return CaseResult(
            case=self.case,
            prompt_tokens=self.prompt_tokens,
            image_tokens=image_tokens,
            generated_tokens=len(self.token_ids),
            series={
                name: Series(metric.unit, tuple(self.values[name]))
                for name, metric in METRICS.items()
                if name in self.values
            },
        )


def run_cases(
    engine: Engine,
    cases: Sequence[Case],
    *,
    runs: int,
    warm_up_runs: int,
    second_turn: bool = False,
    photo: bool = False,
    say: Say = lambda _: None,
) -> tuple[CaseResult, ...]:
    """Measure every case `runs` times, after `warm_up_runs` that are all a run is but counted.

    `photo` makes every picture a 12-megapixel file. Raises FastVLMError before anything runs if a
    case does not fit the model, or there is nothing to measure.
    """
    if runs < 1 or warm_up_runs < 0 or not cases:
        raise FastVLMError("nothing is measured: give at least one case and one run")
    tallies = [Tally(case) for case in cases]
    with input_files(photo=photo) as files:
        runtime = OurRuntime(engine, files)
        for case in cases:
            runtime.prepare(case)
        for run in range(-warm_up_runs, runs):
            warming = run < 0
            what = f"warm-up {run + warm_up_runs + 1}" if warming else f"run {run + 1} of {runs}"
            for tally in tallies:
                say(f"{what}: {tally.case.name}")
                counted = Tally(tally.case) if warming else tally
                _measure_once(runtime, counted, second_turn=second_turn)
    return tuple(tally.result(image_tokens(engine, tally.case)) for tally in tallies)


def _measure_once(runtime: OurRuntime, tally: Tally, *, second_turn: bool) -> None:
    """Run one case once in each way asked for, and add what it took to its tally."""
    case = tally.case
    measured = runtime.ttft(case)
    tally.token_ids, tally.prompt_tokens = measured.token_ids, measured.prompt_tokens
    tally.add(
        ttft_ms=measured.ttft_ms,
        decode_tps=measured.decode_tps,
        peak_bytes=measured.peak_bytes,
        resident_bytes=resident_bytes(),
    )
    tally.add(**runtime.profile(case))
    if second_turn:
        tally.add(second_turn_ttft_ms=runtime.second_turn(case).ttft_ms)


def image_tokens(engine: Engine, case: Case) -> int:
    """Return how many positions the case's pictures take in this model."""
    return case.images * engine.config.vision.tokens(case.resolution, case.resolution)


def resident_bytes() -> int:
    """Return the bytes of memory this process holds now, not the most it ever held."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    listed = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(listed.stdout) * 1024  # in kilobytes, on macOS too
