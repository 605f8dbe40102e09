"""The tests' own checkpoint writers, held against inventories made by other people's code.

`keys_apple_*.json` come from instantiating Apple's mci.py, `keys_timm_*.json` from timm,
`mlx_vlm_convert.json` from running mlx-vlm's convert. Nothing of fastvlm_mlx is imported here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantizing
import sources
from fileformats import stored

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "fastvlm_mlx" / "demo"


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text())


@pytest.mark.parametrize("form", ["fused", "training"])
def test_apple_names_and_shapes_are_those_of_apples_own_module(form: str) -> None:
    translated = {
        sources.APPLE + sources.apple_key(key): shape
        for key, shape in read(f"keys_timm_{form}.json").items()
    }
    apple = read(f"keys_apple_{form}.json")
    apple.pop(sources.APPLE + "head.proj", None)  # the CLIP head, which timm's tower lacks
    assert translated == apple


def test_fast_vlm_names_are_those_transformers_saves() -> None:
    shapes = read("keys_timm_fused.json")
    made = sources.frozen_source({key: shapes[key] for key in _FEW}, DEMO).beside_tower()
    real = {key for key in read("keys_fast_vlm.json") if not key.startswith(sources.TIMM)}
    layers = ("model.language_model.layers.0.", "model.language_model.layers.1.")
    here = {k for k in real if "layers." not in k or k.startswith(layers)}
    assert set(made) == here - {"lm_head.weight"}  # tied: held once


# Enough of the tower for `frozen_source` to know its width.
_FEW = ("final_conv.se.fc1.weight",)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "dtype"), [("bf16", "BF16"), ("f32", "F32")])
def test_mlx_vlm_tensors_are_byte_for_byte_those_of_its_own_convert(run: str, dtype: str) -> None:
    """Real-size tower, one tensor at a time: key, dtype, shape and crc32 of every one."""
    wanted = read("mlx_vlm_convert.json")["runs"][run]["tensors"]
    made = {}
    for key, shape in read("keys_timm_fused.json").items():
        apple = sources.APPLE + sources.apple_key(key)
        name = sources.mlx_key(apple)
        if name is not None:
            values = sources.frozen_value(key, tuple(shape))
            made[name] = _row(sources.mlx_array(apple, values), dtype)
    few = {key: read("keys_timm_fused.json")[key] for key in _FEW}
    for name, values in sources.mlx_tensors(sources.frozen_source(few, DEMO)).items():
        made[name] = _row(values, dtype)
    assert made == wanted


def test_mlx_vlm_quantizes_what_its_own_convert_does() -> None:
    """Codes and scales depend on the machine's rounding; which, how wide and float ones don't."""
    wanted = read("mlx_vlm_convert.json")["runs"]["q4"]
    few = {key: read("keys_timm_fused.json")[key] for key in _FEW}
    floats = sources.mlx_tensors(sources.frozen_source(few, DEMO))
    packed, _, quantization = quantizing.quantize(floats, 4, "BF16")
    assert quantization == wanted["config"]["quantization"]
    beside_tower = {
        key: row for key, row in wanted["tensors"].items() if not key.startswith("vision_tower.")
    }
    made = {
        key: [value.dtype, list(value.shape), zlib.crc32(value.data)]
        for key, value in packed.items()
        if not key.startswith("vision_tower.")
    }
    assert {k: row[:2] for k, row in made.items()} == {k: r[:2] for k, r in beside_tower.items()}
    for key, row in made.items():
        if key.endswith("weight") and row[0] == "BF16":
            assert row == beside_tower[key], key


def _row(values: np.ndarray, dtype: str) -> list[Any]:
    value = stored(values, dtype)
    return [value.dtype, list(value.shape), zlib.crc32(value.data)]
