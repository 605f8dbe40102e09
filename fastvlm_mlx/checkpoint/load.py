"""Weights into the model: read, folded or dequantized, cast once, evaluated, module by module.

The source of each module is let go before the next is read, so that loading peaks little above
what stays. Every shape is checked; nothing is skipped.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.backend import has_scalar_cpu
from fastvlm_mlx.checkpoint.fuse import fuse_module, module_paths, pair_heads
from fastvlm_mlx.checkpoint.layouts import first_few
from fastvlm_mlx.checkpoint.store import (
    EMBEDDING,
    FLOATS,
    HEAD,
    PACKED,
    Checkpoint,
    MappedTensor,
    target_dtype,
)
from fastvlm_mlx.checkpoint.tensors import TensorReader
from fastvlm_mlx.errors import CheckpointMismatch
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.memory import nothing_cached
from fastvlm_mlx.model.vision import pixel_fold

log = logging.getLogger("fastvlm_mlx")

Progress = Callable[[int, int], None]


def decide_tied(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without a head that is no other than the embedding, bit for bit.

    No head, or an equal one, is tied. Where one is stored, it and the embedding are read: less
    than the model itself will take. Raises CheckpointError for a file that cannot be read.
    """
    with nothing_cached():
        tied = checkpoint.config.decoder.tied or _equal_head(checkpoint)
    if checkpoint.stated_tied and not tied:
        log.warning("config.json says the head is tied, but lm_head differs: using lm_head")
    if not tied:
        return checkpoint
    decoder = dataclasses.replace(checkpoint.config.decoder, tied=True)
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, decoder=decoder),
        tensors={n: t for n, t in checkpoint.tensors.items() if not n.startswith(HEAD + ".")},
        shapes={n: s for n, s in checkpoint.shapes.items() if not n.startswith(HEAD + ".")},
    )


def load_model(
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    *,
    dequantize: bool,
    paired_heads: bool = False,
    low_memory: bool = False,
    fuse_decoder: bool = True,
    cpu_forms: bool = True,
    progress: Progress | None = None,
) -> FastVLM:
    """Read, fold and cast every weight; return the model, evaluated.

    A stored head is used, be it a copy of the embedding: `decide_tied` drops that one beforehand.
    `dtype` is float32, bfloat16 or float16. `dequantize` turns quantized modules into plain ones.
    `paired_heads` and `low_memory` are forms of the tower (`FastViTHD`). `fuse_decoder=False` keeps
    mlx-lm's layers, `cpu_forms=False` the plain tower and products on a CPU in float32 too, where
    x86-64 has its own (`FastVLM.use_cpu_forms`): to compare with. `progress` gets (bytes read,
    bytes in all). Raises CheckpointMismatch for tensors that do not fit, CheckpointError for a file
    that cannot be read and ConfigError for heads that cannot be paired.
    """
    model = FastVLM(checkpoint.config, dtype, paired_heads=paired_heads, low_memory=low_memory)
    weights = []
    total, done = checkpoint.stored_bytes, 0
    with nothing_cached():
        for name, array, stored_bytes in _weights(checkpoint, dtype, dequantize, paired_heads):
            weights.append((name, array))
            done += stored_bytes
            if progress is not None:
                progress(done, total)
    if not dequantize:
        _make_quantized(model, checkpoint)
    model.load_weights(weights, strict=True)
    del weights, array  # the decoder's old matrices must go as they are joined
    if fuse_decoder:
        with nothing_cached():
            model.decoder.fuse()
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if cpu_forms and on_cpu and dtype == mx.float32 and has_scalar_cpu():
        model.use_cpu_forms()
    model.eval()
    return model


def _weights(
    checkpoint: Checkpoint, dtype: mx.Dtype, dequantize: bool, paired_heads: bool
) -> Iterator[tuple[str, mx.array, int]]:
    """Yield (path in the model, evaluated array, stored bytes it took), module by module."""
    reader = TensorReader()
    yield from _tower(checkpoint, reader, dtype, paired_heads)
    shapes = checkpoint.shapes
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("vision."):
            continue
        path, leaf = name.rsplit(".", 1)
        packed = f"{path}.scales" in checkpoint.tensors
        if packed and dequantize and leaf != "bias":
            if leaf == "weight":
                array = _dequantized(checkpoint, path, reader).astype(dtype)
                mx.eval(array)
                yield name, array, sum(t.stored.nbytes for t in _packed(checkpoint, path).values())
            continue
        array = tensor.read(reader)
        if leaf in PACKED:
            # Only a padded vocabulary is longer than the config says (`store.py` checked).
            array = array[: shapes[f"{path}.weight"][0]]
        if tensor.stored.dtype in FLOATS:
            array = array.astype(dtype)
        mx.eval(array)
        yield name, array, tensor.stored.nbytes


