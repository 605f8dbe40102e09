"""A FastVLM of real size and random weights: made in memory, or written as a folder.

Knows one thing: a checkpoint whose tensors are computed instead of read. Loading it is then the
engine's own loading (folding, casting, packing), and writing it is `convert`'s own writing, so that
what is measured is what users run. Knows no clock: how long it takes to make weights says nothing
about how long reading them takes, and no load time is reported for them.

The tokenizer is the demo's. Rows of the vocabulary beyond its words are zero, and a zero logit is
never the highest of hundreds: greedy answers are decodable text that never ends by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.backend import compute_dtype, select_device
from fastvlm_mlx.bench.random_weights import DTYPE, random_tensor
from fastvlm_mlx.bench.tower_shapes import tower_shapes
from fastvlm_mlx.checkpoint.layouts import LAYOUTS
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.memory import require_memory
from fastvlm_mlx.checkpoint.store import Checkpoint, MappedTensor, open_checkpoint
from fastvlm_mlx.checkpoint.tensors import StoredTensor, TensorReader, read_json
from fastvlm_mlx.config import PRESETS, ModelConfig
from fastvlm_mlx.convert.parts import native_parts
from fastvlm_mlx.convert.pipeline import write_artifact
from fastvlm_mlx.convert.small_files import write_native_files
from fastvlm_mlx.convert.sources import Source, float_modules
from fastvlm_mlx.engine import LOADING_SHARE, Engine
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.generate.cache import FeatureCache
from fastvlm_mlx.generate.pipeline import Pipeline
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.prompt.processor import Processor
from fastvlm_mlx.quantize.apply import packed_specs
from fastvlm_mlx.quantize.recipes import Setting, make_recipe, plan_modules, quant_config

SIZES = (*PRESETS, "demo")
"""Sizes a model can be made in; "demo" has the bundled model's sizes, not its weights."""
BITS = (16, 8, 4)
"""16 is bfloat16; 8 and 4 pack the decoder as `quantize --recipe uniform` does."""
STORED_DTYPE = str(DTYPE).removeprefix("mlx.core.")

_DEMO = Path(__file__).parents[1] / "demo"


def synthetic_engine(
    size: str,
    bits: int = 16,
    *,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    keep_quantized: bool = False,
    memory_limit: int | None = None,
    paired_heads: bool = False,
    low_memory: bool = False,
    cpu_forms: bool = True,
) -> Engine:
    """Return an engine of a preset's size with random weights, nothing read from a disk.

    Device, dtype and how the tower runs are `load`'s, `cpu_forms` is `load_model`'s, and a CPU
    unpacks packed weights unless told not to, here without asking whether both would fit. No token
    ends an answer, and no picture is remembered: each answer has `max_tokens` tokens, each picture
    goes through the tower. Raises FastVLMError for another size, MemoryLimitError if it is too big.
    """
    selected = select_device(device)
    on_cpu = selected.type == mx.DeviceType.cpu
    kind = compute_dtype(dtype, selected)
    checkpoint = synthetic_checkpoint(size, bits, seed=seed)
    dequantize = bits != 16 and on_cpu and not keep_quantized
    resident = checkpoint.resident_bytes(kind, dequantize=dequantize, paired_heads=paired_heads)
    require_memory(
        int(resident * LOADING_SHARE), limit=memory_limit, what=synthetic_name(size, bits)
    )
    model = load_model(
        checkpoint,
        kind,
        dequantize=dequantize,
        paired_heads=paired_heads,
        low_memory=low_memory,
        cpu_forms=cpu_forms,
    )
    processor = Processor.from_folder(
        _DEMO,
        image_size=checkpoint.config.vision.image_size,
        image_mode=checkpoint.config.image_mode,
    )
    pipeline = Pipeline(model, processor, frozenset(), synthetic_name(size, bits), FeatureCache(0))
    return Engine(pipeline, checkpoint.folder, checkpoint.layout.name)


def synthetic_name(size: str, bits: int) -> str:
    """Return what a synthetic model is called in a report."""
    return f"synthetic {size}, {bits} bits"


