"""Understand any checkpoint folder from its config.json and headers; read no weights.

Every tensor is accounted for: mapped and fitting, or named in the error. Sources stay untouched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.checkpoint import layouts
from fastvlm_mlx.checkpoint.fuse import module_paths
from fastvlm_mlx.checkpoint.layouts import WeightLayout, first_few
from fastvlm_mlx.checkpoint.source_config import read_config
from fastvlm_mlx.checkpoint.source_keys import require_fastvlm, stated_tied
from fastvlm_mlx.checkpoint.tensors import StoredTensor, TensorReader, find_tensors, read_json
from fastvlm_mlx.checkpoint.tower_names import Transform
from fastvlm_mlx.config import PRESETS, ModelConfig
from fastvlm_mlx.errors import CheckpointMismatch, ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import FastViTHD

EMBEDDING = "decoder.qwen2.model.embed_tokens"
HEAD = "decoder.qwen2.lm_head"
FLOATS = ("float16", "bfloat16", "float32", "float64")
PACKED = ("weight", "scales", "biases")
_PADDED_ROWS = (f"{EMBEDDING}.weight", f"{HEAD}.weight")


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A stored tensor under its canonical name, and how to bring it into our axis order."""

    stored: StoredTensor
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in our axis order."""
        shape = self.stored.shape
        if self.transform == "OIHW" and len(shape) == 4:
            return (shape[0], shape[2], shape[3], shape[1])
        return shape

    def read(self, reader: TensorReader) -> mx.array:
        """Return its values in our axis order, unevaluated."""
        array = reader.take(self.stored)
        if self.transform == "OIHW" and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        return array


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder understood but not loaded: its layout, sizes, and where each tensor is.

    `shapes` are those of the unquantized model's parameters, by path. `config.decoder.tied` says
    that no head is stored; `stated_tied` is what config.json claims. `tower` is the checkpoint that
    the tower comes from, None if it is this one.
    """

    folder: Path
    layout: WeightLayout
    config: ModelConfig
    tensors: Mapping[str, MappedTensor]
    shapes: Mapping[str, tuple[int, ...]]
    stated_tied: bool | None
    tower: Checkpoint | None = None

    @property
    def tower_folder(self) -> Path:
        """The folder that the tower comes from."""
        return (self.tower or self).folder

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors the model needs, as stored."""
        return sum(tensor.stored.nbytes for tensor in self.tensors.values())

    @property
    def quantized_paths(self) -> tuple[str, ...]:
        """Canonical paths of the modules that are stored quantized."""
        return tuple(
            name.removesuffix(".scales") for name in self.tensors if name.endswith(".scales")
        )

    def resident_bytes(
        self, dtype: mx.Dtype, *, dequantize: bool, paired_heads: bool = False
    ) -> int:
        """Return bytes of the loaded model's weights with activations in `dtype`.

        Raises ConfigError for heads that cannot be paired.
        """
        shapes = self.shapes
        if paired_heads:
            tower = FastViTHD(self.config.vision, paired_heads=True)
            wider = {f"vision.{n}": tuple(a.shape) for n, a in tree_flatten(tower.parameters())}
            shapes = {**shapes, **wider}
        total = 0
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            if f"{path}.scales" in self.tensors and not dequantize:
                leaves = (self.tensors.get(f"{path}.{leaf}") for leaf in PACKED)
                total += sum(_kept_bytes(leaf.stored, shape[0], dtype) for leaf in leaves if leaf)
            else:
                total += math.prod(shape) * target_dtype(name, dtype).size
        return total


def open_checkpoint(folder: Path, *, vision_from: Path | None = None) -> Checkpoint:
    """Recognise a model folder from its config.json and tensor names; read no weights.

    `vision_from` is the folder that holds the tower where `folder` holds none. Raises
    CheckpointError, CheckpointMismatch or ConfigError, each one line.
    """
    raw = read_json(folder / "config.json")
    require_fastvlm(raw)
    stored = find_tensors(folder)
    layout = layouts.recognise(stored)
    renamed = layout.rename_all(stored)
    tensors = {
        name: MappedTensor(stored[source], transform)
        for name, (source, transform) in renamed.items()
    }
    tower = None
    if vision_from is not None:
        if layout.has_tower:
            raise ConfigError(f"{folder} has its own tower: leave out --vision-from")
        tower = open_checkpoint(vision_from)
        tensors = {
            **tensors,
            **{name: t for name, t in tower.tensors.items() if name.startswith("vision.")},
        }
    elif not layout.has_tower:
        raise CheckpointMismatch(
            f"{folder} is an export for Apple's app and holds no vision tower: "
            f"its original does ({_original(raw.get('hidden_size'))}), add --vision-from with it"
        )
    config = read_config(
        raw,
        layout.name,
        has_head=f"{HEAD}.weight" in tensors,
        rename_module=lambda path: _rename_module(layout, path),
        vision=tower.config.vision if tower else None,
    )
    checkpoint = Checkpoint(
        folder, layout, config, tensors, _shapes(config), stated_tied(raw), tower
    )
    _check_fit(checkpoint)
    return checkpoint


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the unquantized model, by path."""
    parameters = tree_flatten(FastVLM(config, mx.float32).parameters())
    return {name: tuple(array.shape) for name, array in parameters}


