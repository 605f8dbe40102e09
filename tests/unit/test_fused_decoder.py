"""Joined matrices compute what mlx-lm's own layers do, in fewer kernels and no more memory."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import itertools

import quantizing
import source_folders
import sources

import fastvlm_mlx as fv
from benchmarks.graph_trace import VIEWS, compiling, graph, hollow, trace
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.cli.main import main
from fastvlm_mlx.config import PRESETS, DecoderConfig
from fastvlm_mlx.engine import Engine, load
from fastvlm_mlx.model import fused_qwen2
from fastvlm_mlx.model.decoder import Decoder, KVLayer
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.fingerprint import fingerprint
from fastvlm_mlx.model.fused_qwen2 import FusedAttention, FusedMLP

DEMO = Path(fv.__file__).parent / "demo"
SIZES = DecoderConfig(
    hidden_size=128,
    num_layers=2,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=96,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=512,
    tied=True,
)
PACKINGS = [("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)]
PACKINGS += [("affine", 64, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def make_decoder(sizes: DecoderConfig = SIZES, dtype: mx.Dtype = mx.float32) -> Decoder:
    """Random weights, no bias zero, large enough that a wrong head or rotation shows."""
    mx.random.seed(7)
    decoder = Decoder(sizes, dtype=dtype)
    decoder.update(
        tree_map(lambda a: (mx.random.normal(a.shape) * 0.1).astype(dtype), decoder.parameters())
    )
    mx.eval(decoder.parameters())
    return decoder


def pair(
    sizes: DecoderConfig = SIZES, *, dtype: mx.Dtype = mx.float32, **how: Any
) -> tuple[Decoder, Decoder]:
    """mlx-lm's layers and ours on the same weights; `how` is given to `nn.quantize`."""
    plain, ours = make_decoder(sizes, dtype), make_decoder(sizes, dtype)
    for decoder in (plain, ours) if how else ():
        nn.quantize(decoder, **how)
    ours.fuse()
    return plain, ours


def states(decoder: Decoder, make_cache: Callable[[Decoder], list[KVLayer] | None]) -> mx.array:
    """A prompt in two passes and three single steps, two rows; without a cache the prompt only."""
    ids = mx.random.randint(0, SIZES.vocab_size, (2, 24), key=mx.random.key(1))
    cache = make_cache(decoder)
    cuts = (0, 12, 21, 22, 23, 24) if cache is not None else (0, 24)
    passes = [
        decoder.hidden(decoder.embed(ids[:, begin:end]), cache)
        for begin, end in itertools.pairwise(cuts)
    ]
    return decoder.logits(mx.concatenate(passes, axis=1))


CACHES: dict[str, Callable[[Decoder], list[KVLayer] | None]] = {
    "no cache": lambda _: None,
    "floats": lambda decoder: decoder.make_cache(),
    "8 bits": lambda decoder: decoder.make_cache(8),
    "4 bits": lambda decoder: decoder.make_cache(4),
}


# The same numbers


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: "-".join(map(str, p)))
def test_packed_weights_give_the_same_bits(packing: tuple[str, int, int]) -> None:
    mode, group_size, bits = packing
    plain, ours = pair(mode=mode, group_size=group_size, bits=bits)
    assert joined_counts(ours) == (2, 2)
    for name, make_cache in CACHES.items():
        wanted, got = states(plain, make_cache), states(ours, make_cache)
        assert mx.array_equal(wanted, got).item(), name


@pytest.mark.parametrize("cache", CACHES)
def test_floats_agree_to_a_millionth(cache: str) -> None:
    plain, ours = pair()
    assert joined_counts(ours) == (2, 2)
    wanted, got = states(plain, CACHES[cache]), states(ours, CACHES[cache])
    # A packed cache may round a number that differs in its last bit to the next code.
    tolerance = 1e-6 if "bits" not in cache else 1e-2
    assert mx.abs(wanted - got).max().item() <= tolerance * mx.abs(wanted).max().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_agrees_within_its_precision(dtype: mx.Dtype) -> None:
    wanted, got = (states(decoder, CACHES["floats"]) for decoder in pair(dtype=dtype))
    assert got.dtype == dtype
    difference = (wanted - got).astype(mx.float32)
    assert difference.square().mean().sqrt().item() <= 1e-2 * wanted.astype(mx.float32).std().item()


