"""The demo model against transformers' own FastVlmForConditionalGeneration, float32.

`demo.json` and `demo.npz` come from `make_demo_reference.py`. Pixels, prompts and ids are made
here by the engine's own processor and loop, from the same pictures and questions. The logits'
tolerance is 1e-4; every greedy id's margin in the reference is at least 20 times that, so equal ids
prove something and unequal ones are no accident of rounding.
"""

from __future__ import annotations

import hashlib
import re
from itertools import islice
from typing import Any

import demo_cases
import mlx.core as mx
import numpy as np
import pytest
from asking import (
    CASES,
    DEMO,
    HERE,
    REFERENCE,
    barred_ids,
    greedy_ids,
    last_logits,
    relative_rms,
    rendered,
)

import fastvlm_mlx as fv
from fastvlm_mlx.prompt.processor import TextIds

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def arrays() -> Any:
    with np.load(HERE / "demo.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load(DEMO, dtype="float32")


def test_reference_was_made_from_these_weights() -> None:
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert digest == REFERENCE["weights_sha256"], "run tests/parity/make_demo_reference.py again"


def test_margins_make_equal_ids_a_proof() -> None:
    for name, case in CASES.items():
        for kind in ("", "barred_"):
            ids, margins = case[f"{kind}ids"], case[f"{kind}margins"]
            assert len(margins) == len(ids) == 32
            assert min(margins) >= 20 * LOGIT_TOLERANCE, name
        assert len(set(case["barred_ids"])) >= 8, name


@pytest.mark.parametrize("name", demo_cases.PICTURES)
def test_pixels_are_those_transformers_saw(engine: fv.Engine, name: str) -> None:
    pixels = engine.pipeline.processor.pixels(demo_cases.picture(name))
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == REFERENCE["padded_pixels_sha256"][name]


@pytest.mark.parametrize("name", demo_cases.PICTURES)
def test_tower_and_projector_equal_transformers(engine: fv.Engine, arrays: Any, name: str) -> None:
    pixels = engine.pipeline.processor.pixels(demo_cases.picture(name))
    tower = np.array(engine.pipeline.model.vision(mx.array(pixels)[None])[0])
    projected = np.array(engine.encode(demo_cases.picture(name)).features)
    for ours, theirs in (
        (tower, arrays[f"{name}.tower"]),
        (projected, arrays[f"{name}.projected"]),
    ):
        assert relative_rms(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_prompt_segments_equal_transformers(engine: fv.Engine, name: str) -> None:
    """Text on each side of a picture is tokenized apart, the picture is a slot."""
    ours = [
        list(segment.ids) if isinstance(segment, TextIds) else None
        for segment in rendered(engine, CASES[name]).segments
    ]
    assert ours == CASES[name]["segments"]


@pytest.mark.parametrize("name", CASES)
def test_last_logits_equal_transformers(engine: fv.Engine, arrays: Any, name: str) -> None:
    logits = last_logits(engine, CASES[name])
    theirs = arrays[f"{name}.logits"]
    assert logits.shape == theirs.shape
    assert np.abs(logits - theirs).max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_equal_transformers(engine: fv.Engine, name: str) -> None:
    assert greedy_ids(engine, CASES[name]) == CASES[name]["ids"]


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_equal_transformers_where_stopping_is_barred(
    engine: fv.Engine, name: str
) -> None:
    """Behind a short answer only <|im_end|> follows; with it barred all 32 ids are words."""
    assert barred_ids(engine, CASES[name]) == CASES[name]["barred_ids"]


@pytest.mark.parametrize(
    ("one", "other"), [("one image", "other image"), ("two images", "two images swapped")]
)
def test_swapping_the_picture_changes_the_ids(engine: fv.Engine, one: str, other: str) -> None:
    """Greedy parity on default weights proved nothing: the same ids came for any picture."""
    assert CASES[one]["question"] == CASES[other]["question"]
    swapped = {**CASES[one], "pictures": CASES[other]["pictures"]}
    assert greedy_ids(engine, CASES[one]) != greedy_ids(engine, swapped)
    assert greedy_ids(engine, swapped) == CASES[other]["ids"]
    assert barred_ids(engine, swapped) == CASES[other]["barred_ids"]


@pytest.mark.parametrize("name", CASES)
def test_three_beams_equal_transformers(engine: fv.Engine, name: str) -> None:
    case = CASES[name]
    images = [demo_cases.picture(picture) for picture in case["pictures"]]
    answer = engine.generate(case["question"], images=images, num_beams=3, max_tokens=32)
    assert list(answer.token_ids) == case["beams"]


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_ids_up_to_the_stop(engine: fv.Engine, name: str) -> None:
    case = CASES[name]
    images = [demo_cases.picture(picture) for picture in case["pictures"]]
    stop_ids = engine.pipeline.stop_ids
    answer = engine.generate(case["question"], images=images, max_tokens=32)
    until = next(i for i, token in enumerate(case["ids"]) if token in stop_ids)
    assert list(answer.token_ids) == list(islice(case["ids"], until + 1))
    assert answer.finish_reason == "stop"
    assert answer.text == re.split(r"<\|(?:im_end|endoftext)\|>", case["text"])[0]
