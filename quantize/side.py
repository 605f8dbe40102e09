"""One model of a comparison: what it weighs, how it is packed, how fast it answered.

Knows a folder's headers and the engine loaded from it. Knows no other model to compare with.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx.utils import tree_flatten

from fastvlm_mlx.checkpoint.store import PACKED, Checkpoint, open_checkpoint
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.events import Generation
from fastvlm_mlx.quantize.recipes import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A folder's weights: bytes of the files and of the decoder alone, bits a weight of both.

    A packed weight's bits include its share of scales and biases. What a file holds for other
    readers only is in its bytes, not in the bits a weight.
    """

    bytes: int
    decoder_bytes: int
    bits_per_weight: float
    decoder_bits_per_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over all questions, stages fenced: prompt to first token, and tokens a second."""

    prefill_ms: float | None
    decode_tps: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model: what it is on disk, what it computed in, how fast, how many exactly right.

    `packed` counts modules by setting. `exact` is None where nothing was right to begin with.
    """

    size: Size
    dtype: str
    packed: dict[str, int]
    kept_packed: bool
    speed: Speed | None
    exact: float | None


def describe(
    engine: Engine, answers: Sequence[Generation], *, vision_from: Path | None = None
) -> Side:
    """Return what a model is and how fast it answered; times only where kernels are its own."""
    checkpoint = open_checkpoint(engine.source, vision_from=vision_from)
    quant = checkpoint.config.quant
    paths = checkpoint.quantized_paths
    packed = Counter(str(Setting(*quant.of(path))) for path in paths) if quant else Counter()
    parameters = tree_flatten(engine.pipeline.model.parameters())
    kept_packed = any(name.endswith(".scales") for name, _ in parameters)
    return Side(
        size=weigh(checkpoint),
        dtype=str(engine.dtype).removeprefix("mlx.core."),
        packed=dict(sorted(packed.items())),
        kept_packed=kept_packed,
        speed=_speed(answers) if kept_packed or not paths else None,
        exact=None,
    )


def weigh(checkpoint: Checkpoint) -> Size:
    """Return the sizes of a folder's weights, from its headers."""
    files = {tensor.stored.file for tensor in checkpoint.tensors.values()}
    bits, weights = _bits_and_weights(checkpoint, "")
    decoder_bits, decoder_weights = _bits_and_weights(checkpoint, "decoder.")
    return Size(
        bytes=sum(file.stat().st_size for file in files),
        decoder_bytes=decoder_bits // 8,
        bits_per_weight=bits / weights,
        decoder_bits_per_weight=decoder_bits / decoder_weights,
    )


def _bits_and_weights(checkpoint: Checkpoint, part: str) -> tuple[int, int]:
    packed = set(checkpoint.quantized_paths)
    bits = weights = 0
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(part):
            continue
        path, _, leaf = name.rpartition(".")
        bits += tensor.stored.nbytes * 8
        if path not in packed or leaf not in PACKED:
            weights += math.prod(tensor.shape)
        elif leaf == "weight":
            weights += tensor.shape[0] * checkpoint.shapes[name][1]
    return bits, weights


def _speed(answers: Sequence[Generation]) -> Speed:
    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return Speed(
        prefill_ms=median([answer.stats.prefill_ms for answer in answers]),
        decode_tps=median([answer.stats.decode_tps for answer in answers]),
    )
