"""A command line's pictures, decoded and fitted in a thread beside imports and weight reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx import engine as engine_module
from fastvlm_mlx.cli.inputs import Pictures
from fastvlm_mlx.errors import ConfigError, ImageError
from tests.parity import frozen

WHITE = (255, 255, 255)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(frozen.picture(200, 320, 4)).save(path)
    return path


@pytest.mark.parametrize("mode", [None, "pad", "crop"])
@pytest.mark.parametrize("resolution", [None, 128])
def test_pictures_fitted_ahead_are_the_pixels_the_engine_would_make(
    photo: Path, resolution: int | None, mode: str | None
) -> None:
    pictures = Pictures([str(photo)], WHITE, asked=True)
    pictures.check()
    engine = fv.load("demo", on_config=lambda config: pictures.fit(config, resolution, mode))
    form = {"resolution": resolution, "image_mode": mode}
    [ahead] = pictures.pixels()
    one, other = engine.encode(ahead, **form), engine.encode(str(photo), **form)
    assert one.digest == other.digest


def test_fitting_begins_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = engine_module.load_model

    def read(*args, **options):  # type: ignore[no-untyped-def]
        order.append("weights")
        return real(*args, **options)

    monkeypatch.setattr(engine_module, "load_model", read)
    fv.load("demo", on_config=lambda config: order.append("config"))
    assert order == ["config", "weights"]


def test_a_resolution_off_the_grid_ends_it_before_weights_are_read(photo: Path) -> None:
    pictures = Pictures([str(photo)], WHITE, asked=True)
    with pytest.raises(ConfigError, match="multiple of 64"):
        fv.load("demo", on_config=lambda config: pictures.fit(config, 100, None))


def test_a_broken_picture_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG nothing more")
    pictures = Pictures([str(path)], WHITE, asked=True)
    with pytest.raises(ImageError, match=r"broken\.png"):
        pictures.check()


def test_of_many_pictures_only_the_first_few_are_held_decoded(tmp_path: Path) -> None:
    """Fifty photos of 12 megapixels would be 1.8 GB beside the model's weights."""
    paths = []
    for number in range(7):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(frozen.picture(64, 96, number)).save(paths[-1])
    pictures = Pictures(paths, WHITE, asked=True)
    pictures.check()
    engine = fv.load("demo", on_config=lambda config: pictures.fit(config, 128, None))
    given = pictures.pixels()
    assert [type(picture) for picture in given] == [np.ndarray] * 4 + [bytes] * 3
    digests = [engine.encode(picture, resolution=128).digest for picture in given]
    assert digests == [engine.encode(path, resolution=128).digest for path in paths]


def test_pictures_that_are_only_checked_are_not_held() -> None:
    path = Path(__file__).parents[2] / "examples" / "images" / "number_42.png"
    pictures = Pictures([str(path)], WHITE, asked=True, ahead=False)
    pictures.check()
    assert pictures._decoding[0].result() is None and pictures.pixels() == pictures.encoded
