"""The counts that our tests hold for us, taken on mlx-vlm by the same rules. Nothing is timed.

Run from the repository's root, where both are installed:
    python -m benchmarks.peers.mlx_vlm_counts            counts only, seconds
    python -m benchmarks.peers.mlx_vlm_counts --weights  and, on the frozen real-size tower, errors
                                                         against timm and load peaks; minutes
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.models.fastvlm.config import ModelConfig, TextConfig, VisionConfig
from mlx_vlm.models.fastvlm.fastvlm import Model
from mlx_vlm.models.fastvlm.language import LanguageModel
from mlx_vlm.models.fastvlm.vision import VisionModel
from mlx_vlm.utils import load_model as load_their_model

from benchmarks import towers
from benchmarks.graph_trace import (
    PRODUCTS,
    compiling,
    convolutions,
    graph,
    hollow,
    host_calls,
    is_dense,
    is_pointwise,
    metal_kernel,
    trace,
    work,
)
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint

MIB = 2**20
IMAGE_TOKEN = -200


class SmallVision(VisionConfig):
    """mlx-vlm's sizes are class attributes, so a small tower is a class of its own."""

    layers = [1, 1, 1, 1, 1]  # noqa: RUF012
    embed_dims = [16, 32, 32, 64, 64]  # noqa: RUF012


def real_tower(dtype: mx.Dtype = mx.float32) -> VisionModel:
    tower = VisionModel(VisionConfig())
    tower.update(tree_map(lambda array: array.astype(dtype), tower.parameters()))
    tower.eval()
    return hollow(tower)


def features(tower: VisionModel) -> Callable[[mx.array], mx.array]:
    return lambda pixels: tower(pixels)[1]


def tower_counts() -> dict[str, Any]:
    """Checks 1 to 6 and 9: what the tower at 1024 px would compute, and what its weights take."""
    pixels = mx.zeros((1, 1024, 1024, 3))
    tower = real_tower()
    found = convolutions(trace(features(tower), pixels))
    with compiling(True):
        eager = graph(features(tower), pixels)
        compiled = graph(mx.compile(features(tower)), pixels)
        stages = tower.vision_model.network
        repmixer = graph(stages[2][0], mx.zeros((1, 128, 128, 192)))
        attention = graph(stages[7][0], mx.zeros((1, 16, 16, 768)))
    names = [name for name, _ in tree_flatten(tower.parameters())]
    return {
        "convolution_kernels": Counter(metal_kernel(conv) for conv in found),
        "grouped_changing_channels": sum(
            conv.arguments[5] not in (1, conv.shape[-1]) for conv in found
        ),
        "convolutions_1x1": sum(map(is_pointwise, found)),
        "convolutions_dense": sum(map(is_dense, found)),
        "primitives": work(eager),
        "primitives_whole_tower_compiled": work(compiled),
        "repmixer_block": work(repmixer),
        "attention_block": work(attention),
        "attention_block_names": {
            name: attention[name] for name in ("Power", "Sqrt", "Divide", "Subtract")
        },
        "rsqrt": eager["Rsqrt"],
        "sqrt": eager["Sqrt"],
        "running_leaves": sum("running_" in name for name in names),
        "layer_scale_leaves": sum("layer_scale" in name for name in names),
        "half_precision": {str(d): half_precision(d) for d in (mx.bfloat16, mx.float16)},
        "tower_mib_float32": sum(a.nbytes for _, a in tree_flatten(tower.parameters())) / MIB,
        "head_leaves": [name for name in names if "head" in name],
    }


def half_precision(dtype: mx.Dtype) -> dict[str, int]:
    """Count casts, and matrix products that come out in float32."""
    found = trace(features(real_tower(dtype)), mx.zeros((1, 1024, 1024, 3), dtype=dtype))
    products = [p for p in found if p.name in PRODUCTS]
    return {
        "casts": sum(p.name == "AsType" for p in found),
        "products": len(products),
        "float32_products": sum(p.dtype == mx.float32 for p in products),
    }


def small_model() -> Model:
    text = TextConfig(
        model_type="qwen2",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    )
    model = Model(ModelConfig(text, SmallVision(), mm_hidden_size=128))
    model.eval()
    mx.eval(model.parameters())
    return model


def request_counts() -> dict[str, Any]:
    """Checks 10 to 12: passes, positions under the head and host calls of one short answer."""
    model = small_model()
    passes: list[int] = []
    heads: list[int] = []
    real_call, real_head = LanguageModel.__call__, nn.Embedding.as_linear

    def call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        passes.append((inputs if embeds is None else embeds).shape[1])
        return real_call(self, inputs, *args, **kwargs)

    def head(self: Any, x: mx.array) -> mx.array:
        heads.append(x.shape[-2])
        return real_head(self, x)

    ids = mx.array([[*range(1, 15), IMAGE_TOKEN, *range(20, 32)]])
    pixels = mx.zeros((1, 3, 128, 128))
    mx.eval(ids, pixels)
    LanguageModel.__call__, nn.Embedding.as_linear = call, head
    try:
        with host_calls() as calls:
            steps = generate_step(ids, model, pixels, None, max_tokens=6, temperature=0.0)
            first_ids = [read(next(steps)[0])]
            before_first = list(calls)
            first_ids += [read(token) for token, _ in steps]
            every = list(calls)
        whole_heads = len(heads)
        unchunked = generate_step(
            ids, model, pixels, None, max_tokens=1, temperature=0.0, prefill_step_size=None
        )
        next(unchunked)
    finally:
        LanguageModel.__call__, nn.Embedding.as_linear = real_call, real_head
    return {
        "prompt_positions": 26 + 4,
        "passes": passes[:whole_heads],
        "head_positions_built": heads[:whole_heads],
        "head_positions_unchunked": heads[whole_heads:],
        "host_calls_to_first_token": before_first,
        "host_calls_of_6_tokens": Counter(every),
    }


def read(token: Any) -> int:
    return token if isinstance(token, int) else token.item()


def parity(folder: Path) -> dict[str, float]:
    """Check 7: relative RMS against timm in float64 on the frozen tower, ours and theirs."""
    return {
        f"{name} {dtype} {case}": towers.error(make(folder, dtype), case)
        for dtype in (mx.float32, mx.bfloat16, mx.float16)
        for name, make in (("ours", towers.ours), ("mlx-vlm", towers.mlx_vlm))
        for case in ("fused_256", "fused_192x320")
    }


def load_peaks(folder: Path) -> dict[str, float]:
    """Check 9: MLX's peak while loading over what stays, both in the stored bfloat16."""

    def peak(load: Callable[[], nn.Module]) -> float:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = load()
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        return (mx.get_peak_memory() - before) / weights

    checkpoint = open_checkpoint(folder)
    return {
        "ours": peak(lambda: load_model(checkpoint, mx.bfloat16, dequantize=False)),
        "mlx-vlm": peak(lambda: load_their_model(folder)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", action="store_true", help="errors and load peaks as well")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("mlx", "mlx-vlm")},
        "tower": tower_counts(),
        "request": request_counts(),
    }
    if arguments.weights:
        with tempfile.TemporaryDirectory() as temporary:
            folder = towers.write_folder(Path(temporary) / "tower")
            results["load_peak_over_weights"] = load_peaks(folder)
            results["relative_rms"] = parity(folder)
    for section in results.values():
        for name, value in section.items():
            print(f"{name}: {dict(value) if isinstance(value, Counter) else value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
