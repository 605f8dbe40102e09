"""Loading peaks at most a fifth above what stays, by MLX's count and by the kernel's.

Each load runs in a process of its own, since a process's peak never comes down.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import source_folders
import sources

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"
# As in FastVLM-0.5B, the embedding is about a fifth of all weights: the largest thing ever held
# beside what is loaded.
HIDDEN, MLP, LAYERS, VOCAB = 512, 2048, 20, 40_000
BYTES_OF_CODE = 24e6  # pages of libraries touched for the first time, not weights

LOAD = """
import json, resource, sys
from pathlib import Path
import fastvlm_mlx
import mlx.core as mx
from mlx.utils import tree_flatten
from fastvlm_mlx.backend import select_device
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint

def peak_rss():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands a parent's ru_maxrss on to its child; VmHWM begins anew.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

select_device("cpu")
folder, dtype = Path(sys.argv[1]), getattr(mx, sys.argv[2])
checkpoint = open_checkpoint(folder)
before = peak_rss()
mx.reset_peak_memory()
model = load_model(checkpoint, dtype, dequantize=True)
print(json.dumps({
    "peak": mx.get_peak_memory(),
    "active": mx.get_active_memory(),
    "rss": peak_rss() - before,
    "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
}))
"""


@pytest.fixture(scope="module")
def source() -> sources.Source:
    """The demo model's tower and tokenizer with a decoder of 100 million weights."""
    demo = sources.read_source(DEMO)
    config = json.loads(json.dumps(demo.config))
    config["text_config"] |= {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention"] * LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
    }
    stream = np.random.default_rng(7)
    tensors: dict[str, Any] = {
        name: stream.random(shape, np.float32) - 0.5 for name, shape in decoder_shapes().items()
    }
    tower = {name: array for name, array in demo.tensors.items() if name.startswith(sources.TIMM)}
    return replace(demo, tensors=tower | tensors, config=config)


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    heads, keys = 512, 128
    projector = "model.multi_modal_projector."
    language = "model.language_model."
    shapes: dict[str, tuple[int, ...]] = {
        projector + "linear_1.weight": (HIDDEN, 512),
        projector + "linear_1.bias": (HIDDEN,),
        projector + "linear_2.weight": (HIDDEN, HIDDEN),
        projector + "linear_2.bias": (HIDDEN,),
        language + "embed_tokens.weight": (VOCAB, HIDDEN),
        language + "norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"{language}layers.{i}."
        for name, rows in (("q", heads), ("k", keys), ("v", keys)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, heads)
        shapes[layer + "mlp.gate_proj.weight"] = (MLP, HIDDEN)
        shapes[layer + "mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


@pytest.fixture(scope="module", params=["safetensors", "bin", "sharded"])
def folder(
    source: sources.Source, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    path = tmp_path_factory.mktemp("load") / request.param
    suffix = "bin" if request.param == "bin" else "safetensors"
    shards = 3 if request.param == "sharded" else 1
    return source_folders.write_apple(path, source, "BF16", suffix=suffix, shards=shards)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_peaks_at_most_a_fifth_above_what_stays(folder: Path, dtype: str) -> None:
    """Reading a whole checkpoint and letting go of it only after casting takes half as much again
    (bfloat16 to float32), or twice as much."""
    command = [sys.executable, "-c", LOAD, str(folder), dtype]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = found["weights"]
    assert weights > (350e6 if dtype == "float32" else 175e6)
    assert weights <= found["active"] <= 1.01 * weights
    assert found["peak"] <= 1.2 * weights
    assert found["rss"] <= 1.2 * weights + BYTES_OF_CODE
