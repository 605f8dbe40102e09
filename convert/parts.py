"""A checkpoint as the tensors to be written: each module's names, shapes and dtypes at once, its
values when its turn comes.

Knows both artifacts' axis order and which values are cast, packed or copied. Writes nothing, and
holds one module at a time. The layout on disk is not fused: that is done at load time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.checkpoint.fuse import module_paths, reparameterize_module
from fastvlm_mlx.checkpoint.load import module_tensors
from fastvlm_mlx.checkpoint.store import FLOATS, PACKED, Checkpoint, MappedTensor, target_dtype
from fastvlm_mlx.checkpoint.tensors import StoredTensor, TensorReader, find_tensors
from fastvlm_mlx.convert.keys import CLIP_HEAD, app_key, native_key
from fastvlm_mlx.convert.safetensors_writer import TensorSpec, check_finite
from fastvlm_mlx.errors import CheckpointMismatch
from fastvlm_mlx.quantize.apply import packed_specs, quantize_weight
from fastvlm_mlx.quantize.recipes import Setting

# Channels of the CLIP embedding that the tower was first trained for; FastVLM never computes it.
_CLIP_DIM = 768

Arrays = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one module, made together. `make` returns them by key; packed ones have been
    evaluated, the others not.
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[TensorReader], Arrays]


def arrays_in_order(parts: tuple[Part, ...]) -> Iterator[tuple[str, mx.array]]:
    """Yield every tensor by sorted key, one module in memory at a time.

    A module's keys share a prefix that no other module's have, so they are neighbours.
    """
    reader = TensorReader()
    for part in sorted(parts, key=lambda part: min(spec.name for spec in part.specs)):
        arrays = part.make(reader)
        for name in sorted(arrays):
            yield name, arrays.pop(name)


def native_parts(
    checkpoint: Checkpoint, dtype: str, settings: Mapping[str, Setting]
) -> tuple[Part, ...]:
    """Return the native folder's parts (FORMATS.md, D): floats in `dtype`, modules in `settings`
    packed. In float16 the tower's last stage, where activations overflow, is float32.
    """
    linear = checkpoint.config.projector.kind == "linear"

    def key(name: str) -> str:
        return native_key(name, linear_projector=linear)

    vision = checkpoint.config.vision
    tower = (_tower_part(checkpoint, path, dtype) for path in module_paths(vision))
    rest = _module_parts(checkpoint, dtype, settings, key)
    return (*tower, _clip_head(checkpoint, dtype), *rest)


def app_parts(
    checkpoint: Checkpoint, dtype: str, settings: Mapping[str, Setting]
) -> tuple[Part, ...]:
    """Return the parts of the folder for Apple's app: projector and decoder only."""
    return tuple(_module_parts(checkpoint, dtype, settings, app_key))


def _tower_part(checkpoint: Checkpoint, path: str, dtype: str) -> Part:
    tensors = module_tensors(checkpoint, path)
    kind = getattr(mx, dtype)

    def arranged(arrays: Arrays) -> Arrays:
        canonical = reparameterize_module(path, arrays)
        arranged = {}
        for name in list(canonical):
            full = f"vision.{path}.{name}"
            with mx.stream(mx.cpu):
                array = _native_axes(name, canonical.pop(name)).astype(target_dtype(full, kind))
                arranged[native_key(full)] = mx.contiguous(array)
        return arranged

    # The same steps on zeros that are never evaluated give every name and shape.
    planned = arranged({name: mx.zeros(tensor.shape) for name, tensor in tensors.items()})
    specs = tuple(_spec(name, array) for name, array in planned.items())
    return Part(specs, lambda reader: arranged(_read(tensors, reader)))


def _native_axes(name: str, array: mx.array) -> mx.array:
    """Bring a tower tensor into mlx-vlm's axes: layer scales [1,1,C], 1x1 kernels [O,1,1,I]."""
    if "layer_scale" in name:
        return array.reshape(1, 1, -1)
    if array.ndim == 2 and ("fc" in name or name.startswith("se.")):
        return array[:, None, None, :]
    return array


def _clip_head(checkpoint: Checkpoint, dtype: str) -> Part:
    """Strict loaders demand the CLIP head, which nobody computes: the source's own, or zeros."""
    stored = _find_clip_head(checkpoint.tower_folder)
    kind = getattr(mx, dtype)
    shape = (checkpoint.config.vision.out_dim, _CLIP_DIM)
    if stored and stored.shape != shape:
        raise CheckpointMismatch(f"{stored.name} is {stored.shape}, the config asks for {shape}")

    def make(reader: TensorReader) -> Arrays:
        with mx.stream(mx.cpu):
            array = reader.take(stored) if stored else mx.zeros(shape)
            return {CLIP_HEAD: array.astype(kind)}

    return Part((TensorSpec(CLIP_HEAD, shape, dtype),), make)


def _find_clip_head(folder: Path) -> StoredTensor | None:
    found = [t for name, t in find_tensors(folder).items() if name.endswith(".head.proj")]
    return found[0] if found else None


def _module_parts(
    checkpoint: Checkpoint,
    dtype: str,
    settings: Mapping[str, Setting],
    key: Callable[[str], str],
) -> Iterator[Part]:
    """Yield projector's and decoder's modules."""
    modules: dict[str, dict[str, MappedTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith("vision."):
            path, leaf = name.rsplit(".", 1)
            modules.setdefault(path, {})[leaf] = tensor
    for path, tensors in modules.items():
        yield _module_part(checkpoint, path, tensors, dtype, settings.get(path), key)


def _module_part(
    checkpoint: Checkpoint,
    path: str,
    tensors: Mapping[str, MappedTensor],
    dtype: str,
    setting: Setting | None,
    key: Callable[[str], str],
) -> Part:
    kind = getattr(mx, dtype)
    rows = checkpoint.shapes[f"{path}.weight"][0]
    specs = {}
    for leaf, tensor in tensors.items():
        # Only a padded vocabulary is longer than the config says (`store.py` checked).
        shape = (rows, *tensor.shape[1:]) if leaf in PACKED else tensor.shape
        specs[leaf] = (shape, dtype if tensor.stored.dtype in FLOATS else tensor.stored.dtype)
    if setting is not None:
        specs |= packed_specs(specs["weight"][0], setting, dtype)

    def make(reader: TensorReader) -> Arrays:
        arrays = _read(tensors, reader)
        for leaf in arrays:
            if leaf in PACKED:
                arrays[leaf] = arrays[leaf][:rows]
            if tensors[leaf].stored.dtype in FLOATS:
                arrays[leaf] = arrays[leaf].astype(kind)
        if setting is not None:
            weight = arrays.pop("weight")
            # Here, as a packed group hides one: NaN becomes a code like any other.
            check_finite(key(f"{path}.weight"), weight)
            arrays |= quantize_weight(weight, setting)
        return {key(f"{path}.{leaf}"): array for leaf, array in arrays.items()}

    return Part(
        tuple(
            TensorSpec(key(f"{path}.{leaf}"), shape, kind) for leaf, (shape, kind) in specs.items()
        ),
        make,
    )


def _read(tensors: Mapping[str, MappedTensor], reader: TensorReader) -> Arrays:
    return {name: tensor.read(reader) for name, tensor in tensors.items()}


def _spec(name: str, array: mx.array) -> TensorSpec:
    return TensorSpec(name, tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
