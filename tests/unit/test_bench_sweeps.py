"""Sweeps change one thing at a time, and hold one model at a time."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.bench import sweeps
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError

BASE = Case(resolution=256, images=1, prompt="short", max_tokens=4)


@pytest.mark.parametrize(
    ("cases", "field", "count"),
    [
        (sweeps.over_resolutions(BASE), "resolution", len(sweeps.RESOLUTIONS)),
        (sweeps.over_prompts(BASE), "prompt", len(sweeps.PROMPT_WORDS)),
        (sweeps.over_images(BASE), "images", len(sweeps.IMAGE_COUNTS)),
    ],
)
def test_a_sweep_changes_one_field_and_names_every_case(
    cases: tuple[Case, ...], field: str, count: int
) -> None:
    assert len(cases) == count == len({case.name for case in cases})
    for case in cases:
        assert dataclasses.replace(case, **{field: getattr(BASE, field)}) == BASE


def test_resolutions_go_from_256_to_1536_on_the_grid() -> None:
    assert (min(sweeps.RESOLUTIONS), max(sweeps.RESOLUTIONS)) == (256, 1536)
    assert not any(each % sweeps.GRID for each in sweeps.RESOLUTIONS)


@pytest.mark.parametrize(
    ("make", "steps", "said"),
    [
        (sweeps.over_resolutions, (256, 300), "300 pixels"),
        (sweeps.over_resolutions, (0,), "0 pixels"),
        (sweeps.over_prompts, (0,), "at least one word"),
        (sweeps.over_images, (1, -1), "-1 pictures"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused_in_one_line(make, steps, said) -> None:
    with pytest.raises(FastVLMError, match=said) as error:
        make(BASE, steps)
    assert "\n" not in str(error.value)


def test_each_packing_is_measured_packed_and_alone() -> None:
    alive: list[weakref.ref[object]] = []

    def measure(bits: int, engine: Engine) -> tuple[int, int]:
        gc.collect()
        assert not any(ref() for ref in alive), "the model before is still held"
        alive.append(weakref.ref(engine.pipeline.model))
        arrays = [array for _, array in tree_flatten(engine.pipeline.model.parameters())]
        packed = [array for array in arrays if array.dtype == mx.uint32]
        return len(packed), sum(array.nbytes for array in arrays)

    found = sweeps.over_quantizations("demo", measure, dtype="bfloat16")
    assert [found[16][0], found[8][0] > 0, found[4][0] > 0] == [0, True, True]
    assert found[16][1] > found[8][1] > found[4][1]
