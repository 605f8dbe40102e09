"""The weights that a comparison is about, as a folder that every runtime can load.

Knows where they come from: a model people have, or random ones written for the occasion. Knows no
runtime; a runtime that cannot load the folder says so itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.backend import compute_dtype, select_device
from fastvlm_mlx.bench.file_cache import weight_files
from fastvlm_mlx.bench.harness import Say
from fastvlm_mlx.bench.peer_runtime import Weights
from fastvlm_mlx.bench.synthetic import synthetic_name, write_folder
from fastvlm_mlx.checkpoint.hub import Progress, model_folder
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is compared on: the weights, and what a report calls them (`results.ModelCard`).

    `tower` is the folder that holds the vision tower, if the weights' own holds none.
    """

    weights: Weights
    config: ModelConfig
    name: str
    synthetic: bool
    quantization: str
    seed: int = 0
    tower: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return weight_files(self.weights.folder, *([self.tower] if self.tower else []))


def stored_subject(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    vision_from: str | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Subject:
    """Return a model as `fastvlm_mlx.load` finds it. Raises FastVLMError as that does.

    `device` and `dtype` default to what `load` would choose.
    """
    folder = model_folder(model, say=say, progress=progress)
    tower = None
    if vision_from is not None:
        tower = model_folder(vision_from, say=say, progress=progress)
    config = open_checkpoint(folder, vision_from=tower).config
    quant = config.quant
    packing = "16" if quant is None else f"{quant.bits} bits {quant.mode}"
    return Subject(
        weights=_weights(folder, dtype, device),
        config=config,
        name=model,
        synthetic=False,
        quantization=packing,
        tower=tower,
    )


@contextmanager
def synthetic_subject(
    size: str, bits: int, *, seed: int = 0, dtype: str | None = None, device: str | None = None
) -> Iterator[Subject]:
    """Write random weights to a temporary folder, and remove it afterwards.

    Raises FastVLMError for an unknown size, or a disk without the room.
    """
    with tempfile.TemporaryDirectory(prefix="fastvlm-compare-") as temporary:
        folder = write_folder(Path(temporary) / f"{size}-{bits}", size, bits, seed=seed)
        yield Subject(
            weights=_weights(folder, dtype, device),
            config=open_checkpoint(folder).config,
            name=synthetic_name(size, bits),
            synthetic=True,
            quantization=str(bits),
            seed=seed,
        )


def _weights(folder: Path, dtype: str | None, device: str | None) -> Weights:
    selected = select_device(device)
    return Weights(
        folder=folder,
        dtype=str(compute_dtype(dtype, selected)).removeprefix("mlx.core."),
        device="cpu" if selected.type == mx.DeviceType.cpu else "gpu",
    )
