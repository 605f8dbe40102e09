"""Synthetic models: real sizes, the same weights in memory and on disk, finite, never-ending."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.bench import random_weights
from fastvlm_mlx.bench.inputs import pixels
from fastvlm_mlx.bench.synthetic import (
    SIZES,
    synthetic_checkpoint,
    synthetic_engine,
    write_folder,
)
from fastvlm_mlx.checkpoint.load import check_tower
from fastvlm_mlx.checkpoint.tensors import TensorReader
from fastvlm_mlx.config import PRESETS
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError, MemoryLimitError

PICTURE = pixels(128, 128)


def weights(engine: Engine) -> dict[str, mx.array]:
    return dict(tree_flatten(engine.pipeline.model.parameters()))


def same(one: Engine, other: Engine) -> bool:
    """Whether two engines hold the same arrays by the same names, bit for bit."""
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and mx.array_equal(mine[name], theirs[name]).item()
        for name in mine
    )


def answer(engine: Engine, max_tokens: int = 12) -> tuple[int, ...]:
    return engine.generate(
        "Describe the image.", images=[PICTURE], resolution=128, max_tokens=max_tokens
    ).token_ids


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_memory_and_disk_hold_the_same_weights_and_give_the_same_ids(
    bits: int, tmp_path: Path
) -> None:
    made = synthetic_engine("demo", bits)
    read = fv.load(write_folder(tmp_path / "model", "demo", bits))
    assert same(made, read)
    assert answer(made) == answer(read)
    assert read.layout == made.layout == "mlx-vlm"
    assert read.config.quant == made.config.quant


def test_packed_weights_kept_packed_are_the_same_in_memory_and_on_disk(tmp_path: Path) -> None:
    made = synthetic_engine("demo", 4, keep_quantized=True)
    read = fv.load(write_folder(tmp_path / "model", "demo", 4), keep_quantized=True)
    assert same(made, read)
    assert any(array.dtype == mx.uint32 for array in weights(made).values())


def test_a_seed_is_one_model_and_another_seed_another() -> None:
    assert same(synthetic_engine("demo", seed=5), synthetic_engine("demo", seed=5))
    assert not same(synthetic_engine("demo", seed=5), synthetic_engine("demo", seed=6))


def test_values_are_pinned_for_every_device() -> None:
    """Whole numbers, a product and a rounding: nothing here may depend on MLX's version."""
    name = "decoder.qwen2.model.layers.0.mlp.down_proj.weight"
    array = random_weights.random_tensor(name, (64, 96), seed=0, words=0, setting=None)
    first = np.asarray(array.astype(mx.float32))[0, :3]
    assert first.tolist() == [0.1044921875, 0.00787353515625, 0.06591796875]
    assert float(array.astype(mx.float32).var()) == pytest.approx(1 / 96, rel=0.05)


def test_a_tensor_made_in_pieces_is_the_one_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "projector.linear_1.weight"

    def make() -> mx.array:
        return random_weights.random_tensor(name, (50, 30), seed=1, words=0, setting=None)

    whole = make()
    monkeypatch.setattr(random_weights, "_CHUNK_ELEMENTS", 70)
    assert mx.array_equal(whole, make()).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_value_is_finite_in_every_dtype(dtype: str) -> None:
    engine = synthetic_engine("demo", dtype=dtype)
    features = engine.encode(PICTURE, resolution=128).features
    assert str(features.dtype).endswith(dtype)
    assert mx.isfinite(features).all().item()
    spread = float(features.astype(mx.float32).std())
    assert 0.01 < spread < 100
    logits = engine.distributions("Describe the image.", [features_of(engine)], [5])
    assert all(mx.isfinite(each).all().item() for each in logits)


def features_of(engine: Engine) -> object:
    return engine.encode(PICTURE, resolution=128)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_answer_is_as_long_as_asked_and_made_of_words(bits: int) -> None:
    engine = synthetic_engine("demo", bits)
    ids = answer(engine, 48)
    tokenizer = engine.pipeline.processor.tokenizer
    assert len(ids) == 48
    assert len(set(ids)) > 4, "one token over and over would hide a wrong position"
    assert not {*ids} & tokenizer.stop_ids
    assert all(tokenizer.token_bytes(each) for each in ids)