@pytest.mark.parametrize("bits", [None, 4])
def test_layers_of_the_real_size_agree(bits: int | None) -> None:
    """Where a BLAS may cut the larger product otherwise."""
    sizes = PRESETS["0.5b"].decoder
    config = DecoderConfig(**(sizes.to_json() | {"num_layers": 1, "vocab_size": 64}))
    plain, ours = pair(config, **({"bits": bits, "group_size": 64} if bits else {}))
    x = mx.random.normal((1, 19, sizes.hidden_size), key=mx.random.key(2))
    caches = plain.make_cache(), ours.make_cache()
    for part in (x[:, :18], x[:, 18:]):
        wanted, got = plain.hidden(part, caches[0]), ours.hidden(part, caches[1])
        error = mx.abs(wanted - got).max().item() / mx.abs(wanted).max().item()
        assert error <= (0 if bits else 1e-6)


# What is joined, and what is not


def joined_counts(decoder: Decoder) -> tuple[int, int]:
    """In how many layers q, k and v are one, and gate and up."""
    layers = decoder.qwen2.model.layers
    return (
        sum(isinstance(layer.self_attn, FusedAttention) for layer in layers),
        sum(isinstance(layer.mlp, FusedMLP) for layer in layers),
    )


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("self_attn.k_proj", {"bits": 8, "group_size": 32}),
        ("self_attn.v_proj", {"bits": 4, "group_size": 64}),
        ("mlp.up_proj", {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        ("mlp.gate_proj", None),
    ],
    ids=["other bits", "other group size", "other mode", "not packed"],
)
def test_a_group_packed_otherwise_in_part_stays_as_it_was(
    path: str, how: dict[str, Any] | None
) -> None:
    """Foreign artifacts may give every matrix bits of its own."""

    def setting(at: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        odd = at == f"qwen2.model.layers.1.{path}"
        return (how or False) if odd else {"bits": 4, "group_size": 32}

    plain, ours = pair(class_predicate=setting)
    assert joined_counts(ours) == ((1, 2) if "attn" in path else (2, 1))
    for make_cache in CACHES.values():
        assert mx.array_equal(states(plain, make_cache), states(ours, make_cache)).item()
    assert_same_source(plain, ours)


def assert_same_source(plain: nn.Module, ours: nn.Module) -> None:
    wanted, got = (dict(tree_flatten(plain.parameters())), fused_qwen2.source_weights(ours))
    assert wanted.keys() == got.keys()
    assert all(mx.array_equal(wanted[name], got[name]).item() for name in wanted)


@pytest.mark.parametrize("how", [{}, {"bits": 4, "group_size": 32}], ids=["floats", "packed"])
def test_every_weight_keeps_its_name_and_value(how: dict[str, Any]) -> None:
    plain, ours = pair(**how)
    assert_same_source(plain, ours)
    layer = ours.qwen2.model.layers[0]
    assert_same_source(plain.qwen2.model.layers[0].mlp, layer.mlp)
    assert not any("q_proj" in name for name, _ in tree_flatten(ours.parameters()))


def test_joining_twice_changes_nothing() -> None:
    _, ours = pair()
    before = ours.qwen2.model.layers[0]
    ours.fuse()
    assert ours.qwen2.model.layers[0] is before


# Loading


@pytest.fixture(scope="module")
def models() -> tuple[FastVLM, FastVLM]:
    checkpoint = open_checkpoint(DEMO)
    plain, ours = (
        load_model(checkpoint, mx.float32, dequantize=True, fuse_decoder=flag)
        for flag in (False, True)
    )
    assert joined_counts(plain.decoder) == (0, 0)
    assert joined_counts(ours.decoder) == (3, 3)
    return plain, ours


def test_a_loaded_model_is_the_same_network_joined_or_not(models: tuple[FastVLM, FastVLM]) -> None:
    """A session saved before matrices were joined must find its model."""
    assert fingerprint(models[0]) == fingerprint(models[1])
    assert_same_source(*models)


def test_joining_keeps_no_second_copy_and_holds_one_group_twice_at_most() -> None:
    decoder = make_decoder(DecoderConfig(**(SIZES.to_json() | {"num_layers": 8})))
    largest = 2 * SIZES.intermediate_size * SIZES.hidden_size * 4
    qkv = 2 * SIZES.hidden_size * SIZES.hidden_size * 4
    mx.clear_cache()
    before = mx.get_active_memory()
    limit = mx.set_cache_limit(0)
    try:
        mx.reset_peak_memory()
        decoder.fuse()
        assert mx.get_peak_memory() - before <= 1.1 * (largest + qkv)
    finally:
        mx.set_cache_limit(limit)
    assert mx.get_active_memory() <= before + 8 * 1024
    held = mx.get_active_memory()
    names = decoder.source_weights()
    mx.eval(names)
    assert mx.get_active_memory() <= held + 1024  # slices: no memory of their own


def engines(models: tuple[FastVLM, FastVLM]) -> Iterator[Engine]:
    for model in models:
        engine = fv.load("demo", device="cpu")
        pipeline = dataclasses.replace(engine.pipeline, model=model)
        yield dataclasses.replace(engine, pipeline=pipeline)


def test_answers_beams_packed_caches_and_second_turns_stay(
    models: tuple[FastVLM, FastVLM],
) -> None:
    picture = Path(__file__).parents[2] / "examples" / "images" / "number_62_landscape.png"
    found = []
    for engine in engines(models):
        asked = [
            engine.generate("What number is this?", images=[picture], max_tokens=12),
            engine.generate("What number is this?", images=[picture], max_tokens=12, num_beams=3),
        ]
        for kv_bits in (None, 8, 4):
            session = engine.chat(kv_bits=kv_bits)
            asked.append(session.ask("What number is this?", [picture], max_tokens=12))
            asked.append(session.ask("And its colour?", max_tokens=12))
        found.append([answer.token_ids for answer in asked])
    assert found[0] == found[1] and all(found[0])


def test_a_foreign_mixed_artifact_loads_answers_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.read_source(DEMO)
    layers = "language_model.model.layers"
    odd = {f"{layers}.0.self_attn.v_proj": 8, f"{layers}.1.mlp.up_proj": 8}
    odd |= {f"{layers}.2.mlp.up_proj": 8, f"{layers}.2.mlp.gate_proj": 8}
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), 4, "F16", odd)
    folder = source_folders.write_mlx_vlm(
        tmp_path / "mixed", source, tensors=packed, quantization=quantization
    )
    checkpoint = open_checkpoint(folder)
    plain, ours = (
        load_model(checkpoint, mx.float32, dequantize=False, fuse_decoder=flag)
        for flag in (False, True)
    )
    assert joined_counts(ours.decoder) == (2, 2)
    ids = mx.array([[1, 2, 3, 4, 5]])
    wanted, got = (m.decoder.hidden(m.decoder.embed(ids), None) for m in (plain, ours))
    assert mx.array_equal(wanted, got).item()
    assert fingerprint(plain) == fingerprint(ours)
    assert main(["inspect", str(folder)]) == 0
    assert (
        "joined        q/k/v in 2 of 3 layers, gate/up in 2 of 3, if kept quantized: "
        "the rest is packed differently\n"
    ) in capsys.readouterr().out
    assert main(["inspect", "demo"]) == 0
    assert "joined" not in capsys.readouterr().out


