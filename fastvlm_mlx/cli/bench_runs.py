"""What `fastvlm bench` measures, in order: cold starts, the model here, or it and other runtimes.

Knows what the options mean to the benchmark's parts, and what can be refused before anything runs.
Imported once a command line has been found sensible; knows no table and no file.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from fastvlm_mlx.backend import select_device
from fastvlm_mlx.bench import run
from fastvlm_mlx.bench.baseline import choose, require_comparable
from fastvlm_mlx.bench.compare import (
    Comparison,
    compare,
    compare_with_earlier,
    require_same_work,
)
from fastvlm_mlx.bench.peer_runtime import OURS, mlx_vlm
from fastvlm_mlx.bench.results import Report, Series
from fastvlm_mlx.bench.synthetic import BITS
from fastvlm_mlx.bench.turns import Plan
from fastvlm_mlx.cli.bench_cases import fitting, make_cases, require_common, require_their_tower
from fastvlm_mlx.cli.bench_options import MLX_VLM
from fastvlm_mlx.cli.bench_weights import (
    Wanted,
    callbacks,
    config_of,
    loaded,
    seed_of,
    start_cold,
    subject_of,
)
from fastvlm_mlx.cli.countdown import Countdown
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.prompt.processor import Processor

DEMO_NOTICE = (
    "fastvlm: measuring the demo model, which is tiny; for real sizes: --size 0.5b, or "
    "--model apple/FastVLM-0.5B"
)
PACKED_NOTICE = (
    "fastvlm: this sweep keeps 8 and 4 bits packed; --bits alone unpacks them on a CPU, unless "
    "--keep-quantized"
)


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
    if not wanted.earlier:
        return Measured((ours,))
    return Measured((ours,), compare_with_earlier(ours, choose(ours, wanted.earlier)))


def _every_packing(wanted: Wanted) -> Iterator[Report]:
    """Yield a report for each number of bits, one model at a time in memory.

    Unpacked, as a CPU has them by default, all would be the same model.
    """
    if select_device(wanted.given["device"]).type == mx.DeviceType.cpu:
        wanted.console.line(PACKED_NOTICE)
    for bits in BITS:
        yield _alone(wanted.with_(bits=str(bits), keep_quantized=True))
        gc.collect()
        mx.clear_cache()


def _alone(wanted: Wanted) -> Report:
    """Measure our engine in this process; cold starts before anything is loaded in it."""
    given, console = wanted.given, wanted.console
    cases = make_cases(given, config_of(wanted))
    for result in (wanted.earlier, wanted.baseline):
        require_common(cases, result)
    cold = start_cold(wanted, cases[0])
    engine, about, once = loaded(wanted)
    processor, say = engine.pipeline.processor, callbacks(console)["say"]
    cases = fitting(cases, given, engine.config, processor, say)
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
        seed=seed_of(wanted),
        command=wanted.typed,
        photo=given["photo"],
        paired_heads=given["paired_heads"],
        **about,
    )
    if wanted.baseline:
        require_comparable(report, choose(report, wanted.baseline))
    if wanted.earlier:
        require_same_work(report, choose(report, wanted.earlier))
    console.start("Warming up")
    once["warm_up_ms"] = Series("ms", (engine.warm_up(),))
    console.start("Measuring")
    countdown = Countdown(console, (given["runs"] + given["warm_up"]) * len(cases))
    report = dataclasses.replace(report, once=once)
    return run.measure(report, engine, cases, photo=given["photo"], say=countdown)


def _beside_mlx_vlm(wanted: Wanted) -> Measured:
    """Measure our engine and mlx-vlm in turn, each in a process of its own.

    If mlx-vlm fails after it measured something, that is kept and a line says so.
    """
    given, console = wanted.given, wanted.console
    contenders = (OURS, mlx_vlm(given["peer_python"]))
    require_their_tower(config_of(wanted))
    with subject_of(wanted) as subject:
        processor = Processor.from_folder(
            subject.weights.folder,
            image_size=subject.config.vision.image_size,
            image_mode=subject.config.image_mode,
        )
        say = callbacks(console)["say"]
        cases = fitting(make_cases(given, subject.config), given, subject.config, processor, say)
        runs, cold_runs = given["runs"], given["cold"] or 0
        plan = Plan(
            rounds=runs,
            warm_up_runs=given["warm_up"],
            second_turns=runs,
            cold_runs=cold_runs,
            photo=given["photo"],
        )
        console.start("Comparing")
        total = ((runs + given["warm_up"]) * len(cases) + cold_runs) * len(contenders)
        countdown = Countdown(console, total)

        def dropped(name: str, error: FastVLMError) -> None:
            say(f"{name} is out from here on: {error}")

        found = compare(
            contenders,
            subject,
            cases,
            plan,
            command=wanted.typed,
            say=countdown,
            dropped=dropped,
        )
        ours = found.reports[0]
        storage = run.storage_as(
            subject.config, subject.weights.dtype, packed=not ours.model.unpacked
        )
        ours = run.with_limits(ours, subject.config, storage)
    reports = (ours, *found.reports[1:])
    return Measured((ours,), dataclasses.replace(found, reports=reports))