def synthetic_checkpoint(size: str, bits: int = 16, *, seed: int = 0) -> Checkpoint:
    """Return a checkpoint in the native layout whose tensors are made when they are read.

    Its folder is the demo's, for the tokenizer. Raises FastVLMError for an unknown size or bits,
    and for bits that the size's modules cannot be packed in.
    """
    if size not in SIZES:
        raise FastVLMError(f"unknown size {size!r}: use {', '.join(SIZES)}")
    if bits not in BITS:
        raise FastVLMError(f"{bits} bits are not made: use {', '.join(map(str, BITS))}")
    config = _float_config(size)
    parameters = tree_flatten(FastVLM(config, mx.float32).parameters())
    shapes = {name: tuple(array.shape) for name, array in parameters}
    settings: dict[str, Setting] = {}
    if bits != 16:
        recipe = make_recipe("uniform", bits=bits, num_layers=config.decoder.num_layers)
        settings, indivisible = plan_modules(recipe, shapes)
        if indivisible:
            raise ConfigError(f"{size} cannot be packed: {indivisible[0]} is too narrow")
        config = dataclasses.replace(config, quant=quant_config(recipe, settings))
    words = len(read_json(_DEMO / "tokenizer.json")["model"]["vocab"])
    specs = {
        **{f"vision.{name}": (shape, STORED_DTYPE) for name, shape in tower_shapes(config.vision)},
        **dict(_decoder_specs(shapes, settings)),
    }
    tensors = {
        name: SyntheticTensor(
            StoredTensor(name, shape, kind, _DEMO), "", seed, words, settings.get(_module(name))
        )
        for name, (shape, kind) in specs.items()
    }
    layout = next(layout for layout in LAYOUTS if layout.name == "mlx-vlm")
    return Checkpoint(_DEMO, layout, config, tensors, shapes, config.decoder.tied)


def write_folder(folder: Path, size: str, bits: int = 16, *, seed: int = 0) -> Path:
    """Write the same weights as `synthetic_engine`'s, bfloat16 or packed, for any runtime to load.

    It is the native folder that `fastvlm convert` writes, checked as that is, and appears when it
    is whole. Its tokenizer ends an answer at `<|im_end|>`, whose row is zero: no greedy answer has
    it. Raises FastVLMError if it exists already, or the disk is too small.
    """
    checkpoint = synthetic_checkpoint(size, bits, seed=seed)
    name = synthetic_name(size, bits)
    floats = float_modules(checkpoint, {}) if checkpoint.config.quant else ()

    def write_files(folder: Path, **given: Any) -> None:
        write_native_files(folder, float_modules=floats, **given)
        card = f"# {name}\n\nRandom weights of seed {seed}, for benchmarks. It knows nothing.\n"
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_artifact(
        Source(name=name, tower_name=None, checkpoint=checkpoint, raw={}),
        folder,
        native_parts(checkpoint, STORED_DTYPE, {}),
        config=checkpoint.config,
        dtype=STORED_DTYPE,
        consumers=("native", "mlx-vlm"),
        write_files=write_files,
        read_config=lambda written: open_checkpoint(written).config,
        overwrite=False,
        command="",
        progress=None,
    )
    return folder


@dataclass(frozen=True, slots=True)
class SyntheticTensor(MappedTensor):
    """A tensor that is computed when it is read; `stored` says its name, shape and dtype.

    `words` is how many rows of the vocabulary are words; `setting` is how its module is packed.
    """

    seed: int = 0
    words: int = 0
    setting: Setting | None = None

    def read(self, reader: TensorReader) -> mx.array:  # noqa: ARG002 (nothing is read)
        """Return its values, evaluated."""
        return random_tensor(
            self.stored.name,
            self.stored.shape,
            seed=self.seed,
            words=self.words,
            setting=self.setting,
        )


def _float_config(size: str) -> ModelConfig:
    if size != "demo":
        return dataclasses.replace(PRESETS[size], eos_ids=())
    return dataclasses.replace(open_checkpoint(_DEMO).config, eos_ids=())


def _decoder_specs(
    shapes: dict[str, tuple[int, ...]], settings: dict[str, Setting]
) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Yield name → (shape, dtype) of projector's and decoder's tensors as they are stored."""
    for name, shape in shapes.items():
        setting = settings.get(_module(name))
        if name.startswith("vision."):
            continue
        if setting is None or not name.endswith(".weight"):
            yield name, (shape, STORED_DTYPE)
            continue
        for leaf, spec in packed_specs(shape, setting, STORED_DTYPE).items():
            yield f"{_module(name)}.{leaf}", spec


def _module(name: str) -> str:
    return name.rpartition(".")[0]
