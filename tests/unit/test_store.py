"""Folders become models: strict about tensors, right about heads, gentle on sources."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import decide_tied, load_model
from fastvlm_mlx.checkpoint.memory import (
    _cgroup_rooms,
    _parse_meminfo,
    _parse_vm_stat,
    free_bytes,
    readable_bytes,
    require_memory,
)
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.config import QUANT_MODES, QuantConfig
from fastvlm_mlx.errors import (
    CheckpointError,
    CheckpointMismatch,
    ConfigError,
    FastVLMError,
    MemoryLimitError,
)
from fastvlm_mlx.model.fastvlm import FastVLM

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import quantizing
import source_folders
import sources

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"


@pytest.fixture(scope="module")
def source() -> sources.Source:
    return sources.read_source(DEMO)


@pytest.fixture
def apple(source: sources.Source, tmp_path: Path) -> Path:
    return source_folders.write_apple(tmp_path / "apple", source)


def write_packed(folder: Path, source: sources.Source, bits: int) -> Path:
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), bits, "BF16")
    return source_folders.write_mlx_vlm(folder, source, tensors=packed, quantization=quantization)


def write_app(folder: Path, source: sources.Source) -> Path:
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), 8, "F16")
    return source_folders.write_app(folder, source, packed, quantization)


def load(folder: Path, dtype: mx.Dtype = mx.float32, **options: Any) -> FastVLM:
    return load_model(
        decide_tied(open_checkpoint(folder)), dtype, **{"dequantize": True, **options}
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(path), tensors)


def test_every_loaded_weight_is_evaluated_and_of_the_dtype_asked_for(apple: Path) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        leaves = tree_flatten(load(apple, dtype).parameters())
        assert {array.dtype for _, array in leaves} == {dtype}


def test_no_branch_norm_or_layer_scale_is_left_in_the_model() -> None:
    names = [name for name, _ in tree_flatten(load(DEMO).vision.parameters())]
    words = ("bn", "running", "layer_scale", "norm", "head", "skip", "kxk")
    assert not [name for name in names if any(word in name for word in words)]


def test_a_float16_tower_keeps_its_tail_in_float32() -> None:
    """Another project measured 60,928 behind the second RepCPE and NaN after it in float16."""
    tower = load(DEMO, mx.float16).vision
    for name, array in tree_flatten(tower.parameters()):
        tail = name.startswith(("stages.4.pos_emb", "stages.4.blocks", "expansion"))
        assert array.dtype == (mx.float32 if tail else mx.float16), name


def test_a_source_is_never_written_to(apple: Path) -> None:
    before = {path.name: path.read_bytes() for path in apple.iterdir()}
    load(apple)
    assert {path.name: path.read_bytes() for path in apple.iterdir()} == before


def test_progress_ends_at_the_total(apple: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(apple, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_head_equal_to_the_embedding_is_dropped(apple: Path) -> None:
    """All of Apple's files hold an lm_head; where it is a copy, keeping it wastes memory."""

    def add_head(tensors: dict[str, mx.array]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0

    edit_tensors(apple, add_head)
    model = load(apple)
    assert model.config.decoder.tied
    assert "lm_head" not in model.decoder.qwen2


def test_a_different_head_is_used_and_the_flag_that_denies_it_is_reported(
    apple: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tied path used for the untied 7B gives fluent nonsense."""

    def add_head(tensors: dict[str, mx.array]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    edit_tensors(apple, add_head)
    edit_config(apple, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, "fastvlm_mlx"):
        model = load(apple)
    assert "lm_head differs" in caplog.text
    hidden = mx.random.normal((1, 1, model.config.decoder.hidden_size))
    tied = model.decoder.qwen2.model.embed_tokens.as_linear(hidden)
    assert mx.allclose(model.decoder.logits(hidden), tied * 2, rtol=1e-3).item()


def test_no_head_is_tied_whatever_the_flag_says(apple: Path) -> None:
    edit_tensors(apple, _drop("lm_head.weight"))
    edit_config(apple, tie_word_embeddings=False)
    assert load(apple).config.decoder.tied


def test_a_head_that_is_a_copy_is_not_counted_as_memory_the_model_needs(apple: Path) -> None:
    """All of Apple's files hold one; the check before loading counted it and refused too early."""
    needed = open_checkpoint(DEMO).resident_bytes(mx.float32, dequantize=True)
    stored = open_checkpoint(apple)
    assert stored.resident_bytes(mx.float32, dequantize=True) > needed
    decided = decide_tied(stored)
    assert decided.resident_bytes(mx.float32, dequantize=True) == needed
    stays = tree_flatten(load_model(decided, mx.float32, dequantize=True).parameters())
    assert sum(array.nbytes for _, array in stays) == needed


def test_padded_vocabulary_rows_of_fast_vlm_are_cut(tmp_path: Path) -> None:
    """transformers' 152,000 rows end in 64 random ones that must never be sampled."""
    folder = tmp_path / "padded"
    shutil.copytree(DEMO, folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rows = text["vocab_size"]

    def pad(tensors: dict[str, mx.array]) -> None:
        name = "model.language_model.embed_tokens.weight"
        tensors[name] = mx.concatenate([tensors[name], mx.ones_like(tensors[name][:8])])

    edit_tensors(folder, pad)
    from fastvlm_mlx.checkpoint import source_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(source_config.FAST_VLM_VOCABULARY, rows + 8, rows)
        edit_config(folder, text_config=text | {"vocab_size": rows + 8})
        model = load(folder)
    assert model.decoder.qwen2.model.embed_tokens.weight.shape[0] == rows
    original = load(DEMO).decoder.qwen2.model.embed_tokens.weight
    assert mx.array_equal(model.decoder.qwen2.model.embed_tokens.weight, original).item()


def _drop(name: str) -> Callable[[dict[str, mx.array]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, mx.array]], None]:
    return lambda tensors: tensors.update({name: mx.zeros(shape)})


def _cast(name: str, dtype: mx.Dtype) -> Callable[[dict[str, mx.array]], None]:
    return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


TOWER = "model.vision_tower.vision_tower.model."


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_drop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
        (_drop("model.mm_projector.2.bias"), "linear_2.bias"),
        (_drop(TOWER + "network.0.0.convffn.fc2.bias"), "ffn.fc2.bias"),
        (_drop(TOWER + "network.0.0.convffn.conv.bn.running_var"), "bn.running_var"),
        (_drop(TOWER + "network.0.0.layer_scale"), "layer_scale"),
        (_set("model.image_newline", (4,)), "model.image_newline"),
        (_set("model.layers.9.mlp.up_proj.weight", (4, 4)), "model.layers.9"),
        (_set(TOWER + "network.0.7.layer_scale", (16, 1, 1)), "network.0.7.layer_scale"),
        (_set(TOWER + "network.0.0.layer_scale_1", (16, 1, 1)), "layer_scale_1"),
        (_set("model.norm.weight", (3,)), r"model\.norm\.weight is \(3,\)"),
        (_set(TOWER + "network.0.0.convffn.fc1.bias", (3,)), "network.0.0|blocks.0"),
        (_set(TOWER + "network.0.0.convffn.conv.conv.weight", (16, 1, 5, 5)), "ffn.conv.weight"),
        (_cast("model.norm.weight", mx.int32), "norm.weight is int32, not float16"),
        (_cast(TOWER + "network.0.0.layer_scale", mx.int32), "layer_scale is int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(
    apple: Path, edit: Callable[[dict[str, mx.array]], None], named: str
) -> None:
    edit_tensors(apple, edit)
    with pytest.raises(CheckpointMismatch, match=named) as caught:
        load(apple)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def _write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _index_of_missing(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_numbers(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": 1, "model.embed_tokens.weight": None}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda f: shutil.rmtree(f) or f.mkdir(), CheckpointError, "no config.json"),
        (_write("config.json", b"{"), CheckpointError, "config.json cannot be read as JSON"),
        (_write("config.json", b"\xff\xfe"), CheckpointError, "cannot be read as JSON"),
        (_write("config.json", b"[1]"), CheckpointError, "no JSON object"),
        (_write("config.json", b'{"model_type": "llava_llama"}'), ConfigError, "llava_llama"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no \\*.safetensors"),
        (_truncate, CheckpointError, "truncated or corrupt.*download it again"),
        (_write("model.safetensors", b""), CheckpointError, "truncated or corrupt"),
        (_write("model.safetensors", b"x" * 5000), CheckpointError, "truncated or corrupt"),
        (_index_of_missing, CheckpointError, "00001-of-00002.safetensors is missing"),
        (_index_outside, CheckpointError, "outside its folder"),
        (_index_of_numbers, CheckpointError, "weight_map has 1 where a file's name belongs"),
        (_adapter_only, CheckpointError, "only an adapter"),
        (_twice, CheckpointError, "is in both"),
    ],
)
def test_damaged_folders_give_one_line(
    apple: Path, damage: Callable[[Path], object], error: type[FastVLMError], said: str
) -> None:
    damage(apple)
    with pytest.raises(error, match=said) as caught:
        load(apple)
    assert "\n" not in str(caught.value)


def test_an_app_export_says_which_original_holds_its_tower(
    source: sources.Source, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", source)
    with pytest.raises(CheckpointMismatch, match="--vision-from"):
        open_checkpoint(app)
    edit_config(app, hidden_size=896)
    with pytest.raises(CheckpointMismatch, match=r"apple/FastVLM-0\.5B"):
        open_checkpoint(app)


def test_a_tower_comes_from_another_folder(source: sources.Source, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app", source)
    joined = open_checkpoint(app, vision_from=DEMO)
    model = load_model(joined, mx.float32, dequantize=True)
    own = load(DEMO)
    pixels = mx.array(np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3)).astype(np.uint8))
    assert mx.array_equal(model.vision(pixels), own.vision(pixels)).item()


def test_a_tower_is_not_replaced_by_another_folders(apple: Path) -> None:
    with pytest.raises(ConfigError, match="has its own tower: leave out --vision-from"):
        open_checkpoint(apple, vision_from=DEMO)


def test_a_damaged_tower_is_named_by_the_folder_it_came_from(
    source: sources.Source, apple: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", source)
    edit_tensors(apple, _drop(TOWER + "network.0.0.convffn.fc2.bias"))
    joined = open_checkpoint(app, vision_from=apple)
    with pytest.raises(CheckpointMismatch, match=rf"^{apple}: llava_qwen2: .*ffn\.fc2\.bias"):
        load_model(joined, mx.float32, dequantize=True)


def test_an_app_export_needs_none_of_the_towers_keys(
    source: sources.Source, tmp_path: Path
) -> None:
    """Apple's app requires neither key, and its exports may hold a rope_scaling it ignores."""
    app = write_app(tmp_path / "app", source)
    edit_config(
        app,
        mm_vision_tower=None,
        mm_projector_type=None,
        rope_scaling={"mrope_section": [2, 1, 1], "type": "default"},
    )
    config = open_checkpoint(app, vision_from=DEMO).config
    assert config.projector.kind == "mlp2x_gelu"
    assert config.vision == open_checkpoint(DEMO).config.vision


def test_no_forward_copies_a_weight(apple: Path) -> None:
    """Transposed kernels and every other row of a split one were copied at each picture."""
    for folder in (apple, DEMO):
        for name, array in tree_flatten(load(folder).parameters()):
            assert memoryview(array).c_contiguous, name


Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"
TABLE = "language_model.model.embed_tokens"
NORM = "language_model.model.norm"


def _quantization(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        quantization = json.loads((folder / "config.json").read_text())["quantization"]
        edit_config(folder, quantization=quantization | changes)

    return edit


def _tensors(edit: Callable[[dict[str, mx.array]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, edit)


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (_tensors(_drop(f"{Q_PROJ}.biases")), CheckpointMismatch, r"weight has no \.biases"),
        (_tensors(_drop(f"{Q_PROJ}.scales")), CheckpointMismatch, r"place: .*q_proj\.biases"),
        (_tensors(_drop(f"{Q_PROJ}.weight")), CheckpointMismatch, r"missing: .*q_proj\.weight"),
        (
            _tensors(_set(f"{Q_PROJ}.biases", (128, 3))),
            CheckpointMismatch,
            r"q_proj\.biases is \(128, 3\), 4 bits in groups of 64, affine ask for \(128, 2\)",
        ),
        (_tensors(_set(f"{Q_PROJ}.scales", (2, 2))), CheckpointMismatch, r"q_proj\.scales is \(2"),
        (
            _tensors(_cast(f"{Q_PROJ}.weight", mx.int32)),
            CheckpointMismatch,
            r"q_proj\.weight is int32, not uint32",
        ),
        (_tensors(_cast(f"{Q_PROJ}.scales", mx.uint8)), CheckpointMismatch, "scales is uint8"),
        (_tensors(_set(f"{NORM}.scales", (2,))), CheckpointMismatch, r"norm\.scales"),
        (_tensors(_set(f"{NORM}.extra.scales", (2, 2))), CheckpointMismatch, r"norm\.extra"),
        (_quantization(bits=8), CheckpointMismatch, r"8 bits in groups of 64"),
        (_quantization(bits=7), ConfigError, "not supported: 7 bits"),
        (_quantization(group_size=48), ConfigError, "groups of 48"),
        (_quantization(mode="mxfp4"), ConfigError, "groups of 64, 'mxfp4'"),
        (_quantization(mode="nvfp4"), ConfigError, "groups of 64, 'nvfp4'"),
        (
            _quantization(mode="mxfp4", group_size=32),
            CheckpointMismatch,
            r"has needless \.biases beside it for 4 bits in groups of 32, mxfp4",
        ),
    ],
)
def test_damaged_packed_tensors_give_one_line(
    source: sources.Source,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[FastVLMError],
    said: str,
    dequantize: bool,
) -> None:
    """A packed weight stored as int32 was loaded; most others were a traceback out of MLX."""
    folder = write_packed(tmp_path / "q", source, 4)
    damage(folder)
    with pytest.raises(error, match=said) as caught:
        load(folder, dequantize=dequantize)
    assert "\n" not in str(caught.value)


def test_widths_that_groups_do_not_divide_are_refused(
    source: sources.Source, tmp_path: Path
) -> None:
    """MLX itself would refuse to pack them, at the end of loading."""
    folder = write_packed(tmp_path / "q", source, 4)
    path = "language_model.model.layers.0.mlp.down_proj"
    edit_config(folder, intermediate_size=400)
    for name in ("gate_proj", "up_proj"):
        edit_tensors(folder, lambda t, n=name: _rows(t, path.replace("down_proj", n), 400))
    with pytest.raises(
        CheckpointMismatch, match=r"down_proj\.scales has no place: .* \(128, 400\)"
    ):
        load(folder)


def _rows(tensors: dict[str, mx.array], path: str, rows: int) -> None:
    """Give a packed module as many rows, the first ones repeated."""
    for leaf in ("weight", "scales", "biases"):
        array = tensors[f"{path}.{leaf}"]
        tensors[f"{path}.{leaf}"] = mx.concatenate([array, array])[:rows]


@pytest.mark.parametrize("dequantize", [True, False])
def test_padded_rows_of_a_packed_vocabulary_are_cut(
    source: sources.Source, tmp_path: Path, dequantize: bool
) -> None:
    """Only unpacked tables were cut; a packed one ended in a traceback of load_weights."""
    folder = write_packed(tmp_path / "q", source, 4)
    original = tree_flatten(load(folder, dequantize=dequantize).parameters())
    rows = source.text["vocab_size"]
    edit_tensors(folder, lambda tensors: _rows(tensors, TABLE, rows + 8))
    checkpoint = open_checkpoint(folder)
    padded = tree_flatten(load(folder, dequantize=dequantize).parameters())
    for (name, array), (_, expected) in zip(padded, original, strict=True):
        assert mx.array_equal(array, expected).item(), name
    stays = sum(array.nbytes for _, array in padded)
    assert checkpoint.resident_bytes(mx.float32, dequantize=dequantize) == stays


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
)
def test_modes_without_biases_load_packed_and_unpacked(
    source: sources.Source, tmp_path: Path, mode: str, bits: int, group: int
) -> None:
    folder = write_packed(tmp_path / "q", source, 4)
    expected = {}

    def repack(tensors: dict[str, mx.array]) -> None:
        for path in [name[:-7] for name in list(tensors) if name.endswith(".scales")]:
            parts = [tensors.pop(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases")]
            whole = mx.dequantize(*parts, group_size=64, bits=4)
            codes, scales = mx.quantize(whole, group_size=group, bits=bits, mode=mode)
            tensors |= {f"{path}.weight": codes, f"{path}.scales": scales}
            expected[path] = mx.dequantize(
                codes, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32
            )

    edit_tensors(folder, repack)
    _quantization(mode=mode, bits=bits, group_size=group)(folder)
    packed, plain = load(folder, dequantize=False), load(folder)
    table = plain.decoder.qwen2.model.embed_tokens.weight
    assert mx.array_equal(table, expected[TABLE]).item()
    ids = mx.array([[1, 5, 9, 300]])
    outputs = [
        m.decoder.logits(m.decoder.hidden(m.decoder.embed(ids), None)) for m in (packed, plain)
    ]
    assert mx.allclose(*outputs, atol=2e-2, rtol=2e-2).item()


def test_what_mlx_can_pack_is_what_the_config_accepts() -> None:
    weight = mx.ones((8, 256))
    for mode in QUANT_MODES:
        for bits in range(1, 10):
            for group_size in (8, 16, 32, 64, 128, 256):
                try:
                    mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
                    possible = True
                except ValueError:
                    possible = False
                try:
                    QuantConfig(bits=bits, group_size=group_size, mode=mode)
                    accepted = True
                except ConfigError:
                    accepted = False
                assert accepted == possible, (mode, bits, group_size)


def test_quantized_weights_without_quantization_in_the_config_are_refused(
    source: sources.Source, tmp_path: Path
) -> None:
    folder = write_packed(tmp_path / "q", source, 4)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="no quantization"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_and_unpacked_weights_give_the_same_logits(
    source: sources.Source, tmp_path: Path, bits: int
) -> None:
    folder = write_packed(tmp_path / "q", source, bits)
    packed, plain = load(folder, dequantize=False), load(folder)
    ids = mx.array([[1, 5, 9, 300]])
    outputs = [
        m.decoder.logits(m.decoder.hidden(m.decoder.embed(ids), None)) for m in (packed, plain)
    ]
    assert mx.allclose(*outputs, atol=1e-4, rtol=1e-4).item()
    kinds = {array.dtype for name, array in tree_flatten(packed.parameters()) if "scales" in name}
    assert kinds == {mx.float32}
    assert not [name for name, _ in tree_flatten(plain.parameters()) if "scales" in name]


def test_resident_bytes_are_what_stays_in_memory() -> None:
    checkpoint = open_checkpoint(DEMO)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model = load_model(checkpoint, dtype, dequantize=True)
        stays = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        assert checkpoint.resident_bytes(dtype, dequantize=True) == stays


def test_too_little_memory_is_one_line_with_both_sizes() -> None:
    with pytest.raises(MemoryLimitError, match=r"demo needs 2 GB, the memory limit is 1\.5 GB"):
        require_memory(2 * 10**9, limit=15 * 10**8, what="demo")
    with pytest.raises(MemoryLimitError, match=r"needs 1000000 GB, .* is free"):
        require_memory(10**15, limit=None, what="huge")
    require_memory(1, limit=None, what="tiny")


def test_free_memory_is_read_on_linux_and_macos() -> None:
    assert _parse_meminfo("MemTotal: 9 kB\nMemAvailable:    1000 kB\n") == 1_024_000
    vm_stat = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                   10.\nPages active: 99.\nPages inactive: 5.\n"
        "Pages speculative: 2.\nPages purgeable: 1.\n"
    )
    assert _parse_vm_stat(vm_stat) == 18 * 16384


def test_sizes_are_written_as_people_write_them() -> None:
    sizes = {999: "999 B", 1_500: "1.5 kB", 1_240_000_000: "1.24 GB", 10**15: "1000000 GB"}
    assert {count: readable_bytes(count) for count in sizes} == sizes


def cgroup(root: Path, listed: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": listed, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_containers_limit_is_what_is_free_in_it(tmp_path: Path) -> None:
    """In Docker MemAvailable is the whole machine's, and a load beyond the limit is killed.

    File cache counts as used there, and is given back when memory is wanted.
    """
    stat = "anon 5\nactive_file 100\ninactive_file 300\nslab 7\n"
    v2 = "sys/fs/cgroup/"
    root = cgroup(
        tmp_path / "v2",
        "0::/\n",
        {v2 + "memory.max": "5000\n", v2 + "memory.current": "1400\n", v2 + "memory.stat": stat},
    )
    assert list(_cgroup_rooms(root)) == [4000]
    (root / v2 / "memory.current").write_text("9999\n")
    assert list(_cgroup_rooms(root)) == [0]
    (root / v2 / "memory.max").write_text("max\n")
    assert list(_cgroup_rooms(root)) == []


def test_limits_of_the_groups_around_count_too(tmp_path: Path) -> None:
    stat = "total_active_file 0\ntotal_inactive_file 10\n"
    files = {}
    for place, limit in (("", 2**62), ("docker/", 600), ("docker/abc/", 900)):
        folder = f"sys/fs/cgroup/memory/{place}"
        files |= {
            folder + "memory.limit_in_bytes": f"{limit}\n",
            folder + "memory.usage_in_bytes": "110\n",
            folder + "memory.stat": stat,
        }
    listed = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n"
    root = cgroup(tmp_path / "v1", listed, files)
    assert sorted(_cgroup_rooms(root)) == [500, 800, 2**62 - 100]
    # A path of the host's that the container does not see: its own group is the root.
    (root / "proc/self/cgroup").write_text("4:memory:/../../elsewhere\n")
    assert list(_cgroup_rooms(root)) == [2**62 - 100]
    assert list(_cgroup_rooms(tmp_path / "no cgroups")) == []


def test_a_gpu_with_memory_of_its_own_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's CUDA backend says `free_memory`; this machine's answer stands in for a GPU's."""
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "GPU", "free_memory": 12345})
    assert free_bytes() == 12345


def test_weights_that_do_not_fit_unpacked_stay_packed_and_that_is_said(
    source: sources.Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_packed(tmp_path / "q", source, 4)
    checkpoint = open_checkpoint(folder)
    sizes = [checkpoint.resident_bytes(mx.float32, dequantize=flag) for flag in (False, True)]
    between = int(sum(sizes) / 2 * 1.2)
    with caplog.at_level(logging.WARNING, "fastvlm_mlx"):
        engine = fv.load(folder, device="cpu", memory_limit=between)
    assert "stay quantized" in caplog.text
    names = [name for name, _ in tree_flatten(engine.pipeline.model.parameters())]
    assert any(name.endswith(".scales") for name in names)
