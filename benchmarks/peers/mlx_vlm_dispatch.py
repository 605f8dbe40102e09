"""mlx-vlm's stages, traced as it runs them and replayed by the same rules as ours.

Run from the repository's root, where both are installed:
    python -m benchmarks.peers.mlx_vlm_dispatch     writes benchmarks/results/metal-mlx-vlm.json

A prompt is two passes there: all positions but the last into the cache, then the last one with the
head. The weights are hollow, in bfloat16; below 16 bits the language model is packed in groups of
64. Greedy, as its `generate_step` is at temperature 0: normalised, then the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.models.fastvlm.config import ModelConfig, TextConfig, VisionConfig
from mlx_vlm.models.fastvlm.fastvlm import Model

from benchmarks import metal_stages
from benchmarks.metal_dispatch import BITS, CLASSES, PEER, SIZES, Stages, report, spelled
from benchmarks.metal_rules import check_version
from benchmarks.metal_rules.standins import Trace, standing_in, take
from benchmarks.metal_stages import DTYPE, PROMPT_POSITIONS, SIDE, cast, hollow_array
from benchmarks.metal_summary import of_chips
from fastvlm_mlx.config import PRESETS

IMAGE_TOKEN = -200


def make_model(size: str, bits: int) -> Model:
    """Return mlx-vlm's model of one of our preset sizes, hollow."""
    sizes = PRESETS[size].decoder
    text = TextConfig(
        model_type="qwen2",
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        intermediate_size=sizes.intermediate_size,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        vocab_size=sizes.vocab_size,
        tie_word_embeddings=sizes.tied,
    )
    model = Model(ModelConfig(text, VisionConfig(), mm_hidden_size=PRESETS[size].vision.out_dim))
    if bits < 16:
        nn.quantize(model.language_model, group_size=metal_stages.GROUP_SIZE, bits=bits)
    cast(model)
    model.eval()
    return model


def tower() -> list[Trace]:
    """Trace the tower, from the pixels as its processor gives them."""
    with standing_in() as calls:
        model = make_model("0.5b", 16)

        def run(pixels: mx.array) -> mx.array:
            return model.vision_tower(pixels.astype(DTYPE).transpose(0, 2, 3, 1))[1]

        return [take(calls, run, mx.zeros((1, 3, SIDE, SIDE)))]


def language(size: str, bits: int) -> Iterator[tuple[str, list[Trace]]]:
    """Yield projector, prefill (two traces) and one decode step."""
    config = PRESETS[size]
    with standing_in() as calls:
        model = make_model(size, bits)
        features = hollow_array(1, metal_stages.IMAGE_POSITIONS, config.projector.in_dim)
        yield "projector", [take(calls, model.mm_projector, features)]
        shown = hollow_array(1, metal_stages.IMAGE_POSITIONS, config.decoder.hidden_size)
        last = hollow_array(1, 1, config.decoder.hidden_size)

        def first_pass(features: mx.array) -> tuple[mx.array, ...]:
            ids = [7] * metal_stages.TEXT_BEFORE + [IMAGE_TOKEN] + [7] * metal_stages.TEXT_AFTER
            embeds = model.prepare_inputs_for_multimodal(features, mx.array([ids]), None)
            cache = make_prompt_cache(model.language_model)
            model.language_model(None, inputs_embeds=embeds[:, : PROMPT_POSITIONS - 1], cache=cache)
            return tuple(metal_stages.held(cache))

        def last_pass(embeds: mx.array) -> tuple[mx.array, ...]:
            return step(model, config.decoder, None, embeds)

        def decode(token: mx.array) -> tuple[mx.array, ...]:
            return step(model, config.decoder, token[None], None)

        yield "prefill", [take(calls, first_pass, shown), take(calls, last_pass, last)]
        yield "decode", [take(calls, decode, mx.array([7], dtype=mx.uint32))]


def step(model: Model, sizes: Any, ids: Any, embeds: Any) -> tuple[mx.array, ...]:
    """Return the token, the log-probabilities and the cache after one position."""
    cache = make_prompt_cache(model.language_model)
    metal_stages.fill(cache, sizes.num_kv_heads, sizes.hidden_size // sizes.num_heads)
    logits = model.language_model(ids, inputs_embeds=embeds, cache=cache).logits[:, -1, :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return metal_stages.choose(logprobs), logprobs.squeeze(0), *metal_stages.held(cache)


def main() -> None:
    check_version()
    stages: Stages = {"tower": of_chips(tower(), CLASSES)}
    for size in SIZES:
        for bits in BITS:
            for name, traces in language(size, bits):
                stages[f"{name} {size} {bits}-bit"] = of_chips(traces, CLASSES)
    found = report(
        stages,
        of=f"mlx-vlm {version('mlx-vlm')}",
        command="python -m benchmarks.peers.mlx_vlm_dispatch",
    )
    PEER.write_text(spelled(found))
    for stage, chips in stages.items():
        print(stage, {name: summary["kernels"] for name, summary in chips.items()})


if __name__ == "__main__":
    main()
