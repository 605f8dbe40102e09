"""A tiny Qwen2 on frozen weights, the same that `tests/parity/make_beam_reference.py` ran."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.model.decoder import Decoder
from tests.parity import frozen

REFERENCE = json.loads((Path(__file__).parents[1] / "parity" / "beam.json").read_text())
PROMPTS: list[list[int]] = REFERENCE["prompts"]
GREEDY: list[dict[str, list]] = REFERENCE["greedy"]


def make_decoder(*, tied: bool = False, dtype: mx.Dtype = mx.float32) -> Decoder:
    decoder = Decoder(DecoderConfig(**REFERENCE["sizes"], tied=tied), dtype=dtype)
    weights = {
        path: mx.array(frozen.tensor(path.removeprefix("qwen2."), value.shape)).astype(dtype)
        for path, value in tree_flatten(decoder.parameters())
    }
    decoder.load_weights(list(weights.items()), strict=True)
    mx.eval(decoder.parameters())
    return decoder


def embed(decoder: Decoder, ids: list[int]) -> mx.array:
    return decoder.embed(mx.array([ids]))
