"""What `fastvlm bench` measures, in order: cold starts, the model here, or it and other runtimes.

Knows what the options mean to the benchmark's parts, and what can be refused before anything runs.
Imported once a command line has been found sensible; knows no table and no file.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from fastvlm_mlx.bench import run
from fastvlm_mlx.bench.baseline import require_comparable
from fastvlm_mlx.bench.cold import ColdStart, cold_start
from fastvlm_mlx.bench.compare import (
    Comparison,
    compare,
    compare_with_earlier,
    require_same_work,
)
from fastvlm_mlx.bench.costs import DType, Storage
from fastvlm_mlx.bench.file_cache import file_cache_state
from fastvlm_mlx.bench.peer_runtime import OURS, mlx_vlm
from fastvlm_mlx.bench.results import Case, Report, Series
from fastvlm_mlx.bench.subject import Subject, stored_subject, synthetic_subject
from fastvlm_mlx.bench.synthetic import BITS, synthetic_checkpoint, synthetic_engine
from fastvlm_mlx.bench.turns import Plan
from fastvlm_mlx.cli.asking import load_engine
from fastvlm_mlx.cli.bench_cases import fitting, make_cases, require_common
from fastvlm_mlx.cli.bench_options import MLX_VLM
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.countdown import Countdown
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine import Engine

DEMO_NOTICE = (
    "fastvlm: measuring the demo model, which is tiny; for real sizes: --size 0.5b, or "
    "--model apple/FastVLM-0.5B"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command line: its options, as typed too, and the results it names."""

    console: Console
    given: dict[str, Any]
    typed: str
    baseline: Report | None = None
    earlier: Report | None = None

    def with_(self, **changed: Any) -> Wanted:
        """Return the same with some options changed."""
        return dataclasses.replace(self, given=self.given | changed)


@dataclass(frozen=True, slots=True)
class Measured:
    """Reports of our engine, a model each, and the first of them beside other runtimes."""

    ours: tuple[Report, ...]
    comparison: Comparison | None = None

    @property
    def interleaved(self) -> bool:
        """Whether other runtimes ran in turn with ours."""
        return self.comparison is not None and self.comparison.interleaved

    @property
    def reports(self) -> tuple[Report, ...]:
        """All of them, ours first."""
        return self.ours if self.comparison is None else self.comparison.reports

    def to_json(self) -> dict[str, Any]:
        """Return the first report's object, within it what else was measured or compared."""
        values = self.ours[0].to_json()
        if len(self.ours) > 1:
            values["more"] = [report.to_json() for report in self.ours[1:]]
        if self.comparison is not None:
            compared = self.comparison.to_json()
            values["compared"] = compared | {"reports": compared["reports"][1:]}
        return values


def measure(wanted: Wanted) -> Measured:
    """Measure what a command line asks for. Raises a FastVLMError."""
    given = wanted.given
    if given["size"] is None and given["model"] is None:
        wanted.console.line(DEMO_NOTICE)
        wanted = wanted.with_(model="demo")
    if given["compare"] == MLX_VLM:
        return _beside_mlx_vlm(wanted)
    if given["sweep"] == "quantization":
        return Measured(tuple(_every_packing(wanted)))
    ours = _alone(wanted)
    if wanted.earlier is None:
        return Measured((ours,))
    return Measured((ours,), compare_with_earlier(ours, wanted.earlier))


def _every_packing(wanted: Wanted) -> Iterator[Report]:
    """Yield a report for each number of bits, one model at a time in memory.

    Unpacked, as a CPU has them by default, all would be the same model.
    """
    for bits in BITS:
        yield _alone(wanted.with_(bits=str(bits), keep_quantized=True))
        gc.collect()
        mx.clear_cache()


def _alone(wanted: Wanted) -> Report:
    """Measure our engine in this process; cold starts before anything is loaded in it."""
    given, console = wanted.given, wanted.console
    cases = make_cases(given, _config(wanted))
    require_common(cases, wanted.earlier)
    cold = _cold(wanted, cases[0])
    engine, about, once = _loaded(wanted)
    if given.get(given["sweep"], ()) is None:  # a sweep over its own range
        say = _callbacks(console)["say"]
        cases = fitting(cases, engine, photo=given["photo"], say=say)
    if cold is not None:
        once |= cold.series
        same = about.get("file_cache", cold.file_cache) == cold.file_cache
        about["file_cache"] = cold.file_cache if same else "unknown"
    console.start("Describing model and machine")
    report = run.describe(
        engine,
        cases,
        runs=given["runs"],
        warm_up_runs=given["warm_up"],
        seed=given["seed"],
        command=wanted.typed,
        photo=given["photo"],
        **about,
    )
    if wanted.baseline is not None:
        require_comparable(report, wanted.baseline)
    if wanted.earlier is not None:
        require_same_work(report, wanted.earlier)
    console.start("Warming up")
    once["warm_up_ms"] = Series("ms", (engine.warm_up(),))
    console.start("Measuring")
    say = Countdown(console, (given["runs"] + given["warm_up"]) * len(cases))
    report = dataclasses.replace(report, once=once)
    return run.measure(report, engine, cases, photo=given["photo"], say=say)


