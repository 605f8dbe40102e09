"""What a runtime said and took in a comparison, as the report that `fastvlm bench` has of one.

Knows whose word counts for what: each for itself, ours for the machine and the weights. Measures
and compares nothing.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

from fastvlm_mlx.bench.harness import Tally
from fastvlm_mlx.bench.peer_runtime import PeerRuntime
from fastvlm_mlx.bench.results import (
    METRICS,
    CaseResult,
    MachineCard,
    ModelCard,
    Report,
    Series,
    Settings,
    Unit,
)
from fastvlm_mlx.bench.subject import Subject
from fastvlm_mlx.bench.turns import Turns
from fastvlm_mlx.config import ModelConfig


def card(
    runtime: PeerRuntime, ours: PeerRuntime, subject: Subject, settings: Settings, command: str
) -> Report:
    """Return a report without figures.

    Of the machine and the weights ours speaks where a runtime does not, as they are the same;
    nobody speaks for what a runtime computes with.
    """
    mine, theirs = ours.about, runtime.about
    versions = theirs["versions"]
    own = {"python": versions["python"], "mlx": versions.get("mlx", ""), "backend": "", "blas": ""}
    machine = MachineCard(**(mine["machine"] | own | theirs["machine"]))
    return Report(
        runtime=theirs["name"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=machine,
        model=ModelCard(
            name=subject.name,
            synthetic=subject.synthetic,
            parameters=theirs["parameters"] or mine["parameters"],
            weight_bytes=theirs["weight_bytes"],
            dtype=subject.weights.dtype,
            quantization=subject.quantization,
            fingerprint=theirs["fingerprint"] or mine["fingerprint"],
            unpacked=theirs["unpacked"],
        ),
        settings=settings,
        cases=(),
    )


def results(turns: Turns, runtime: PeerRuntime, config: ModelConfig) -> tuple[CaseResult, ...]:
    """Return a runtime's cases, those of them that were measured."""
    return tuple(
        _result(tally, beyond, config)
        for tally, beyond in zip(
            turns.tallies[runtime.name], turns.beyond[runtime.name], strict=True
        )
        if beyond
    )


def _result(tally: Tally, beyond: dict[str, list[float]], config: ModelConfig) -> CaseResult:
    case = tally.case
    tokens = config.vision.tokens(case.resolution, case.resolution)
    result = tally.result(case.images * tokens)
    return dataclasses.replace(result, series=result.series | _series(beyond))


def once(runtime: PeerRuntime, cold: dict[str, list[float]]) -> dict[str, Series]:
    """Return how long it took until the weights were there in the dtype that all compute in, and
    its cold starts' figures."""
    loaded = runtime.loaded["load_ms"] + runtime.loaded["cast_ms"]
    return _series({"load_ms": [loaded]} | cold)


def _series(figures: dict[str, list[float]]) -> dict[str, Series]:
    def unit(name: str) -> Unit:
        if name in METRICS:
            return METRICS[name].unit
        return "bytes" if name.endswith("_bytes") else "ms"

    return {name: Series(unit(name), tuple(values)) for name, values in figures.items()}
