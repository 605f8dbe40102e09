"""One engine's whole benchmark as a Report: who ran what on what, its cases, and their limits.

Joins the cards, the measuring loop and the physical limits. Knows no command line, no table and
no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, cast

import mlx.core as mx

from fastvlm_mlx import __version__
from fastvlm_mlx.bench.chips import chip_peaks
from fastvlm_mlx.bench.costs import DType, Storage, WeightBytes, held_weight_bytes, weight_bytes
from fastvlm_mlx.bench.harness import Say, run_cases
from fastvlm_mlx.bench.inputs import input_files
from fastvlm_mlx.bench.limits import limits, stage_costs
from fastvlm_mlx.bench.machine import machine_card
from fastvlm_mlx.bench.probe import measure_peaks
from fastvlm_mlx.bench.results import Case, CaseResult, ModelCard, Report, Series, Settings
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.model.fused_qwen2 import source_weights


def describe(
    engine: Engine,
    cases: Sequence[Case],
    *,
    synthetic: bool,
    quantization: str,
    runs: int,
    warm_up_runs: int,
    seed: int,
    file_cache: Literal["warm", "cold", "unknown"] = "unknown",
    command: str = "",
    photo: bool = False,
    paired_heads: bool = False,
) -> Report:
    """Return a report of what is about to be measured, without cases yet.

    `quantization` is `ModelCard`'s, `paired_heads` what the engine was loaded with.
    Reads all weights once, for their fingerprint.
    """
    with input_files(photo=photo) as files:
        inputs = files.digests(cases)
    return Report(
        runtime=f"fastvlm-mlx {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=machine_card(),
        model=ModelCard(
            name=engine.name,
            synthetic=synthetic,
            parameters=count_parameters(engine.config),
            weight_bytes=held_weights(engine).total,
            dtype=dtype_name(engine),
            quantization=quantization,
            fingerprint=engine.pipeline.fingerprint,
            unpacked=engine.config.quant is not None and not _holds_packed(engine),
        ),
        settings=Settings(
            runs=runs,
            warm_up_runs=warm_up_runs,
            seed=seed,
            file_cache=file_cache,
            low_memory=engine.pipeline.model.vision.low_memory,
            paired_heads=paired_heads,
            inputs=inputs,
        ),
        cases=(),
    )


def measure(
    report: Report,
    engine: Engine,
    cases: Sequence[Case],
    *,
    second_turn: bool = True,
    photo: bool = False,
    say: Say = lambda _: None,
) -> Report:
    """Return `describe`'s report with every case measured, its limits, and the memory held.

    Errors are `harness.run_cases`'s: a case that does not fit the model is refused before any run.
    """
    active = Series("bytes", (float(mx.get_active_memory()),))
    measured = run_cases(
        engine,
        cases,
        runs=report.settings.runs,
        warm_up_runs=report.settings.warm_up_runs,
        second_turn=second_turn,
        photo=photo,
        say=say,
    )
    report = dataclasses.replace(
        report, cases=measured, once=report.once | {"active_bytes": active}
    )
    # After the runs, which it would only heat the machine for.
    say("measuring what this machine can do at best")
    return with_limits(report, engine.config, storage_of(engine), weights=held_weights(engine))


def with_limits(
    report: Report, config: ModelConfig, storage: Storage, *, weights: WeightBytes | None = None
) -> Report:
    """Return a report with the least that each stage must do and take; measures this machine.

    `weights` are the bytes really held, the formula's if None. MLX's device must be the report's.
    """
    chip = chip_peaks(report.machine, storage.dtype)
    probe = measure_peaks(getattr(mx, storage.dtype))

    def limited(result: CaseResult) -> CaseResult:
        costs = stage_costs(
            config,
            storage,
            resolution=result.case.resolution,
            images=result.case.images,
            prompt_tokens=result.prompt_tokens,
            generated_tokens=result.generated_tokens,
            weights=weights,
        )
        found = limits(costs, chip=chip, probe=probe)
        return dataclasses.replace(
            result, limits={name: limit for name, limit in found.items() if name in result.series}
        )

    return dataclasses.replace(report, cases=tuple(limited(result) for result in report.cases))


def storage_of(engine: Engine) -> Storage:
    """Return how an engine's weights lie in memory now: on a CPU mostly unpacked."""
    return storage_as(engine.config, dtype_name(engine), packed=_holds_packed(engine))


def storage_as(config: ModelConfig, dtype: str, *, packed: bool) -> Storage:
    """Return how a model's weights lie in memory, packed as its files have them or as floats."""
    kind, quant = cast(DType, dtype), config.quant
    if quant is None or not packed:
        return Storage(dtype=kind)
    return Storage(dtype=kind, bits=quant.bits, group_size=quant.group_size)


def _holds_packed(engine: Engine) -> bool:
    return any(name.endswith(".scales") for name in source_weights(engine.pipeline.model))


def held_weights(engine: Engine) -> WeightBytes:
    """Return the bytes of an engine's weights by the stage that reads them."""
    weights = source_weights(engine.pipeline.model)
    return held_weight_bytes({name: array.nbytes for name, array in weights.items()})


def count_parameters(config: ModelConfig) -> int:
    """Return how many numbers the weights are, folded, packed or not; a tied head counts once."""
    return weight_bytes(config, Storage(dtype="float32")).total // 4


def dtype_name(engine: Engine) -> str:
    """Return what activations are computed in: "float32", "bfloat16" or "float16"."""
    return str(engine.dtype).removeprefix("mlx.core.")