def _tower(
    checkpoint: Checkpoint, reader: TensorReader, dtype: mx.Dtype, paired_heads: bool
) -> Iterator[tuple[str, mx.array, int]]:
    """Fold the tower; raises CheckpointMismatch for arrays missing, left over or mis-shaped."""
    for path in module_paths(checkpoint.config.vision):
        prefix = f"vision.{path}."
        tensors = module_tensors(checkpoint, path)
        stored_bytes = sum(tensor.stored.nbytes for tensor in tensors.values())
        group = {name: tensor.read(reader) for name, tensor in tensors.items()}
        fused = _folded(checkpoint, path, group, pixel_scale=pixel_fold(dtype))
        if paired_heads:
            fused = pair_heads(path, fused, checkpoint.config.vision)
        for name in list(fused):
            array = fused.pop(name)
            array = array.astype(target_dtype(prefix + name, dtype), stream=mx.cpu)
            # A transposed or strided array would be copied by every forward that reads it.
            array = mx.contiguous(array, stream=mx.cpu)
            mx.eval(array)
            yield prefix + name, array, stored_bytes
            stored_bytes = 0


def module_tensors(checkpoint: Checkpoint, path: str) -> dict[str, MappedTensor]:
    """Return the stored tensors of a tower module (`fuse.module_paths`) by their name in it."""
    prefix = f"vision.{path}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


def check_tower(checkpoint: Checkpoint) -> None:
    """Raise CheckpointMismatch if the stored tower would not fold into the config's; reads nothing.

    Names and shapes alone are folded: arrays of zeros that are never evaluated.
    """
    for path in module_paths(checkpoint.config.vision):
        tensors = module_tensors(checkpoint, path)
        zeros = {name: mx.zeros(tensor.shape) for name, tensor in tensors.items()}
        _folded(checkpoint, path, zeros, pixel_scale=1.0)


def _folded(
    checkpoint: Checkpoint, path: str, group: dict[str, mx.array], *, pixel_scale: float
) -> dict[str, mx.array]:
    """Fold one module's arrays, which are all taken, into what the config asks for."""
    source = checkpoint.tower
    where = checkpoint.layout.name if source is None else f"{source.folder}: {source.layout.name}"
    prefix = f"vision.{path}."
    names = sorted(group)
    try:
        fused = fuse_module(path, group, checkpoint.config.vision, pixel_scale=pixel_scale)
    except KeyError as error:
        present = first_few([prefix + name for name in names])
        raise CheckpointMismatch(
            f"{where}: {prefix}{error.args[0]} is missing (present: {present})"
        ) from error
    except ValueError as error:
        raise CheckpointMismatch(f"{where}: {prefix}* do not fit together: {error}") from error
    if group:
        left = first_few([checkpoint.tensors[prefix + name].stored.name for name in group])
        raise CheckpointMismatch(f"{where}: tensors without a place: {left}")
    for name, array in fused.items():
        if tuple(array.shape) != checkpoint.shapes[prefix + name]:
            raise CheckpointMismatch(
                f"{where}: {prefix}{name} is {tuple(array.shape)}, "
                f"the config asks for {checkpoint.shapes[prefix + name]}"
            )
    return fused


def _packed(checkpoint: Checkpoint, path: str) -> dict[str, MappedTensor]:
    """Return the tensors of a quantized module: weight, scales, and biases if its mode has them."""
    names = {leaf: f"{path}.{leaf}" for leaf in PACKED}
    tensors = checkpoint.tensors
    return {leaf: tensors[name] for leaf, name in names.items() if name in tensors}


def _dequantized(checkpoint: Checkpoint, path: str, reader: TensorReader) -> mx.array:
    """Return the matrix that a quantized module's tensors stand for, in float32 if affine."""
    quant = checkpoint.config.quant
    assert quant is not None  # `store.py` refuses packed weights without
    bits, group_size, mode = quant.of(path)
    rows = checkpoint.shapes[f"{path}.weight"][0]
    arrays = {leaf: t.read(reader)[:rows] for leaf, t in _packed(checkpoint, path).items()}
    if mode == "affine":
        arrays |= {leaf: arrays[leaf].astype(mx.float32) for leaf in ("scales", "biases")}
    return mx.dequantize(
        arrays["weight"],
        arrays["scales"],
        arrays.get("biases"),
        group_size=group_size,
        bits=bits,
        mode=mode,
    )


def _make_quantized(model: FastVLM, checkpoint: Checkpoint) -> None:
    quant = checkpoint.config.quant
    if quant is None:
        return

    def settings(path: str, _module: nn.Module) -> bool | dict[str, int | str]:
        if f"{path}.scales" not in checkpoint.tensors:
            return False
        bits, group_size, mode = quant.of(path)
        return {"bits": bits, "group_size": group_size, "mode": mode}

    nn.quantize(model, class_predicate=settings)


def _equal_head(checkpoint: Checkpoint) -> bool:
    """Whether every tensor of the head equals the embedding's, bit for bit."""
    reader = TensorReader()
    for leaf in PACKED:
        head = checkpoint.tensors.get(f"{HEAD}.{leaf}")
        embedding = checkpoint.tensors.get(f"{EMBEDDING}.{leaf}")
        if (head is None) != (embedding is None):
            return False
        if head is None or embedding is None:
            continue
        if head.shape != embedding.shape or head.stored.dtype != embedding.stored.dtype:
            return False
        same = mx.array_equal(head.read(reader), embedding.read(reader), stream=mx.cpu)
        if not same.item():
            return False
    return True