def target_dtype(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """Return what a weight is kept in: `dtype`, but float32 where a float16 tower overflows.

    From the second position encoding on, activations were measured near float16's largest value.
    """
    tail = ("vision.stages.4.pos_emb.", "vision.stages.4.blocks.", "vision.expansion.")
    return mx.float32 if dtype == mx.float16 and name.startswith(tail) else dtype


def _kept_bytes(stored: StoredTensor, rows: int, dtype: mx.Dtype) -> int:
    """Return bytes in memory of the first rows of a quantized module's tensor.

    Affine scales and biases are cast, codes are not.
    """
    kept = stored.nbytes * rows // stored.shape[0]
    return kept * dtype.size // getattr(mx, stored.dtype).size if stored.dtype in FLOATS else kept


def _check_fit(checkpoint: Checkpoint) -> None:
    """Raise CheckpointMismatch for tensors without a place, missing, mis-shaped or of odd dtype.

    The tower's are checked as far as names go without folding; `load.py` checks the rest.
    """
    where, tensors, shapes = checkpoint.layout.name, checkpoint.tensors, checkpoint.shapes
    modules = tuple(f"vision.{path}." for path in module_paths(checkpoint.config.vision))
    packed = [path for path in checkpoint.quantized_paths if f"{path}.weight" in shapes]
    places = {
        *(name for name in shapes if not name.startswith("vision.")),
        *(f"{path}.{leaf}" for path in packed for leaf in PACKED),
    }
    extra = [
        tensor.stored.name
        for name, tensor in tensors.items()
        if not name.startswith(modules) and name not in places
    ]
    if extra:
        raise CheckpointMismatch(f"{where}: tensors without a place: {first_few(extra)}")
    missing = [name for name in shapes if not name.startswith("vision.") and name not in tensors]
    missing += [m + "*" for m in modules if not any(name.startswith(m) for name in tensors)]
    if missing:
        raise CheckpointMismatch(f"{where}: {len(missing)} tensors missing: {first_few(missing)}")
    codes = {f"{path}.{leaf}" for path in packed for leaf in PACKED}
    for name, tensor in tensors.items():
        if name not in codes:
            shape = None if name.startswith("vision.") else shapes[name]
            _check(tensor, FLOATS, shape, padded=name in _PADDED_ROWS)
    for path in packed:
        _check_packed(checkpoint, path, shapes[f"{path}.weight"])


def _check_packed(checkpoint: Checkpoint, path: str, shape: tuple[int, ...]) -> None:
    """Compare a quantized module's tensors with what the config asks for."""
    parts = {leaf: checkpoint.tensors.get(f"{path}.{leaf}") for leaf in PACKED}
    weight, scales, biases = (parts[leaf] for leaf in PACKED)
    assert weight is not None and scales is not None  # neither missing, as `_check_fit` found
    quant = checkpoint.config.quant
    if quant is None:
        raise CheckpointMismatch(
            f"{weight.stored.name} is quantized, but config.json has no quantization"
        )
    bits, group_size, mode = quant.of(path)
    setting = f"{bits} bits in groups of {group_size}, {mode}"
    if len(shape) != 2 or shape[1] % group_size:
        raise CheckpointMismatch(
            f"{scales.stored.name} has no place: a weight of {shape} cannot be packed "
            f"in groups of {group_size}"
        )
    if (biases is not None) != (mode == "affine"):
        raise CheckpointMismatch(
            f"{weight.stored.name} has {'no' if biases is None else 'needless'} .biases beside it "
            f"for {setting}"
        )
    rows, columns = shape
    padded = f"{path}.weight" in _PADDED_ROWS
    _check(weight, ("uint32",), (rows, columns * bits // 32), padded=padded, setting=setting)
    kinds = FLOATS if mode == "affine" else ("uint8",)
    for part in (scales, biases):
        if part is not None:
            groups = (weight.shape[0], columns // group_size)
            _check(part, kinds, groups, padded=False, setting=setting)


def _check(
    tensor: MappedTensor,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...] | None,
    *,
    padded: bool,
    setting: str = "",
) -> None:
    """Compare a tensor's dtype and shape; a padded one may have more rows, None is any shape."""
    found, stored = tensor.shape, tensor.stored
    if stored.dtype not in dtypes:
        raise CheckpointMismatch(f"{stored.name} is {stored.dtype}, not {' or '.join(dtypes)}")
    if shape is not None and padded and found[:1] > shape[:1]:
        found = (shape[0], *found[1:])
    if shape is not None and found != shape:
        asked = f"{setting} ask" if setting else "the config asks"
        raise CheckpointMismatch(f"{stored.name} is {tensor.shape}, {asked} for {shape}")


def _rename_module(layout: WeightLayout, path: str) -> str | None:
    """Return the canonical path of a source module that holds a weight, None for others."""
    try:
        renamed = layout.rename(f"{path}.weight")
    except KeyError:
        return None
    return renamed[0].removesuffix(".weight") if renamed else None


def _original(hidden_size: object) -> str:
    for size, preset in PRESETS.items():
        if preset.decoder.hidden_size == hidden_size:
            return f"apple/FastVLM-{size.upper()}"
    return "the checkpoint it was exported from"
