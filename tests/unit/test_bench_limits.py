"""The formulas of what a stage costs, beside the graph that really computes it; no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from benchmarks.graph_trace import Primitive, hollow, trace
from fastvlm_mlx.bench.costs import (
    Cost,
    DType,
    Storage,
    decode_cost,
    head_cost,
    held_weight_bytes,
    layers_cost,
    prefill_cost,
    projector_cost,
    vision_cost,
    vision_parts,
    weight_bytes,
)
from fastvlm_mlx.bench.limits import PAPER_STAGES, Peaks, limits, stage_costs
from fastvlm_mlx.checkpoint.store import target_dtype
from fastvlm_mlx.config import PRESETS, DecoderConfig, VisionConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.projector import Projector
from fastvlm_mlx.model.vision import FastViTHD

FLOAT32 = Storage(dtype="float32")
GF = 1e9


def product_flops(primitive: Primitive) -> int:
    """Twice the multiply-adds of a convolution or product, by its shapes alone."""
    outputs = math.prod(primitive.shape)
    if primitive.name == "Convolution":
        return 2 * outputs * math.prod(primitive.inputs[1][0][1:])
    if primitive.name in ("Matmul", "AddMM", "QuantizedMatmul"):
        return 2 * outputs * primitive.inputs[0][0][-1]
    return 0


def traced_flops(primitives: Sequence[Primitive]) -> int:
    return sum(product_flops(primitive) for primitive in primitives)


# The tower


@pytest.fixture(scope="module")
def tower() -> FastViTHD:
    return hollow(FastViTHD(VisionConfig()))


@pytest.mark.parametrize(
    ("height", "width", "images"),
    [(256, 256, 1), (1024, 1024, 1), (320, 704, 1), (64, 64, 1), (256, 192, 3)],
)
def test_the_towers_operations_are_those_of_its_graph(
    tower: FastViTHD, height: int, width: int, images: int
) -> None:
    pixels = mx.zeros((images, height, width, 3), dtype=mx.uint8)
    cost = vision_cost(VisionConfig(), FLOAT32, height=height, width=width, images=images)
    assert cost.flops == traced_flops(trace(tower, pixels))


def test_the_tower_at_1024_pixels_is_the_known_487_gf() -> None:
    """SPEED's arithmetic: 460 of 1x1 layers, 13.7 of attention, 1.4 stem, 2 x 5.7 depthwise."""
    parts = vision_parts(VisionConfig(), FLOAT32, height=1024, width=1024)
    whole = vision_cost(VisionConfig(), FLOAT32, height=1024, width=1024)
    assert whole.flops == sum(part.flops for part in parts.values())
    assert round(whole.flops / GF) == 487
    assert parts["stage 3"].flops > 0.45 * whole.flops


def test_a_towers_parts_are_stem_stages_downsamples_and_expansion() -> None:
    names = ["stem", "stage 1"]
    for i in range(2, 6):
        names += [f"downsample {i}", f"stage {i}"]
    parts = vision_parts(VisionConfig(), FLOAT32, height=256, width=256)
    assert list(parts) == [*names, "expansion"]


