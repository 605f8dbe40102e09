from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.model.decoder import Decoder
from tests.unit.tiny_decoder import GREEDY, PROMPTS, REFERENCE, embed, make_decoder

VOCAB = REFERENCE["sizes"]["vocab_size"]


def last_logits(decoder: Decoder, ids: list[int]) -> np.ndarray:
    hidden = decoder.hidden(embed(decoder, ids), None)
    return np.array(decoder.logits(hidden[:, -1:]).astype(mx.float32))[0, 0]


def primitives(decoder: Decoder, ids: list[int]) -> list[tuple[str, tuple[int, ...], mx.Dtype]]:
    """Name, output shape and dtype of every primitive of a prefill with the head on its end."""
    trace: list[dict[str, Any]] = []

    def run(embeddings: mx.array) -> mx.array:
        return decoder.logits(decoder.hidden(embeddings, None)[:, -1:])

    mx.export_function(trace.append, run, embed(decoder, ids))
    found = [entry for entry in trace if entry["type"] == "primitive"]
    return [(e["name"], tuple(e["outputs"][0][1]), e["outputs"][0][2]) for e in found]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_last_position_logits_equal_transformers(tied: bool, index: int) -> None:
    expected = REFERENCE["prompt_logits"]["tied" if tied else "untied"][index]
    logits = last_logits(make_decoder(tied=tied), PROMPTS[index])
    assert np.abs(logits - expected).max() <= 1e-4


def test_no_position_but_the_last_reaches_the_head() -> None:
    """Other ports computed logits for the whole prompt: +38 % of the prefill at 0.5B."""
    weight = (REFERENCE["sizes"]["hidden_size"], VOCAB)
    found = primitives(make_decoder(), PROMPTS[1])
    over_vocabulary = {shape for _, shape, _ in found if shape[-1:] == (VOCAB,)} - {weight}
    assert (1, 1, VOCAB) in over_vocabulary
    assert {math.prod(shape) for shape in over_vocabulary} == {VOCAB}


def test_cached_steps_equal_one_pass() -> None:
    decoder = make_decoder()
    ids = PROMPTS[1] + GREEDY[1]["ids"]
    whole = decoder.hidden(embed(decoder, ids), None)
    cache = decoder.make_cache()
    parts = [decoder.hidden(embed(decoder, PROMPTS[1]), cache)]
    parts += [decoder.hidden(embed(decoder, [token]), cache) for token in GREEDY[1]["ids"]]
    assert mx.abs(whole - mx.concatenate(parts, axis=1)).max().item() <= 1e-5
    assert [layer.offset for layer in cache] == [len(ids)] * 3


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    decoder = make_decoder()
    rows = [PROMPTS[1][:20], PROMPTS[1][20:]]
    cache = decoder.make_cache()
    together = decoder.hidden(decoder.embed(mx.array(rows)), cache)
    alone = [decoder.hidden(embed(decoder, row), None) for row in rows]
    assert mx.abs(together - mx.concatenate(alone, axis=0)).max().item() <= 1e-5


def test_weight_paths_are_those_of_mlx_lm_below_qwen2() -> None:
    sizes = {**REFERENCE["sizes"], "num_layers": 1}
    layer = "qwen2.model.layers.0"
    attention = [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
    expected = {f"{path}.{kind}" for path in attention for kind in ("weight", "bias")}
    expected |= {
        f"{layer}.{name}.weight"
        for name in (
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    expected |= {"qwen2.model.embed_tokens.weight", "qwen2.model.norm.weight"}
    for tied in (True, False):
        decoder = Decoder(DecoderConfig(**sizes, tied=tied))
        paths = {path for path, _ in tree_flatten(decoder.parameters())}
        assert paths == expected | (set() if tied else {"qwen2.lm_head.weight"})


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_layers_may_replace_the_float_ones(tied: bool) -> None:
    """Other ports took the activation dtype from embed_tokens.weight: uint32 once quantized."""
    decoder = make_decoder(tied=tied)
    exact = last_logits(decoder, PROMPTS[0])
    nn.quantize(decoder, group_size=32, bits=8)
    assert decoder.qwen2.model.embed_tokens.weight.dtype == mx.uint32
    assert embed(decoder, PROMPTS[0]).dtype == mx.float32
    quantized = last_logits(decoder, PROMPTS[0])
    assert 0 < np.abs(quantized - exact).max() <= 0.1 * exact.std()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_no_matrix_product_of_a_half_precision_model_runs_in_float32(dtype: mx.Dtype) -> None:
    found = primitives(make_decoder(dtype=dtype), PROMPTS[0])
    heavy = [entry for entry in found if entry[0] in ("Matmul", "AddMM", "Softmax", "Concatenate")]
    assert len(heavy) >= 3 * 9
    assert {kind for _, _, kind in heavy} == {dtype}


def test_float32_features_do_not_pull_a_half_precision_model_to_float32() -> None:
    decoder = make_decoder(dtype=mx.bfloat16)
    cache = decoder.make_cache()
    hidden = decoder.hidden(embed(decoder, PROMPTS[0]).astype(mx.float32), cache)
    assert {hidden.dtype, decoder.logits(hidden).dtype, cache[0].keys.dtype} == {mx.bfloat16}


def test_bfloat16_agrees_with_float32_within_its_precision() -> None:
    exact, half = (
        last_logits(make_decoder(dtype=t), PROMPTS[1]) for t in (mx.float32, mx.bfloat16)
    )
    assert np.sqrt(np.mean((exact - half) ** 2)) / exact.std() <= 5e-2
