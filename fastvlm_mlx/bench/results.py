"""What a benchmark found, as plain values: JSON in, JSON out, statistics of repeated measurements.

Knows the names, units and good direction of every figure. Knows no clock, no MLX and no model, so
that a result of another runtime, machine or day is read by the same code.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from fastvlm_mlx.errors import FastVLMError

SCHEMA = 1
NO_RESULT = "this is no result of `fastvlm bench --save`"

Unit = Literal["ms", "tokens/s", "bytes"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a figure is called, counted in, and which way is better."""

    label: str
    unit: Unit
    better: Better = "lower"


STAGES = (
    "image_decode_ms",
    "preprocess_ms",
    "vision_ms",
    "projector_ms",
    "prompt_ms",
    "prefill_ms",
    "first_token_ms",
)
"""The stages of a profiled call, in order; each is waited for, so they add up to more than TTFT."""
PAPER_STAGES = ("vision_ms", "projector_ms", "prefill_ms", "first_token_ms")
"""What the paper counts as TTFT: the encoder's latency and the decoder's prefill."""

METRICS: dict[str, Metric] = {
    "ttft_ms": Metric("TTFT", "ms"),
    "paper_ttft_ms": Metric("TTFT as the paper counts", "ms"),
    "image_decode_ms": Metric("image decode", "ms"),
    "preprocess_ms": Metric("preprocess", "ms"),
    "vision_ms": Metric("vision", "ms"),
    "projector_ms": Metric("projector", "ms"),
    "prompt_ms": Metric("prompt", "ms"),
    "prefill_ms": Metric("prefill", "ms"),
    "first_token_ms": Metric("first token", "ms"),
    "decode_tps": Metric("decode", "tokens/s", "higher"),
    "second_turn_ttft_ms": Metric("second turn TTFT", "ms"),
    "peak_bytes": Metric("peak memory", "bytes"),
    "load_ms": Metric("load", "ms"),
    "warm_up_ms": Metric("warm-up, model's size", "ms"),
    "cold_ttft_ms": Metric("cold TTFT", "ms"),
    "resident_bytes": Metric("resident memory", "bytes"),
    "active_bytes": Metric("MLX memory after loading", "bytes"),
}
"""Figures by name. TTFT: from the call with a path to the first token id on the host, model loaded
and warm, unfenced. As the paper counts: vision + projector + prefill + first token of a profiled
call (arXiv 2412.13303, section 4). Cold TTFT: from process start. Warm-up: `Engine.warm_up`, an
answer about a picture of the model's own size, whatever the cases' resolution."""