def test_attention_alone_grows_with_the_square_of_the_pixels() -> None:
    config = VisionConfig()

    def flops(side: int) -> int:
        return vision_cost(config, FLOAT32, height=side, width=side).flops

    attention = 4 * (4 * 768 * (512 // 32) ** 4 + 2 * 1536 * (512 // 64) ** 4)
    gate = 2 * 2 * config.out_dim * config.se_dim
    rest = flops(512) - attention - gate
    assert flops(1024) == 16 * attention + 4 * rest + gate


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        vision_cost(VisionConfig(), FLOAT32, height=100, width=256)


# Projector and decoder


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("tokens", [16, 256])
def test_the_projectors_operations_are_those_of_its_graph(size: str, tokens: int) -> None:
    config = PRESETS[size]
    projector = hollow(Projector(config.projector))
    primitives = trace(projector, mx.zeros((1, tokens, config.projector.in_dim)))
    cost = projector_cost(config, FLOAT32, tokens=tokens)
    assert cost.flops == traced_flops(primitives)


def one_layer(size: str, layers: int = 1) -> DecoderConfig:
    """A preset's decoder with fewer layers, as tracing takes time by the layer."""
    values = PRESETS[size].decoder.to_json() | {"num_layers": layers}
    return DecoderConfig.from_json(values)


def hollow_decoder(config: DecoderConfig, bits: int = 16) -> Decoder:
    decoder = hollow(Decoder(config))
    if bits < 16:
        nn.quantize(decoder, group_size=64, bits=bits)
    return decoder


@pytest.mark.parametrize("size", PRESETS)
def test_prefills_operations_are_those_of_its_graph_less_the_masked_pairs(size: str) -> None:
    """The graph on a CPU computes scores of positions to come, and then masks them."""
    config, tokens = one_layer(size, 2), 286
    decoder = hollow_decoder(config)
    embeddings = mx.zeros((1, tokens, config.hidden_size))
    primitives = trace(lambda x: decoder.hidden(x, decoder.make_cache()), embeddings)
    masked = tokens * (tokens - 1) // 2
    cost = layers_cost(config, FLOAT32, tokens=tokens)
    assert traced_flops(primitives) == cost.flops + 2 * 4 * config.hidden_size * masked


@pytest.mark.parametrize("size", PRESETS)
def test_a_prefill_for_one_state_is_spared_what_only_other_positions_need(size: str) -> None:
    config, tokens = one_layer(size, 2), 286
    decoder = hollow_decoder(config)
    decoder.fuse(evaluate=False)
    embeddings = mx.zeros((1, tokens, config.hidden_size))
    primitives = trace(
        lambda x: decoder.hidden(x, decoder.make_cache(), last_only=True), embeddings
    )
    masked = tokens * (tokens - 1) // 2  # in the first layer; the second has one query
    cost = prefill_cost(config, FLOAT32, tokens=tokens)
    assert traced_flops(primitives) == cost.flops + 4 * config.hidden_size * masked
    assert cost.flops < layers_cost(config, FLOAT32, tokens=tokens).flops


def test_a_prefill_of_one_position_is_a_step() -> None:
    config = PRESETS["0.5b"].decoder
    one = prefill_cost(config, FLOAT32, tokens=1, cached=99)
    assert one.flops == layers_cost(config, FLOAT32, tokens=1, cached=99).flops


@pytest.mark.parametrize("size", PRESETS)
def test_a_decoded_tokens_operations_are_those_of_its_graph(size: str) -> None:
    config, context = one_layer(size), 300
    decoder = hollow_decoder(config)

    def step(ids: mx.array, past: mx.array) -> mx.array:
        cache = decoder.make_cache()
        for layer in cache:
            layer.update_and_fetch(past, past)
        return decoder.logits(decoder.hidden(decoder.embed(ids), cache))

    head_dim = config.hidden_size // config.num_heads
    past = mx.zeros((1, config.num_kv_heads, context, head_dim))
    primitives = trace(step, mx.array([[1]]), past)
    assert traced_flops(primitives) == decode_cost(config, FLOAT32, context=context).flops


def test_a_packed_models_operations_are_the_same() -> None:
    config = one_layer("0.5b")
    decoder = hollow_decoder(config, bits=4)
    x = mx.zeros((1, 1, config.hidden_size))
    primitives = trace(lambda x: decoder.logits(decoder.hidden(x, decoder.make_cache())), x)
    assert "QuantizedMatmul" in {primitive.name for primitive in primitives}
    layers = layers_cost(config, Storage(bits=4), tokens=1)
    assert traced_flops(primitives) == layers.flops + head_cost(config, Storage(bits=4)).flops


def test_the_halfb_prefill_of_286_positions_is_the_known_205_gf_and_its_attention() -> None:
    config = PRESETS["0.5b"].decoder
    attention = 24 * 4 * 896 * 286 * 287 // 2
    flops = layers_cost(config, FLOAT32, tokens=286).flops
    assert round((flops - attention) / GF) == 205


def test_positions_in_the_cache_are_attended_to_and_not_computed_again() -> None:
    config = PRESETS["0.5b"].decoder
    whole = layers_cost(config, FLOAT32, tokens=300).flops
    first = layers_cost(config, FLOAT32, tokens=200).flops
    assert layers_cost(config, FLOAT32, tokens=100, cached=200).flops == whole - first


# Bytes


def real_weights(size: str, dtype: DType, bits: int) -> dict[str, int]:
    """Bytes by name of a model whose layers are all one shape; only one of them is made."""
    config = PRESETS[size]
    small = type(config).from_json(config.to_json() | {"decoder": one_layer(size).to_json()})
    model = FastVLM(small, getattr(mx, dtype))
    kept = tree_map_with_path(
        lambda path, array: array.astype(target_dtype(path, getattr(mx, dtype))),
        model.parameters(),
    )
    model.update(kept)
    hollow(model)
    if bits < 16:
        nn.quantize(model.decoder, group_size=64, bits=bits)
    sizes = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    layer = {n: size for n, size in sizes.items() if ".layers.0." in n}
    for index in range(1, config.decoder.num_layers):
        sizes |= {n.replace(".0.", f".{index}.", 1): size for n, size in layer.items()}
    return sizes


@pytest.mark.parametrize("size", ["0.5b", "7b"])
@pytest.mark.parametrize(
    ("dtype", "bits"), [("bfloat16", 16), ("float16", 16), ("bfloat16", 8), ("float16", 4)]
)
def test_weight_bytes_are_those_of_the_model(size: str, dtype: DType, bits: int) -> None:
    """Also with scales and biases, an untied head, and the end of a float16 tower in float32."""
    held = held_weight_bytes(real_weights(size, dtype, bits))
    assert held == weight_bytes(PRESETS[size], Storage(dtype=dtype, bits=bits))


def test_a_weight_of_no_stage_is_not_overlooked() -> None:
    with pytest.raises(ValueError, match="ears"):
        held_weight_bytes({"ears.weight": 4})


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_kv_bytes_are_those_of_the_cache(kv_bits: int | None) -> None:
    config = one_layer("0.5b", 3)
    decoder = Decoder(config, dtype=mx.bfloat16)
    cache = decoder.make_cache(kv_bits)
    head_dim = config.hidden_size // config.num_heads
    keys = mx.zeros((1, config.num_kv_heads, 256, head_dim), dtype=mx.bfloat16)
    for layer in cache:
        layer.update_and_fetch(keys, keys)
    states = [array for _, array in tree_flatten([layer.state for layer in cache])]
    held = sum(array.nbytes for array in states if isinstance(array, mx.array))
    assert held == Storage(kv_bits=kv_bits).kv(256, config)


def test_a_decoded_token_reads_every_weight_once_and_its_whole_context() -> None:
    config, storage = PRESETS["0.5b"], Storage()
    weights = weight_bytes(config, storage)
    cost = decode_cost(config.decoder, storage, context=1000)
    row = config.decoder.hidden_size * 2
    assert cost.weight_bytes == weights.layers + weights.table + row
    longer = decode_cost(config.decoder, storage, context=1001)
    assert longer.bytes - cost.bytes == 2 * 24 * 2 * 64 * 2


# Limits


def test_the_limit_is_the_later_of_operations_and_bytes() -> None:
    costs = {"fast": Cost(1000, 10, 10), "wide": Cost(10, 500, 500)}
    chip = Peaks(flops_s=1e6, bandwidth_bytes_s=1e6, dtype="float16", how="specified")
    found = limits(costs, chip=chip)
    assert (found["fast"].limit_ms, found["fast"].bound) == (1.0, "compute")
    assert (found["wide"].limit_ms, found["wide"].bound) == (1.0, "memory")
    assert found["wide"].probe_ms is None


def test_a_specified_peak_is_preferred_and_the_probes_limit_is_kept_beside() -> None:
    costs = {"one": Cost(1000, 0, 100)}
    chip = Peaks(flops_s=None, bandwidth_bytes_s=1e5, dtype="float16", how="Apple's figure")
    probe = Peaks(flops_s=1e6, bandwidth_bytes_s=5e4, dtype="float16", how="measured")
    limit = limits(costs, chip=chip, probe=probe)["one"]
    assert (limit.limit_ms, limit.probe_ms) == (1.0, 2.0)
    assert limit.source == "1e-06 TFLOP/s in float16 (measured), 0.0001 GB/s (Apple's figure)"


def test_whose_both_peaks_are_is_said_once() -> None:
    probe = Peaks(flops_s=1e12, bandwidth_bytes_s=1e10, dtype="float32", how="measured: so")
    limit = limits({"one": Cost(1000, 0, 100)}, probe=probe)["one"]
    assert limit.source == "1 TFLOP/s in float32, 10 GB/s (measured: so)"


def test_without_a_known_peak_there_is_no_limit_but_still_the_counts() -> None:
    limit = limits({"one": Cost(7, 3, 2)})["one"]
    assert (limit.flops, limit.bytes, limit.limit_ms, limit.bound) == (7, 5, None, None)


def test_the_stages_have_the_figures_names_and_the_paper_adds_four_of_them() -> None:
    costs = stage_costs(
        PRESETS["0.5b"],
        Storage(),
        resolution=256,
        images=2,
        prompt_tokens=50,
        generated_tokens=10,
    )
    chip = Peaks(flops_s=1e12, bandwidth_bytes_s=1e11, dtype="float16", how="specified")
    found = limits(costs, chip=chip)
    assert set(found) == {*PAPER_STAGES, "decode_tps", "paper_ttft_ms"}
    total = sum(found[name].limit_ms or 0 for name in PAPER_STAGES)
    assert found["paper_ttft_ms"].limit_ms == pytest.approx(total)
    assert (
        costs["projector_ms"].flops == projector_cost(PRESETS["0.5b"], Storage(), tokens=32).flops
    )
    assert costs["decode_tps"] == decode_cost(PRESETS["0.5b"].decoder, Storage(), context=54)


def test_without_pictures_the_tower_costs_nothing() -> None:
    costs = stage_costs(
        PRESETS["0.5b"], Storage(), resolution=256, images=0, prompt_tokens=9, generated_tokens=1
    )
    assert set(costs) == {"prefill_ms", "first_token_ms", "decode_tps"}
    assert "paper_ttft_ms" not in limits(costs)


def test_weights_that_are_really_held_take_the_formulas_place() -> None:
    config, storage = PRESETS["7b"], Storage(bits=4)
    held = weight_bytes(config, Storage(bits=8))
    costs = stage_costs(
        config,
        storage,
        resolution=256,
        images=1,
        prompt_tokens=9,
        generated_tokens=2,
        weights=held,
    )
    assert costs["prefill_ms"].weight_bytes == held.layers
    assert costs["first_token_ms"].weight_bytes == held.head
    assert costs["decode_tps"].weight_bytes == held.layers + held.head
