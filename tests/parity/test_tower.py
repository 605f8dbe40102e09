"""The real-size tower against timm's `fastvit_mci3` in float64 (`make_tower_reference.py`).

Through the front door: frozen weights are written as a transformers fast_vlm folder, opened,
folded and run. The tolerances are the project's: relative RMS 1e-5 in float32, 5e-2 in bfloat16
(8 bits of mantissa through 44 blocks; the rest of the engine's error is far below).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frozen
import mlx.core as mx
import numpy as np
import pytest
import source_folders
import sources
from asking import DEMO, HERE, relative_rms

from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.model.vision import FastViTHD

pytestmark = pytest.mark.slow  # 125 million frozen weights a form


@pytest.fixture(scope="module")
def reference() -> Any:
    with np.load(HERE / "tower.npz") as archive:
        yield {name: archive[name] for name in archive.files}


def write_folder(folder: Path, form: str) -> Path:
    shapes = json.loads((HERE / f"keys_timm_{form}.json").read_text())
    return source_folders.write_fast_vlm(folder, sources.frozen_source(shapes, DEMO), "BF16")


@pytest.fixture(scope="module")
def fused_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tower") / "fused", "fused")


@pytest.fixture(scope="module")
def fused_tower(fused_folder: Path) -> Iterator[FastViTHD]:
    yield load_model(open_checkpoint(fused_folder), mx.float32, dequantize=False).vision


def run(tower: FastViTHD, reference: Any, case: str) -> np.ndarray:
    info = json.loads(str(reference["cases"]))["cases"][case]
    pixels = frozen.picture(info["height"], info["width"], info["seed"])
    return np.array(tower(mx.array(pixels)[None])[0].astype(mx.float32))


@pytest.mark.parametrize("case", ["fused_256", "fused_192x320"])
def test_fused_form_equals_timm_square_and_not(
    fused_tower: FastViTHD, reference: Any, case: str
) -> None:
    """192 x 320 as well: a port that swaps height and width is right on squares only."""
    assert relative_rms(run(fused_tower, reference, case), reference[case]) <= 1e-5


def test_plain_form_equals_timm_too(fused_folder: Path, reference: Any) -> None:
    """A CPU loads a form of its own, which the test above runs there: 7.2e-7, this one 7.0e-7."""
    checkpoint = open_checkpoint(fused_folder)
    tower = load_model(checkpoint, mx.float32, dequantize=False, cpu_forms=False).vision
    assert tower.form is None
    assert relative_rms(run(tower, reference, "fused_256"), reference["fused_256"]) <= 1e-5


def test_full_resolution_equals_timm(fused_tower: FastViTHD, reference: Any) -> None:
    """Every 17th token value by value; all 256 by each channel's mean and spread."""
    every = run(fused_tower, reference, "fused_1024")
    kept = every[reference["fused_1024.tokens"]]
    assert relative_rms(kept, reference["fused_1024"]) <= 1e-5
    assert relative_rms(every.mean(0), reference["fused_1024.mean"]) <= 1e-5
    assert relative_rms(every.std(0), reference["fused_1024.std"]) <= 1e-5


def test_full_resolution_in_bfloat16_stays_close(fused_folder: Path, reference: Any) -> None:
    """Two minutes on two cores, where half precision is slow; measured 1.6e-2."""
    tower = load_model(open_checkpoint(fused_folder), mx.bfloat16, dequantize=False).vision
    kept = run(tower, reference, "fused_1024")[reference["fused_1024.tokens"]]
    assert relative_rms(kept, reference["fused_1024"]) <= 5e-2


def test_training_form_equals_timm(reference: Any, tmp_path: Path) -> None:
    """timm ran all branches; we run what they fold into."""
    folder = write_folder(tmp_path / "training", "training")
    tower = load_model(open_checkpoint(folder), mx.float32, dequantize=False).vision
    assert relative_rms(run(tower, reference, "training_256"), reference["training_256"]) <= 1e-5


def test_bfloat16_stays_near_timm(fused_folder: Path, reference: Any) -> None:
    tower = load_model(open_checkpoint(fused_folder), mx.bfloat16, dequantize=False).vision
    assert tower.stem.weight.dtype == mx.bfloat16
    assert relative_rms(run(tower, reference, "fused_256"), reference["fused_256"]) <= 5e-2


def test_another_picture_gives_other_features(fused_tower: FastViTHD, reference: Any) -> None:
    """The tolerance means something: unlike pictures differ a thousand times more than it."""
    one = run(fused_tower, reference, "fused_256")
    other = np.array(fused_tower(mx.array(frozen.picture(256, 256, 2))[None])[0])
    assert relative_rms(other, one) >= 1e-2
