"""A random FastVLM-0.5B on disk, real in every size, that our loader and mlx-vlm's both read.

Knows the sizes, and one way to write them that never holds the whole in float32. The tower is the
frozen one of tests/parity, whose activations stay in range through all its blocks; the decoder is
normal. The tokenizer is the demo's: rows of the vocabulary it does not have are zero, so that an
answer is made of tokens it does have.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from pathlib import Path

import numpy as np

import fastvlm_mlx as fv
from benchmarks.conversion import qwen2_shapes
from fastvlm_mlx.config import PRESETS

ROOT = Path(__file__).parents[1]
PARITY = ROOT / "tests" / "parity"
sys.path.insert(0, str(PARITY))

import fileformats  # noqa: E402
import frozen  # noqa: E402
import source_folders  # noqa: E402
import sources  # noqa: E402

DEMO = Path(fv.__file__).parent / "demo"


def decoder_values(key: str, shape: tuple[int, ...], words: int) -> np.ndarray:
    """Return a float32 tensor seeded by its key: variance 1 / fan-in, norms about 1."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    values = random.standard_normal(shape, np.float32)
    if key.endswith("norm.weight"):
        return 1 + values / 10
    if key.endswith(".bias"):
        return values / 10
    if "embed_tokens" in key:
        values[words:] = 0
        return values / 2
    return values / np.float32(np.sqrt(shape[1]))


def write_folder(folder: Path) -> Path:
    """Write the checkpoint in mlx-vlm's layout, bfloat16, 1.24 GB; return its folder."""
    shapes = json.loads((PARITY / "keys_timm_fused.json").read_text())
    small = sources.frozen_source(shapes, DEMO)
    sizes = PRESETS["0.5b"].decoder
    text = small.text | {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": sizes.rms_norm_eps,
        "vocab_size": sizes.vocab_size,
    }
    source = dataclasses.replace(small, config=small.config | {"text_config": text})
    tensors = {
        key: fileformats.stored(values, "BF16")
        for key, values in sources.mlx_tensors(small).items()
        if key.startswith("vision_tower.")
    }
    hidden = sizes.hidden_size
    for place, width in (("0", PRESETS["0.5b"].projector.in_dim), ("2", hidden)):
        for leaf, shape in (("weight", (hidden, width)), ("bias", (hidden,))):
            key = f"mm_projector.{place}.{leaf}"
            tensors[key] = fileformats.stored(sources.frozen_value(key, shape), "BF16")
    words = len(json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"])
    for key, shape in qwen2_shapes(PRESETS["0.5b"].decoder, "language_model.model.").items():
        tensors[key] = fileformats.stored(decoder_values(key, shape, words), "BF16")
    return source_folders.write_mlx_vlm(folder, source, tensors=tensors)


def picture() -> np.ndarray:
    """Return the picture that is asked about, uint8 [768, 1024, 3]."""
    return frozen.picture(768, 1024, 3)
