"""The native folder is, byte for byte, what mlx-vlm's own convert makes of the same checkpoint.

`mlx_vlm_convert.json` is the inventory that `make_mlx_vlm_reference.py` took of mlx-vlm's output: a
real-size tower, a small decoder, frozen weights. Here the same checkpoint goes through ours.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import source_folders
import sources
from asking import DEMO, HERE
from make_mlx_vlm_reference import inventory

from fastvlm_mlx.convert.pipeline import convert
from fastvlm_mlx.quantize.recipes import make_recipe

RUNS = json.loads((HERE / "mlx_vlm_convert.json").read_text())["runs"]


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = json.loads((HERE / "keys_timm_fused.json").read_text())
    folder = tmp_path_factory.mktemp("native") / "apple"
    source_folders.write_apple(folder, sources.frozen_source(shapes, DEMO), "BF16")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]  # a real checkpoint of Apple's has none
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("run", "dtype"), [("bf16", "bfloat16"), ("f32", "float32")])
def test_converted_tensors_are_those_of_mlx_vlms_convert(
    apple: Path, tmp_path: Path, run: str, dtype: str
) -> None:
    convert(apple, tmp_path / "native", dtype=dtype)
    assert inventory(tmp_path / "native") == RUNS[run]["tensors"]


@pytest.mark.slow
def test_quantized_tensors_are_those_of_mlx_vlms_convert(apple: Path, tmp_path: Path) -> None:
    """mlx-vlm packs the projector too; with --projector 4 so do we, and nothing else differs."""
    recipe = partial(make_recipe, "uniform", bits=4, embeddings=4, projector=4)
    convert(apple, tmp_path / "native", recipe=recipe)
    assert inventory(tmp_path / "native") == RUNS["q4"]["tensors"]
