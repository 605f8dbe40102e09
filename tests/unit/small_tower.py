"""The small reference tower of tests/parity: frozen timm weights through our tables and folds.

Its widths grow by 2, 1, 2 and 3 between stages, and its reference was computed by timm in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.checkpoint import fuse
from fastvlm_mlx.checkpoint.layouts import LAYOUTS
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.vision import FastViTHD, pixel_fold

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))

import frozen  # noqa: E402

REFERENCE = np.load(PARITY / "tower_small.npz")
INFO: dict[str, Any] = json.loads(str(REFERENCE["cases"]))
CONFIG = VisionConfig(
    layers=tuple(INFO["model_args"]["layers"]),
    embed_dims=tuple(INFO["model_args"]["embed_dims"]),
    image_size=128,
)
_TIMM = "model.vision_tower.timm_model."
_FAST_VLM = next(layout for layout in LAYOUTS if layout.name == "fast_vlm")


def canonical_weights(form: str) -> dict[str, mx.array]:
    """Return the frozen weights of "fused" or "training" form under canonical names."""
    shapes = json.loads((PARITY / f"keys_timm_small_{form}.json").read_text())
    weights = {}
    for name, (source, transform) in _FAST_VLM.rename_all(_TIMM + key for key in shapes).items():
        key = source.removeprefix(_TIMM)
        values = frozen.tensor(key, tuple(shapes[key]), round_to="bfloat16")
        if transform and values.ndim == 4:
            values = values.transpose(0, 2, 3, 1)
        weights[name.removeprefix("vision.")] = mx.array(values)
    return weights


def folded(weights: dict[str, mx.array], dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Fold module by module; every array must be used."""
    fused = {}
    for path in fuse.module_paths(CONFIG):
        group = {
            name.removeprefix(f"{path}."): array
            for name, array in weights.items()
            if name.startswith(f"{path}.")
        }
        arrays = fuse.fuse_module(path, group, CONFIG, pixel_scale=pixel_fold(dtype))
        assert not group, f"left over in {path}: {sorted(group)}"
        fused.update({f"{path}.{name}": array for name, array in arrays.items()})
    return fused


def tower(weights: dict[str, mx.array]) -> FastViTHD:
    """Return the tower holding these fused weights, all of them and no others."""
    model = FastViTHD(CONFIG)
    model.load_weights(list(weights.items()), strict=True)
    return model


def relative_rms(model: FastViTHD, case: str) -> float:
    """Return the RMS of the difference from timm's features, relative to theirs."""
    info = INFO["cases"][case]
    picture = frozen.picture(info["height"], info["width"], info["seed"])
    ours = np.array(model(mx.array(picture)[None])[0])[REFERENCE[f"{case}.tokens"]]
    theirs = REFERENCE[case]
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))