@dataclass(frozen=True, slots=True)
class Series:
    """Repeated measurements of one figure, in the order they were taken, warm-up left out."""

    unit: Unit
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a series needs finite values, not {self.values}")

    @property
    def n(self) -> int:
        """How many measurements there are."""
        return len(self.values)

    @property
    def median(self) -> float:
        """The middle value; the mean of the two middle ones if n is even."""
        return statistics.median(self.values)

    @property
    def p90(self) -> float:
        """The nearest-rank 90th percentile: the smallest value that 90 % do not exceed."""
        return sorted(self.values)[math.ceil(0.9 * self.n) - 1]

    @property
    def first_third(self) -> float:
        """The median of the first third, at least one value."""
        return statistics.median(self.values[: max(1, self.n // 3)])

    @property
    def last_third(self) -> float:
        """The median of the last third: above the first's where a machine heats up."""
        return statistics.median(self.values[-max(1, self.n // 3) :])

    def to_json(self) -> dict[str, Any]:
        """Return values and statistics; `from_json` reads the values alone."""
        return {
            "unit": self.unit,
            "median": self.median,
            "p90": self.p90,
            "n": self.n,
            "first_third": self.first_third,
            "last_third": self.last_third,
            "values": list(self.values),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read `to_json`'s output; raises KeyError, TypeError or ValueError for anything else."""
        return cls(values["unit"], tuple(float(value) for value in values["values"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload: `images` pictures of `resolution` pixels a side, a pinned prompt by name."""

    resolution: int
    images: int
    prompt: str
    max_tokens: int

    @property
    def name(self) -> str:
        """What people call it; equal for equal cases."""
        many = f"{self.images} image{'' if self.images == 1 else 's'}"
        length = f"{self.max_tokens} token{'' if self.max_tokens == 1 else 's'}"
        return f"{self.resolution} px, {many}, {self.prompt} prompt, {length}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The least a stage must do, and the least time that takes on this chip (a roofline).

    `flops` counts a multiply-add as two, `bytes` is memory that must be read or written once.
    `limit_ms` is None where the chip's peak is unknown. `source` says whose peak it is.
    `probe_ms` is the same by the peaks measured on this machine alone, None without a probe.
    """

    flops: float
    bytes: float
    limit_ms: float | None = None
    bound: Literal["compute", "memory"] | None = None
    source: str = ""
    probe_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What one workload took. `series` has names of METRICS, `limits` names of stages."""

    case: Case
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    series: dict[str, Series]
    limits: dict[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCard:
    """What ran it; None or "" is what could not be found out. `load_average` is at the start."""

    chip: str
    cpu_cores: int | None
    gpu_cores: int | None
    memory_bytes: int | None
    os: str
    power: str
    device: str
    python: str
    mlx: str
    backend: str
    blas: str
    load_average: float | None
    virtual: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Which weights. `quantization` is "16", "8" or "4" if synthetic, else as config.json says.

    `unpacked`: packed weights are held as floats, and computed with as such.
    """

    name: str
    synthetic: bool
    parameters: int
    weight_bytes: int
    dtype: str
    quantization: str
    fingerprint: str
    unpacked: bool = False

    @property
    def held(self) -> str:
        """How the weights lie in memory, in words."""
        return "unpacked" if self.unpacked else "as stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How it was measured: `runs` counted after `warm_up_runs` left out; the file cache's state.

    `low_memory` and `paired_heads` are the tower's forms, as `fastvlm_mlx.load` has them.
    """

    runs: int
    warm_up_runs: int
    seed: int
    file_cache: Literal["warm", "cold", "unknown"]
    low_memory: bool = False
    paired_heads: bool = False
    inputs: dict[str, str] = field(default_factory=dict)
    """Every picture and prompt used, by name: blake2b of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole run: one runtime, one model, one machine, its cases and what is measured once."""

    runtime: str
    created: str
    command: str
    machine: MachineCard
    model: ModelCard
    settings: Settings
    cases: tuple[CaseResult, ...]
    once: dict[str, Series] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Return one JSON object; NaN and infinity cannot be in it."""
        return {
            "schema": self.schema,
            "runtime": self.runtime,
            "created": self.created,
            "command": self.command,
            "machine": dataclasses.asdict(self.machine),
            "model": dataclasses.asdict(self.model),
            "settings": dataclasses.asdict(self.settings),
            "once": {name: series.to_json() for name, series in self.once.items()},
            "cases": [_case_json(result) for result in self.cases],
        }

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Read `to_json`'s output. Raises FastVLMError, one line, for anything else."""
        try:
            if values["schema"] != SCHEMA:
                raise FastVLMError(
                    f"this result has schema {values['schema']!r}, this version reads {SCHEMA}: "
                    "measure it again"
                )
            return cls(
                runtime=values["runtime"],
                created=values["created"],
                command=values["command"],
                machine=MachineCard(**values["machine"]),
                model=ModelCard(**values["model"]),
                settings=Settings(**values["settings"]),
                once={name: Series.from_json(s) for name, s in values["once"].items()},
                cases=tuple(_case(result) for result in values["cases"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FastVLMError(NO_RESULT) from error


def _case_json(result: CaseResult) -> dict[str, Any]:
    return {
        "case": dataclasses.asdict(result.case) | {"name": result.case.name},
        "prompt_tokens": result.prompt_tokens,
        "image_tokens": result.image_tokens,
        "generated_tokens": result.generated_tokens,
        "series": {name: series.to_json() for name, series in result.series.items()},
        "limits": {name: dataclasses.asdict(limit) for name, limit in result.limits.items()},
    }


def _case(values: dict[str, Any]) -> CaseResult:
    case = {name: value for name, value in values["case"].items() if name != "name"}
    return CaseResult(
        case=Case(**case),
        prompt_tokens=values["prompt_tokens"],
        image_tokens=values["image_tokens"],
        generated_tokens=values["generated_tokens"],
        series={name: Series.from_json(series) for name, series in values["series"].items()},
        limits={name: Limit(**limit) for name, limit in values["limits"].items()},
    )
