"""The same real-size tower twice: ours, and mlx-vlm's, on one folder of frozen weights.

Knows both projects' classes and how a picture is given to each. mlx-vlm is imported on use. The
weights and the float64 reference for them are those of tests/parity.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core, which would not look for it later)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint

ROOT = Path(__file__).parents[1]
PARITY = ROOT / "tests" / "parity"
sys.path.insert(0, str(PARITY))

import frozen  # noqa: E402
import source_folders  # noqa: E402
import sources  # noqa: E402

Tower = Callable[[mx.array], mx.array]


def write_folder(folder: Path) -> Path:
    """Write the frozen tower and a tiny decoder as mlx-vlm's folder, bfloat16; return it."""
    shapes = json.loads((PARITY / "keys_timm_fused.json").read_text())
    source = sources.frozen_source(shapes, ROOT / "fastvlm_mlx" / "demo")
    return source_folders.write_mlx_vlm(folder, source, "BF16")


def ours(folder: Path, dtype: mx.Dtype) -> Tower:
    """Return our tower as the engine runs it: pixels to features [tokens, channels].

    On an x86-64 CPU in float32 that is the CPU's own form, elsewhere the one that a GPU runs.
    """
    tower = load_model(open_checkpoint(folder), dtype, dequantize=False).vision
    return lambda pixels: tower(pixels)[0]


def mlx_vlm(folder: Path, dtype: mx.Dtype) -> Tower:
    """Return mlx-vlm's tower, its weights cast to `dtype`: pixels to features.

    The pixels' way into it is the one of its own `get_input_embeddings`: scaled to 0..1, NCHW,
    cast, and transposed back.
    """
    from mlx_vlm.models.fastvlm.config import VisionConfig
    from mlx_vlm.models.fastvlm.vision import VisionModel

    tower = VisionModel(VisionConfig())
    weights = mx.load(str(folder / "model.safetensors"))
    prefix = "vision_tower."
    named = [(k.removeprefix(prefix), w) for k, w in weights.items() if k.startswith(prefix)]
    tower.load_weights(named, strict=True)
    tower.update(tree_map(lambda array: array.astype(dtype), tower.parameters()))
    tower.eval()
    mx.eval(tower.parameters())

    def run(pixels: mx.array) -> mx.array:
        values = (pixels.astype(mx.float32) / 255).transpose(0, 3, 1, 2).astype(dtype)
        features = tower(values.transpose(0, 2, 3, 1))[1]
        return features.reshape(-1, features.shape[-1])

    return run


def picture(height: int, width: int, seed: int) -> mx.array:
    """Return a frozen picture, uint8 [1, height, width, 3]."""
    return mx.array(frozen.picture(height, width, seed))[None]


def error(tower: Tower, case: str) -> float:
    """Return the relative RMS difference from timm in float64 (tests/parity/tower.npz)."""
    with np.load(PARITY / "tower.npz") as archive:
        info = json.loads(str(archive["cases"]))["cases"][case]
        kept, reference = archive[f"{case}.tokens"], archive[case]
    found = tower(picture(info["height"], info["width"], info["seed"])).astype(mx.float32)
    difference = np.array(found)[kept] - reference
    return float(np.sqrt(np.mean(difference**2) / np.mean(reference**2)))
