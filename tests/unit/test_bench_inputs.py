"""Pinned inputs: the same pixels and words today, tomorrow and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.bench import inputs
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.prompt.tokenizer import Tokenizer

CASE = Case(resolution=256, images=2, prompt="short", max_tokens=4)
DEMO = Path(inputs.__file__).parents[1] / "demo"


@pytest.mark.parametrize(
    ("width", "height", "index", "pinned"),
    [
        (256, 256, 0, "c093bc2b3d2d35dd99bf5b96f9167413"),
        (256, 256, 3, "28417d7805c2324ae1552750e46b9ddf"),
        (1024, 1024, 0, "023f0f7e68223e4edc1024167cf53696"),
        (1536, 1536, 1, "cb79c2bac0b3999b9c8937756204af26"),
        pytest.param(4032, 3024, 0, "9d124349a75103b4330a24aff87c6a81", marks=pytest.mark.slow),
    ],
)
def test_pixels_are_pinned(width: int, height: int, index: int, pinned: str) -> None:
    picture = inputs.pixels(width, height, index)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    assert inputs.digest(picture.tobytes()) == pinned


@pytest.mark.parametrize(
    ("name", "pinned"),
    [
        ("short", "fe1410e32fc24040f5f0c17f73ce4596"),
        ("medium", "526f457b556a4b6033483e50be2bd700"),
        ("long", "9dc94282ff52e1a5c1cbbf48d395cdbd"),
        ("100 words", "0230219ce1f866d5dbc5e51c2a1ed78c"),
    ],
)
def test_prompts_are_pinned(name: str, pinned: str) -> None:
    assert inputs.digest(inputs.prompt_text(name).encode()) == pinned


def test_every_named_prompt_is_pinned_and_its_tokens_are_as_said() -> None:
    tokenizer = Tokenizer.from_folder(DEMO)
    counts = {name: len(tokenizer.encode(text)) for name, text in inputs.PROMPTS.items()}
    assert counts == {"short": 4, "medium": 134, "long": 1012}


def test_pictures_are_unlike_each_other_and_have_many_colours() -> None:
    one, other = inputs.pixels(256, 256, 0), inputs.pixels(256, 256, 1)
    assert np.mean(one != other) > 0.5
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 5000
    assert len(inputs.picture(256)) > 10_000, "a flat picture would decode too fast"


def test_a_picture_is_a_jpeg_of_the_pinned_pixels() -> None:
    decoded = Image.open(io.BytesIO(inputs.picture(256, 1)))
    assert (decoded.format, decoded.size, decoded.mode) == ("JPEG", (256, 256), "RGB")
    error = np.asarray(decoded, np.int32) - inputs.pixels(256, 256, 1)
    assert np.abs(error).mean() < 8


def test_files_are_written_once_and_are_gone_afterwards() -> None:
    with inputs.input_files() as files:
        paths = files.paths(CASE)
        written = [path.stat().st_mtime_ns for path in paths]
        assert [path.stat().st_mtime_ns for path in files.paths(CASE)] == written
        assert paths[0].read_bytes() == inputs.picture(256, 0)
        assert len({path.read_bytes() for path in paths}) == 2
    assert not files.folder.exists()


def test_a_folder_goes_even_if_the_run_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), inputs.input_files() as files:
        files.paths(CASE)
        raise KeyboardInterrupt
    assert not files.folder.exists()


def test_digests_name_each_input_once() -> None:
    with inputs.input_files() as files:
        found = files.digests(
            [CASE, CASE, Case(resolution=64, images=1, prompt="8 words", max_tokens=1)]
        )
    assert sorted(found) == [
        "picture 0, 256x256",
        "picture 0, 64x64",
        "picture 1, 256x256",
        "prompt 8 words",
        "prompt short",
    ]
    assert found["picture 1, 256x256"] == inputs.digest(inputs.pixels(256, 256, 1).tobytes())


def test_a_photo_has_twelve_megapixels_whatever_the_tower_sees() -> None:
    files = inputs.InputFiles(Path(), photo=True)
    assert files.size(CASE) == inputs.PHOTO_SIZE == (4032, 3024)


@pytest.mark.parametrize("name", ["", "huge", "0 words", "-1 words", "5", "five words", "5 pages"])
def test_an_unknown_prompt_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(FastVLMError) as error:
        inputs.prompt_text(name)
    assert "\n" not in str(error.value)
