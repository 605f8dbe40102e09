"""Lists of cases that differ in one thing: resolution, prompt, number of pictures, packing.

Knows which steps show how a cost grows. Measures nothing.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from fastvlm_mlx.bench.inputs import prompt_text
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.bench.synthetic import BITS, synthetic_engine
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError

GRID = 64
"""Pixels a side of one token: every resolution is a multiple."""
RESOLUTIONS = (256, 384, 512, 768, 1024, 1280, 1536)
"""Pixels a side."""
PROMPT_WORDS = (8, 64, 128, 256, 512, 1024)
IMAGE_COUNTS = (1, 2, 3, 4)

Found = TypeVar("Found")


def over_resolutions(base: Case, resolutions: Sequence[int] = RESOLUTIONS) -> tuple[Case, ...]:
    """Return `base` at each resolution. Raises FastVLMError for one off the grid."""
    for resolution in resolutions:
        if resolution < GRID or resolution % GRID:
            raise FastVLMError(f"{resolution} pixels are no multiple of {GRID}: the tower's grid")
    return tuple(dataclasses.replace(base, resolution=each) for each in resolutions)


def over_prompts(base: Case, word_counts: Sequence[int] = PROMPT_WORDS) -> tuple[Case, ...]:
    """Return `base` with prompts of so many words. Raises FastVLMError for fewer than one."""
    cases = tuple(dataclasses.replace(base, prompt=f"{count} words") for count in word_counts)
    for case in cases:
        prompt_text(case.prompt)
    return cases


def over_images(base: Case, counts: Sequence[int] = IMAGE_COUNTS) -> tuple[Case, ...]:
    """Return `base` with so many pictures. Raises FastVLMError for a negative number."""
    if min(counts) < 0:
        raise FastVLMError(f"{min(counts)} pictures cannot be shown")
    return tuple(dataclasses.replace(base, images=count) for count in counts)


def over_quantizations(
    size: str,
    measure: Callable[[int, Engine], Found],
    *,
    bits: Sequence[int] = BITS,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[int, Found]:
    """Return what `measure` finds of a synthetic model in each number of bits.

    One model is in memory at a time: `measure` must not keep it. Weights stay packed on a CPU too,
    which is the question here. Errors are `synthetic_engine`'s, and `measure`'s.
    """
    found = {}
    for each in bits:
        engine = synthetic_engine(
            size, each, seed=seed, device=device, dtype=dtype, keep_quantized=True
        )
        found[each] = measure(each, engine)
        del engine
        gc.collect()
        mx.clear_cache()
    return found