def _beside_mlx_vlm(wanted: Wanted) -> Measured:
    """Measure our engine and mlx-vlm in turn, each in a process of its own."""
    given, console = wanted.given, wanted.console
    contenders = (OURS, mlx_vlm(given["peer_python"]))
    with _subject(wanted) as subject:
        cases = make_cases(given, subject.config)
        runs = given["runs"]
        plan = Plan(
            rounds=runs,
            warm_up_runs=given["warm_up"],
            second_turns=runs,
            cold_runs=given["cold"] or 0,
            photo=given["photo"],
        )
        console.start("Comparing")
        say = Countdown(console, (runs + given["warm_up"]) * len(cases) * len(contenders))
        found = compare(contenders, subject, cases, plan, command=wanted.typed, say=say)
        quant = subject.config.quant
        # On a CPU our engine unpacks weights.
        packed = quant is not None and subject.weights.device == "gpu"
        storage = Storage(
            dtype=cast(DType, subject.weights.dtype),
            bits=quant.bits if quant is not None and packed else 16,
        )
        ours = run.with_limits(found.reports[0], subject.config, storage)
    reports = (ours, *found.reports[1:])
    return Measured((ours,), dataclasses.replace(found, reports=reports))


def _config(wanted: Wanted) -> ModelConfig:
    """Return the model's sizes before it is loaded."""
    given = wanted.given
    if given["size"] is not None:
        return synthetic_checkpoint(given["size"], _bits(given), seed=given["seed"]).config
    return _stored(wanted).config


def _stored(wanted: Wanted) -> Subject:
    chosen = {name: wanted.given[name] for name in ("dtype", "device")}
    wanted.console.start(f"Reading {wanted.given['model']}")
    return stored_subject(wanted.given["model"], **chosen, **_callbacks(wanted.console))


@contextmanager
def _subject(wanted: Wanted) -> Iterator[Subject]:
    """Give a folder that any runtime can load; random weights are written to a temporary one."""
    given = wanted.given
    if given["size"] is None:
        yield _stored(wanted)
        return
    wanted.console.start("Writing random weights")
    chosen = {name: given[name] for name in ("seed", "dtype", "device")}
    with synthetic_subject(given["size"], _bits(given), **chosen) as subject:
        yield subject


def _cold(wanted: Wanted, case: Case) -> ColdStart | None:
    """Start fresh processes, if that was asked for."""
    given = wanted.given
    if given["cold"] is None:
        return None
    with _subject(wanted) as subject:
        wanted.console.start("Starting cold")
        return cold_start(
            subject.weights.folder,
            case,
            runs=given["cold"],
            device=given["device"],
            dtype=given["dtype"],
            photo=given["photo"],
            say=Countdown(wanted.console, given["cold"]),
        )


def _loaded(wanted: Wanted) -> tuple[Engine, dict[str, Any], dict[str, Series]]:
    """Return the engine, what a report says of its weights, and how long loading took.

    Random weights are made, not loaded: for them there is no time.
    """
    given, console = wanted.given, wanted.console
    console.start("Loading")
    if given["size"] is not None:
        bits = _bits(given)
        names = (
            *("device", "dtype", "keep_quantized", "memory_limit"),
            *("low_memory", "paired_heads", "seed"),
        )
        engine = synthetic_engine(given["size"], bits, **{name: given[name] for name in names})
        return engine, {"synthetic": True, "quantization": str(bits)}, {}
    subject = _stored(wanted)
    state = file_cache_state(sorted(subject.weights.folder.glob("*.safetensors")))
    since = time.perf_counter()
    engine = load_engine(given["model"], given, **_callbacks(console))
    load_ms = (time.perf_counter() - since) * 1000
    about = {"synthetic": False, "quantization": subject.quantization, "file_cache": state}
    return engine, about, {"load_ms": Series("ms", (load_ms,))}


def _bits(given: dict[str, Any]) -> int:
    return int(given["bits"] or 16)


def _callbacks(console: Console) -> dict[str, Any]:
    return {
        "say": lambda line: console.line(f"fastvlm: {line}"),
        "progress": console.report,
    }