def test_nothing_is_remembered_of_a_picture() -> None:
    engine = synthetic_engine("demo")
    runs = [
        engine.generate("Why?", images=[PICTURE], resolution=128, max_tokens=1).stats
        for _ in range(2)
    ]
    assert [stats.encoded_images for stats in runs] == [1, 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_names_and_shapes_are_those_the_loader_wants(size: str, bits: int) -> None:
    checkpoint = synthetic_checkpoint(size, bits)
    check_tower(checkpoint)
    wanted = {name for name in checkpoint.shapes if not name.startswith("vision.")}
    made = {name for name in checkpoint.tensors if not name.startswith("vision.")}
    packed = {name for name in made if name.endswith((".scales", ".biases"))}
    assert made - packed == wanted
    assert bool(packed) == (bits != 16)
    if size in PRESETS:
        decoder = PRESETS[size].decoder
        assert checkpoint.config.decoder == decoder
        head = f"decoder.qwen2.{'model.embed_tokens' if decoder.tied else 'lm_head'}.weight"
        assert checkpoint.tensors[head].shape == (
            decoder.vocab_size,
            decoder.hidden_size * bits // 32 if bits != 16 else decoder.hidden_size,
        )


@pytest.mark.parametrize(("bits", "per_weight"), [(8, 8.5), (4, 4.5)])
def test_packed_bytes_are_bits_and_their_scales(bits: int, per_weight: float) -> None:
    """Codes, and for each group of 64 a bfloat16 scale and bias: 0.5 bits a weight more."""
    checkpoint = synthetic_checkpoint("0.5b", bits)
    paths = checkpoint.quantized_paths
    assert len(paths) == 24 * 7 + 1
    numbers = sum(math.prod(checkpoint.shapes[f"{path}.weight"]) for path in paths)
    nbytes = sum(
        checkpoint.tensors[f"{path}.{leaf}"].stored.nbytes
        for path in paths
        for leaf in ("weight", "scales", "biases")
    )
    assert nbytes * 8 == pytest.approx(numbers * per_weight, rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_values_vary_as_float_ones_do(bits: int) -> None:
    """Within the rounding of the scale to a power of two."""
    path = "decoder.qwen2.model.layers.1.mlp.gate_proj"
    checkpoint = synthetic_checkpoint("demo", bits)
    packed = {
        leaf: checkpoint.tensors[f"{path}.{leaf}"].read(TensorReader())
        for leaf in ("weight", "scales", "biases")
    }
    values = mx.dequantize(*packed.values(), group_size=64, bits=bits).astype(mx.float32)
    columns = checkpoint.shapes[f"{path}.weight"][1]
    assert 0.5 < float(values.std()) * math.sqrt(columns) < 2
    assert abs(float(values.mean())) < 0.01


def test_a_cpu_unpacks_unless_told_not_to() -> None:
    unpacked, packed = synthetic_engine("demo", 4), synthetic_engine("demo", 4, keep_quantized=True)
    assert not any(array.dtype == mx.uint32 for array in weights(unpacked).values())
    total = [sum(a.nbytes for a in weights(engine).values()) for engine in (unpacked, packed)]
    assert total[1] < total[0]


@pytest.mark.parametrize(
    ("size", "bits", "said"), [("3b", 16, "unknown size"), ("demo", 5, "5 bits are not made")]
)
def test_what_is_not_made_is_said_in_one_line(size: str, bits: int, said: str) -> None:
    with pytest.raises(FastVLMError, match=said) as error:
        synthetic_engine(size, bits)
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastvlm_mlx.bench.synthetic.random_tensor", None)
    with pytest.raises(MemoryLimitError, match="synthetic 7b, 16 bits needs 3"):
        synthetic_engine("7b", memory_limit=8 << 30, dtype="float32")


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FastVLMError):
        write_folder(tmp_path, "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_model_of_real_size_is_finite_and_answers_in_many_words() -> None:
    engine = synthetic_engine("0.5b", dtype="bfloat16")
    features = engine.encode(PICTURE, resolution=128).features
    assert features.shape == (4, 896)
    assert mx.isfinite(features).all().item()
    assert len(set(answer(engine, 8))) > 2
