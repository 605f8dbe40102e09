"""Reports made up for tests: every figure is chosen so that its place in a table can be named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastvlm_mlx.bench.results import (
    METRICS,
    Case,
    CaseResult,
    Limit,
    MachineCard,
    ModelCard,
    Report,
    Series,
    Settings,
)

STAGE_MS = {
    "image_decode_ms": 2.0,
    "preprocess_ms": 3.0,
    "vision_ms": 60.0,
    "projector_ms": 1.0,
    "prompt_ms": 0.5,
    "prefill_ms": 30.0,
    "first_token_ms": 3.5,
}


def made_machine(**changed: object) -> MachineCard:
    values: dict[str, object] = {
        "chip": "Apple M9 Example",
        "cpu_cores": 8,
        "gpu_cores": 10,
        "memory_bytes": 16 * 10**9,
        "os": "macOS 26.2",
        "power": "on battery",
        "device": "gpu",
        "python": "3.12.4",
        "mlx": "0.32.4",
        "backend": "metal",
        "blas": "",
        "load_average": 1.25,
        "virtual": False,
    }
    return MachineCard(**(values | changed))  # type: ignore[arg-type]


def made_case(
    resolution: int = 512,
    *,
    images: int = 1,
    prompt: str = "short",
    factor: float = 1.0,
    runs: int = 10,
    series: Mapping[str, Sequence[float]] | None = None,
    limits: Mapping[str, Limit] | None = None,
) -> CaseResult:
    """A case whose times are `factor` times as long; its n-th run of `runs` n percent slower."""
    slower = [1 + 0.01 * run for run in range(runs)]
    times = {"ttft_ms": 90.0, "paper_ttft_ms": 94.5, "second_turn_ttft_ms": 9.0, **STAGE_MS}
    found = {
        name: Series("ms", tuple(value * factor * part for part in slower))
        for name, value in times.items()
    }
    found["decode_tps"] = Series("tokens/s", tuple(50.0 / factor / part for part in slower))
    found["peak_bytes"] = Series("bytes", (1.5e9,) * runs)
    for name, values in (series or {}).items():
        found[name] = Series(METRICS[name].unit, tuple(values))
    return CaseResult(
        case=Case(resolution=resolution, images=images, prompt=prompt, max_tokens=64),
        prompt_tokens=90,
        image_tokens=64,
        generated_tokens=64,
        series=found,
        limits=dict(limits or {}),
    )


def made_report(
    *cases: CaseResult,
    runtime: str = "fastvlm-mlx 0.1.0",
    inputs: Mapping[str, str] | None = None,
    once: Mapping[str, Series] | None = None,
    machine: MachineCard | None = None,
    file_cache: str = "warm",
    settings: Mapping[str, object] | None = None,
    **model: object,
) -> Report:
    card: dict[str, object] = {
        "name": "0.5b",
        "synthetic": True,
        "parameters": 758_800_000,
        "weight_bytes": 1_517_600_000,
        "dtype": "bfloat16",
        "quantization": "16",
        "fingerprint": "0123456789abcdef",
    }
    return Report(
        runtime=runtime,
        created="2026-01-02T03:04:05+00:00",
        command="fastvlm bench --size 0.5b",
        machine=machine or made_machine(),
        model=ModelCard(**(card | model)),  # type: ignore[arg-type]
        settings=replace(
            Settings(
                runs=10,
                warm_up_runs=2,
                seed=0,
                file_cache=file_cache,  # type: ignore[arg-type]
                inputs=dict(
                    inputs or {"picture 512": "a1b2c3d4" * 8, "short prompt": "99887766" * 8}
                ),
            ),
            **(settings or {}),  # type: ignore[arg-type]
        ),
        cases=cases or (made_case(),),
        once=dict(once or {}),
    )


VISION_LIMIT = Limit(
    flops=120e9,
    bytes=0.4e9,
    limit_ms=30.0,
    bound="compute",
    source="Apple M9 Example: 4 TFLOPS in half precision, 100 GB/s, both measured by the probe",
)
