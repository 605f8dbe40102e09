"""Checkpoints of the real sizes are understood from their headers: no weight is made or read.

The files are sparse: a header with the real names, shapes and dtypes, and a hole for the data.
Names and shapes come from inventories of Apple's code, transformers and mlx-vlm's convert; the
decoders' sizes are Qwen2's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import source_folders
from asking import DEMO, HERE
from sources import Source

from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.config import PRESETS, ModelConfig, VisionConfig

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U32": 4}
Rows = dict[str, tuple[str, tuple[int, ...]]]


def read(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def write_hollow(folder: Path, config: dict[str, Any], rows: Rows) -> Path:
    """Write config.json and a safetensors file whose data is a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for key, (dtype, shape) in rows.items():
        end = offset + math.prod(shape) * _BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder


# size: hidden, layers, heads, kv heads, intermediate, vocabulary rows (FORMATS A1)
SIZES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
}


def apple_folder(folder: Path, size: str, form: str) -> Path:
    hidden, layers, heads, kv_heads, inner, rows = SIZES[size]
    text = {
        "eos_token_id": 151645,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6},
        "vocab_size": rows,
    }
    args: dict[str, list[int]] = {"embed_dims": [], "layers": []}
    vision = {"hidden_size": 3072, "model_args": args}
    source = {"image_seq_length": 256, "text_config": text, "vision_config": vision}
    config = source_folders.apple_config(Source({}, source, DEMO))
    del config["vision_config"]  # Apple's has none
    config["tie_word_embeddings"] = size != "7b"
    shapes: dict[str, tuple[int, ...]] = {
        key: tuple(shape) for key, shape in read(f"keys_apple_{form}.json").items()
    }
    shapes |= {
        "model.mm_projector.0.weight": (hidden, 3072),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
        "model.embed_tokens.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    narrow = hidden // heads * kv_heads
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, width in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (width, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    counts = {key for key in shapes if key.endswith("num_batches_tracked")}
    rows_of = {k: ("I64" if k in counts else "BF16", shape) for k, shape in shapes.items()}
    return write_hollow(folder, config, rows_of)


def untied(config: ModelConfig) -> ModelConfig:
    """A stored head counts as untied until the weights are compared."""
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tied=False))


@pytest.mark.parametrize("form", ["fused", "training"])
@pytest.mark.parametrize("size", SIZES)
def test_apples_checkpoints_have_the_presets_sizes(tmp_path: Path, size: str, form: str) -> None:
    checkpoint = open_checkpoint(apple_folder(tmp_path / "model", size, form))
    assert checkpoint.layout.name == "llava_qwen2"
    assert checkpoint.config == untied(PRESETS[size])


def test_apples_config_says_nothing_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each key of a released config.json is either read or known to say nothing."""
    with caplog.at_level(logging.WARNING):
        open_checkpoint(apple_folder(tmp_path / "model", "0.5b", "fused"))
    assert not caplog.records


def test_transformers_checkpoint_loses_its_padded_vocabulary(tmp_path: Path) -> None:
    """152,000 rows are stored, 151,936 are Qwen2's; the rest is random and could be sampled."""
    shapes = read("keys_fast_vlm.json")
    del shapes["lm_head.weight"]  # tied: transformers does not store it
    rows: Rows = {
        key: ("I64" if key.endswith("num_batches_tracked") else "BF16", tuple(shape))
        for key, shape in shapes.items()
    }
    folder = write_hollow(tmp_path / "model", read("config_fast_vlm.json"), rows)
    config = open_checkpoint(folder).config
    assert config.vision == PRESETS["0.5b"].vision
    assert config.decoder == PRESETS["0.5b"].decoder


@pytest.mark.parametrize("run", ["bf16", "f32", "q4"])
def test_what_mlx_vlm_converts_is_understood(
    tmp_path: Path, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own config.json, which has no vision_config (or an empty one) and generation keys."""
    made = read("mlx_vlm_convert.json")["runs"][run]
    rows: Rows = {key: (dtype, tuple(shape)) for key, (dtype, shape, _) in made["tensors"].items()}
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(write_hollow(tmp_path / "model", made["config"], rows))
    assert checkpoint.layout.name == "mlx-vlm"
    assert checkpoint.config.vision == VisionConfig()
    assert bool(checkpoint.quantized_paths) is (run == "q4")
    assert not caplog.records