# What a GPU is given


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each `mx.fast` operation as one primitive, as on a GPU: on a CPU it is traced in parts.

    An elementwise function stands for each, of its first argument; nothing here is evaluated.
    """
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.sinh(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.tan(x))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, *_, **__: mx.cosh(q))
    with compiling(True):
        yield


STAND_INS = {"Sinh": "RMSNorm", "Tan": "RoPE", "Cosh": "SDPA"}
LAYERS = PRESETS["0.5b"].decoder.num_layers


def real_decoder(bits: int | None, *, fuse: bool = True) -> Decoder:
    """FastVLM-0.5B's decoder in bfloat16, weights without memory."""
    decoder = Decoder(PRESETS["0.5b"].decoder, dtype=mx.bfloat16)
    decoder.update(tree_map(lambda a: a.astype(mx.bfloat16), decoder.parameters()))
    if bits:
        nn.quantize(decoder, bits=bits, group_size=64)
    if fuse:
        decoder.fuse(evaluate=False)
    return hollow(decoder)


def steps(decoder: Decoder, kv_bits: int | None = None) -> Callable[..., tuple[mx.array, ...]]:
    """After 300 positions: states [1,n,H] to the next id and what the cache then holds."""
    cache = decoder.make_cache(kv_bits)
    sizes = decoder.config
    shape = (1, sizes.num_kv_heads, 300, sizes.hidden_size // sizes.num_heads)
    for layer in cache:
        layer.update_and_fetch(*(mx.zeros(shape, dtype=mx.bfloat16) for _ in "kv"))
    mx.eval([layer.state[:2] for layer in cache])
    held = [layer.state[:2] for layer in cache]

    def step(states: mx.array) -> tuple[mx.array, ...]:
        for layer, before in zip(cache, held, strict=True):
            layer.state = (*tree_map(lambda array: array[:], before), 300, *layer.state[3:])
        last = decoder.hidden(states, cache)[:, -1:]
        arrays = [array for _, array in tree_flatten([layer.state[:2] for layer in cache])]
        return (mx.argmax(decoder.logits(last)[:, -1], axis=-1), *arrays)

    return step


def counted(decoder: Decoder, positions: int = 1) -> Counter[str]:
    """What `positions` positions make a GPU compute, views left out."""
    states = mx.zeros((1, positions, decoder.config.hidden_size), dtype=mx.bfloat16)
    counts = graph(steps(decoder), states)
    named = {STAND_INS.get(name, name): count for name, count in counts.items()}
    return Counter({name: count for name, count in named.items() if name not in VIEWS})


def compiled(counts: Counter[str]) -> int:
    return sum(count for name, count in counts.items() if name.startswith("Compiled"))


# The embedding's: a row of each array, and to unpack them.
EMBEDDING = {None: 1, 4: 4}


@pytest.mark.parametrize(("bits", "a_layer"), [(None, 11), (4, 14)])
def test_kernels_of_a_decode_step(metal: None, bits: int | None, a_layer: int) -> None:
    """mlx-lm's own layers: 17 and 20 a layer. SDPA may take two on Metal in long contexts."""
    counts = counted(real_decoder(bits))
    assert counts["RMSNorm"] == 2 * LAYERS + 1 and counts["RoPE"] == counts["SDPA"] == LAYERS
    assert counts["SliceUpdate"] == 2 * LAYERS and compiled(counts) == LAYERS
    if bits:
        assert counts["QuantizedMatmul"] == 4 * LAYERS + 1
        assert counts["Add"] == 3 * LAYERS  # a bias and two residuals
    else:
        assert counts["AddMM"] == 3 * LAYERS and counts["Matmul"] == LAYERS + 1
        assert counts["Add"] == 0
    head_and_choice = 1 + 1 + 1
    assert counts.total() == a_layer * LAYERS + head_and_choice
    assert counts.total() + EMBEDDING[bits] <= 350


def test_mlx_lms_own_layers_take_more(metal: None) -> None:
    """The count above would prove nothing if everything passed it."""
    floats, packed = (counted(real_decoder(bits, fuse=False)) for bits in (None, 4))
    assert (floats.total(), packed.total()) == (17 * LAYERS + 3, 20 * LAYERS + 3)
    assert packed["QuantizedMatmul"] == 7 * LAYERS + 1


@pytest.mark.parametrize("bits", [None, 4])
def test_a_prompt_takes_the_same_kernels_as_a_step(metal: None, bits: int | None) -> None:
    step, prompt = (counted(real_decoder(bits), positions) for positions in (1, 40))
    assert step == prompt


@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("bits", [None, 4])
def test_no_float32_in_a_bfloat16_decoder(
    metal: None, bits: int | None, kv_bits: int | None, positions: int
) -> None:
    """Of `mx.fast`'s operations only what goes in and out is seen: inside, sums are float32."""
    decoder = real_decoder(bits)
    states = mx.zeros((1, positions, decoder.config.hidden_size), dtype=mx.bfloat16)
    found = trace(steps(decoder, kv_bits), states)
    assert {kind for each in found for _, kind in (*each.inputs, *each.outputs)} == (
        {mx.bfloat16, mx.uint32}
        | ({mx.int32, mx.bool_} if kv_bits and positions > 1 else set())
        | ({mx.uint32} if bits else set())
    )
    assert decoder.embed(mx.array([[5]])).dtype == mx.bfloat16


def test_float32_on_a_cpu_is_inside_of_norms_and_rotations_only() -> None:
    """The parts that `mx.fast` operations are taken into where no kernel is."""
    decoder = real_decoder(None)
    states = mx.zeros((1, 1, decoder.config.hidden_size), dtype=mx.bfloat16)
    wide = {each.name for each in trace(steps(decoder), states) if each.dtype == mx.float32}
    norm = {"AsType", "Square", "Reduce", "Sqrt", "Add", "Multiply"}
    rotation = {"AsType", "Arange", "ExpandDims", "Exp", "Cos", "Sin", "Add", "Multiply"}
    assert wide <= norm | rotation | {"Broadcast"}


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("lengths", [(7,), (5, 3), (1, 1), (4, 1)])
def test_the_last_state_alone_is_the_last_of_all_and_the_cache_is_the_same(
    lengths: tuple[int, ...], kv_bits: int | None
) -> None:
    decoder = engine_decoder()
    caches = [decoder.make_cache(kv_bits) for _ in range(2)]
    for length in lengths:
        x = mx.random.normal((1, length, decoder.config.hidden_size))
        whole = decoder.hidden(x, caches[0])[:, -1:]
        last = decoder.hidden(x, caches[1], last_only=True)
        assert last.shape == whole.shape
        assert mx.allclose(last, whole, rtol=1e-4, atol=1e-5).item()
    for one, other in zip(*caches, strict=True):
        assert one.offset == other.offset == sum(lengths)
        for a, b in zip(tree_flatten(one.state), tree_flatten(other.state), strict=True):
            assert mx.array_equal(a[1], b[1]).item()


def test_the_last_layer_computes_nothing_for_positions_that_nobody_reads() -> None:
    """All layers ran whole: 3.9 % of 0.5B's prefill was thrown away."""
    decoder, length = engine_decoder(), 9
    x = mx.zeros((1, length, decoder.config.hidden_size))
    rows = [
        primitive.inputs[0][0][-2] if primitive.name == "Matmul" else primitive.shape[-2]
        for primitive in trace(lambda x: decoder.hidden(x, decoder.make_cache(), last_only=True), x)
        if primitive.name in ("Matmul", "AddMM") and len(primitive.shape) < 4
    ]
    # qkv, o_proj, gate_up, down_proj of each layer
    assert rows == [length] * (4 * (decoder.config.num_layers - 1) + 1) + [1] * 3


def engine_decoder() -> Decoder:
    return load("demo").pipeline.model.decoder


@pytest.mark.parametrize("length", [255, 256, 512])
def test_the_kv_cache_holds_its_own_bytes_and_not_the_product_they_were_cut_from(
    length: int,
) -> None:
    """Of a prompt of 256 positions, which fill a buffer, MLX kept the whole of q, k and v: for
    0.5B 50 MiB more than the cache's 6."""
    decoder = engine_decoder()
    x = mx.random.normal((1, length, decoder.config.hidden_size))
    cache = decoder.make_cache()
    mx.eval(x)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.eval(decoder.hidden(x, cache, last_only=True), [layer.state for layer in cache])
    held = mx.get_active_memory() - before
    assert held <= sum(layer.nbytes for layer in cache) + 16 * 2**10
