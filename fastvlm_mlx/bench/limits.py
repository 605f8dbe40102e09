"""How fast a stage could be at best: its operations and bytes against what a machine can do.

A roofline: no stage is done before its operations at the machine's peak, nor before its bytes at
the memory's bandwidth; the later of the two is the limit. Knows no chip (see `chips.py`) and
measures nothing (see `probe.py`). A peak that was measured can be exceeded by a better program, one
that was specified cannot: `Limit.source` says whose each is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastvlm_mlx.bench.costs import (
    Cost,
    Storage,
    WeightBytes,
    decode_cost,
    head_cost,
    prefill_cost,
    projector_cost,
    vision_cost,
)
from fastvlm_mlx.bench.results import PAPER_STAGES, Limit
from fastvlm_mlx.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What a machine can do in a second; None is unknown. `how` says how that is known.

    `dtype` is what `flops_s` (a multiply-add is two) was specified or measured for.
    """

    flops_s: float | None
    bandwidth_bytes_s: float | None
    dtype: str
    how: str


def stage_costs(
    config: ModelConfig,
    storage: Storage,
    *,
    resolution: int,
    images: int,
    prompt_tokens: int,
    generated_tokens: int,
    weights: WeightBytes | None = None,
) -> dict[str, Cost]:
    """Return each stage's cost by its figure's name; without pictures, none for the tower.

    `prompt_tokens` counts all positions, pictures' included. "decode_tps" is one token of the
    `generated_tokens`, the first left out, at their mean context. `weights` are the bytes really
    held (`held_weight_bytes`), the formula's if None. Raises ConfigError off the tower's grid.
    """
    decoder = config.decoder
    # The cost of a token is linear in its context, so the mean context's cost is the mean cost.
    context = prompt_tokens + max(0, generated_tokens - 2) // 2
    costs = {}
    if images:
        tokens = config.vision.tokens(resolution, resolution) * images
        costs["vision_ms"] = vision_cost(
            config.vision, storage, height=resolution, width=resolution, images=images
        )
        costs["projector_ms"] = projector_cost(config, storage, tokens=tokens)
    costs["prefill_ms"] = prefill_cost(decoder, storage, tokens=prompt_tokens)
    costs["first_token_ms"] = head_cost(decoder, storage)
    costs["decode_tps"] = decode_cost(decoder, storage, context=context)
    if weights is not None:
        head = weights.head or weights.table
        held = {
            "vision_ms": weights.vision,
            "projector_ms": weights.projector,
            "prefill_ms": weights.layers,
            "first_token_ms": head,
            "decode_tps": weights.layers + head,
        }
        costs = {name: replace(cost, weight_bytes=held[name]) for name, cost in costs.items()}
    return costs


def limits(
    costs: Mapping[str, Cost], *, chip: Peaks | None = None, probe: Peaks | None = None
) -> dict[str, Limit]:
    """Return each stage's limit, and that of "paper_ttft_ms", the sum over its stages.

    A peak is the chip's specified one where that is known, else the probe's. `probe_ms` is the
    limit by the probe alone: what programs like MLX's were seen to reach on this machine.
    """
    peaks = _preferred(chip, probe)
    found = {name: _limit(cost, peaks, probe) for name, cost in costs.items()}
    stages = [found[name] for name in PAPER_STAGES if name in found]
    if len(stages) == len(PAPER_STAGES):
        found["paper_ttft_ms"] = Limit(
            flops=sum(limit.flops for limit in stages),
            bytes=sum(limit.bytes for limit in stages),
            limit_ms=_sum([limit.limit_ms for limit in stages]),
            source=stages[0].source,
            probe_ms=_sum([limit.probe_ms for limit in stages]),
        )
    return found


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The peaks to use and, in words, whose they are."""

    flops_s: float | None
    bandwidth_bytes_s: float | None
    source: str


def _preferred(chip: Peaks | None, probe: Peaks | None) -> _Chosen:
    """Take each peak from the first that knows it."""
    compute = next((p for p in (chip, probe) if p is not None and p.flops_s), None)
    memory = next((p for p in (chip, probe) if p is not None and p.bandwidth_bytes_s), None)
    words = []
    if compute is not None and compute.flops_s:
        words.append(f"{compute.flops_s / 1e12:.3g} TFLOP/s in {compute.dtype}")
        if compute is not memory:
            words[-1] += f" ({compute.how})"
    if memory is not None and memory.bandwidth_bytes_s:
        words.append(f"{memory.bandwidth_bytes_s / 1e9:.3g} GB/s ({memory.how})")
    return _Chosen(
        None if compute is None else compute.flops_s,
        None if memory is None else memory.bandwidth_bytes_s,
        ", ".join(words),
    )


def _limit(cost: Cost, peaks: _Chosen, probe: Peaks | None) -> Limit:
    found = Limit(flops=cost.flops, bytes=cost.bytes, source=peaks.source)
    if probe is not None and probe.flops_s and probe.bandwidth_bytes_s:
        slowest = max(cost.flops / probe.flops_s, cost.bytes / probe.bandwidth_bytes_s)
        found = replace(found, probe_ms=slowest * 1000)
    if not (peaks.flops_s and peaks.bandwidth_bytes_s):
        return found
    compute, memory = cost.flops / peaks.flops_s, cost.bytes / peaks.bandwidth_bytes_s
    return replace(
        found,
        limit_ms=max(compute, memory) * 1000,
        bound="compute" if compute >= memory else "memory",
    )


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
