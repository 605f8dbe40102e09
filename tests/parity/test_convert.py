"""Converting changes names and order, never a value; quantizing a converted folder is the same
as quantizing its source; the same command gives the same bytes.

The demo model in every layout, written by `source_folders.py`, which shares no table with us.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import demo_cases
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantizing
import source_folders as folders
import sources
from asking import CASES, DEMO, barred_ids, relative_rms
from fileformats import stored
from make_mlx_vlm_reference import inventory
from mlx.utils import tree_flatten
from sources import Source

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import decide_tied, load_model
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.convert.pipeline import MakeRecipe, convert
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.model.fused_qwen2 import source_weights
from fastvlm_mlx.quantize.recipes import group_of, make_recipe
from fastvlm_mlx.quantize.side import weigh

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

HEAD = "vision_tower.vision_model.head.proj"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source() -> Source:
    return sources.read_source(DEMO)


@pytest.fixture(scope="module")
def apple(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apple's folder of the demo model, bfloat16 as released."""
    return folders.write_apple(tmp_path_factory.mktemp("source") / "apple", source.fused(), "BF16")


int4 = partial(make_recipe, "balanced", bits=4)


def files(folder: Path) -> dict[str, str]:
    """Digest of every file by its path, the model card apart: it holds the command."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


LAYOUTS: dict[str, Callable[[Path, Source], Path]] = {
    "apple sharded": lambda f, s: folders.write_apple(f, s.fused(), "BF16", shards=3),
    "apple bin": lambda f, s: folders.write_apple(f, s.fused(), "BF16", suffix="bin"),
    "timm fused": lambda f, s: folders.write_fast_vlm(f, s.fused(), "BF16"),
    "mlx-vlm": lambda f, s: folders.write_mlx_vlm(f, s, "BF16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_the_same_tensors(
    tmp_path: Path, source: Source, apple: Path, name: str
) -> None:
    convert(apple, tmp_path / "apple")
    convert(LAYOUTS[name](tmp_path / "source", source), tmp_path / "other")
    ours, other = inventory(tmp_path / "apple"), inventory(tmp_path / "other")
    if name == "timm fused":  # timm's tower has no CLIP head: zeros stand for it
        assert not mx.load(str(tmp_path / "other" / "model.safetensors"))[HEAD].any()
        ours.pop(HEAD), other.pop(HEAD)
    assert ours == other


def test_native_to_native_and_the_same_command_twice_give_the_same_bytes(
    tmp_path: Path, apple: Path
) -> None:
    """safetensors keeps the order of insertion: others' bytes change from run to run."""
    once, twice, again = (tmp_path / name for name in ("once", "twice", "again"))
    convert(apple, once)
    convert(apple, twice)
    convert(once, again)
    assert files(once) == files(twice) == files(again)
    assert (once / "README.md").read_bytes() == (twice / "README.md").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantizing_the_converted_folder_is_quantizing_its_source(
    tmp_path: Path, apple: Path, dtype: str
) -> None:
    convert(apple, tmp_path / "native", dtype=dtype)
    convert(tmp_path / "native", tmp_path / "two_steps", recipe=int4)
    convert(apple, tmp_path / "one_step", dtype=dtype, recipe=int4)
    assert files(tmp_path / "two_steps") == files(tmp_path / "one_step")


def test_a_loaded_artifact_is_its_source_quantized_in_memory(tmp_path: Path, apple: Path) -> None:
    """PyTorch → native → quantized → loaded, bit for bit PyTorch → loaded → `nn.quantize`."""
    convert(apple, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "packed", recipe=int4)
    loaded = fv.load(tmp_path / "packed", dtype="bfloat16", keep_quantized=True).pipeline.model
    floats = decide_tied(open_checkpoint(apple))
    wanted = load_model(floats, mx.bfloat16, dequantize=False, fuse_decoder=False)
    recipe = int4(num_layers=wanted.config.decoder.num_layers)

    def setting(path: str, _: nn.Module) -> bool | dict[str, int | str]:
        found = recipe.setting(path) if group_of(path) else None
        if found is None:
            return False
        return {"bits": found.bits, "group_size": found.group_size, "mode": found.mode}

    nn.quantize(wanted, class_predicate=setting)
    ours, theirs = source_weights(loaded), dict(tree_flatten(wanted.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    assert {a.dtype for name, a in ours.items() if name.endswith("q_proj.weight")} == {mx.uint32}


def test_the_training_form_comes_out_reparameterized_and_answers_the_same(tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "native", dtype="float32")
    keys = set(inventory(tmp_path / "native"))
    assert not [key for key in keys if "rbr_" in key or "lkb_origin" in key or ".pe." in key]
    ours, demo = (fv.load(where, dtype="float32") for where in (tmp_path / "native", DEMO))
    assert not [key for key in keys if "num_batches_tracked" in key]
    picture = demo_cases.picture("portrait")
    features = [np.array(engine.encode(picture).features) for engine in (ours, demo)]
    assert relative_rms(*features) <= 1e-5
    for name in ("text only", "landscape", "two images"):
        assert barred_ids(ours, CASES[name]) == barred_ids(demo, CASES[name])


def test_a_head_is_dropped_only_if_it_is_the_embeddings_copy(
    tmp_path: Path, source: Source, apple: Path
) -> None:
    convert(apple, tmp_path / "tied")
    assert "language_model.lm_head.weight" not in inventory(tmp_path / "tied")
    untied = folders.write_apple(tmp_path / "source", source.untied().fused(), "BF16")
    convert(untied, tmp_path / "untied")
    assert "language_model.lm_head.weight" in inventory(tmp_path / "untied")
    configs = {name: json.loads((tmp_path / name / "config.json").read_text())
               for name in ("tied", "untied")}  # fmt: skip
    assert configs["tied"]["tie_word_embeddings"] is True
    assert configs["untied"]["tie_word_embeddings"] is False


def test_a_float16_tower_keeps_its_last_stage_in_float32(tmp_path: Path, apple: Path) -> None:
    """Another project measured 60,928 behind the second RepCPE and NaN after it."""
    convert(apple, tmp_path / "native", dtype="float16")
    tower = {key: row for key, row in inventory(tmp_path / "native").items() if "vision" in key}
    wide = {key.split(".")[2] + "." + key.split(".")[3] for key, row in tower.items()
            if row[0] == "F32"}  # fmt: skip
    assert {name.split(".")[0] for name in wide} == {"network", "conv_exp"}
    assert {name for name in wide if name.startswith("network")} == {"network.9", "network.10"}


def test_a_quantized_source_keeps_its_codes(tmp_path: Path, source: Source) -> None:
    tensors = sources.mlx_tensors(source)
    packed, _, setting = quantizing.quantize(tensors, 4, "BF16")
    folder = folders.write_mlx_vlm(tmp_path / "mlx", source, tensors=packed, quantization=setting)
    convert(folder, tmp_path / "native")
    before, after = inventory(folder), inventory(tmp_path / "native")
    assert before == after
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert written["quantization"]["bits"] == 4
    with pytest.raises(ConfigError, match="quantized already"):
        convert(folder, tmp_path / "again", recipe=int4)


def test_padding_of_the_vocabulary_is_cut(tmp_path: Path, source: Source) -> None:
    """transformers pads with random rows, which could be sampled: 152,000 rows are 151,936."""
    hidden = source.text["hidden_size"]
    rows = np.ones((152000, hidden), np.float32)
    rows[151936:] = 77
    padded = sources.Source(
        {**source.tensors, "model.language_model.embed_tokens.weight": rows},
        json.loads(json.dumps(source.config)),
        source.folder,
    )
    padded.config["text_config"]["vocab_size"] = 152000
    convert(folders.write_fast_vlm(tmp_path / "fast_vlm", padded), tmp_path / "native")
    written = mx.load(str(tmp_path / "native" / "model.safetensors"))[EMBEDDING]
    assert written.shape == (151936, hidden)
    assert written.max().item() == 1
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["vocab_size"] == 151936


def test_the_end_of_a_turn_ends_an_answer_whatever_the_source_says(
    tmp_path: Path, source: Source
) -> None:
    """transformers' fast_vlm names base Qwen2's end of text, at which no answer ends."""
    folder = folders.write_fast_vlm(tmp_path / "fast_vlm", source.fused(), "F16")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 608
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["eos_token_id"] == 610


def test_settings_of_modules_that_are_stored_float_are_not_passed_on(
    tmp_path: Path, source: Source
) -> None:
    """Loading passes over them; converting once ended with "another model"."""
    tensors = sources.mlx_tensors(source)
    packed, _, setting = quantizing.quantize(tensors, 4, "BF16")
    norm = {"language_model.model.layers.99.mlp.up_proj": {"group_size": 64, "bits": 8}}
    whole = {k: v for k, v in packed.items() if "mm_projector" not in k}
    whole |= {k: stored(tensors[k], "BF16") for k in tensors if "mm_projector" in k}
    folder = folders.write_mlx_vlm(
        tmp_path / "mlx",
        source,
        tensors=dict(sorted(whole.items())),
        quantization=setting | norm | {"mm_projector.0": {"group_size": 64, "bits": 8}},
    )
    convert(folder, tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())["quantization"]
    assert written["mm_projector.0"] is False
    assert not [key for key in written if "layers.99" in key]


def test_a_projector_of_one_layer_is_converted_for_this_engine(
    tmp_path: Path, source: Source
) -> None:
    first = {k: v for k, v in source.fused().tensors.items() if "projector.linear_2" not in k}
    folder = folders.write_apple(tmp_path / "apple", Source(first, source.config, DEMO), "BF16")
    config = json.loads((folder / "config.json").read_text()) | {"mm_projector_type": "linear"}
    (folder / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    artifact = convert(folder, tmp_path / "native", say=said.append)
    assert artifact.consumers == ("native",) and "this engine only" in said[0]
    assert "mm_projector.weight" in inventory(tmp_path / "native")
    ours, theirs = (
        np.array(fv.load(where, dtype="float32").encode(demo_cases.picture("portrait")).features)
        for where in (tmp_path / "native", folder)
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("recipe", [None, int4])
def test_the_cards_bits_a_weight_are_the_reports(
    tmp_path: Path, apple: Path, recipe: MakeRecipe | None
) -> None:
    """One is reckoned before writing, the other from the folder's headers: they once differed."""
    artifact = convert(apple, tmp_path / "native", dtype="float16", recipe=recipe)
    read = weigh(open_checkpoint(tmp_path / "native")).bits_per_weight
    assert artifact.bits_per_weight == pytest.approx(read, rel=1e-12)
    assert f"| bits per weight | {read:.2f} |" in (tmp_path / "native" / "README.md").read_text()


def test_a_source_is_never_touched(tmp_path: Path, source: Source) -> None:
    """Other tools rewrite the user's checkpoint in place; a crash then leaves it broken."""
    folder = folders.write_apple(tmp_path / "apple", source.fused(), "BF16")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    convert(folder, tmp_path / "native")
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match="source"):
        convert(folder, folder, overwrite=True)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_left(
    tmp_path: Path, source: Source, bad: float
) -> None:
    fused = source.fused()
    name = "model.language_model.norm.weight"
    values = np.array(fused.tensors[name], np.float32)
    values[3] = bad
    broken = sources.Source({**fused.tensors, name: values}, fused.config, fused.folder)
    folder = folders.write_apple(tmp_path / "apple", broken)
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight.*not finite"):
        convert(folder, tmp_path / "native")
    assert {path.name for path in tmp_path.iterdir()} == {"apple"}


def test_float16_says_when_a_value_does_not_fit(tmp_path: Path, source: Source) -> None:
    fused = source.fused()
    name = "model.language_model.norm.weight"
    large = np.full_like(fused.tensors[name], 1e5, dtype=np.float32)
    folder = folders.write_apple(
        tmp_path / "apple", sources.Source({**fused.tensors, name: large}, fused.config, DEMO)
    )
    with pytest.raises(CheckpointError, match="bfloat16"):
        convert(folder, tmp_path / "native", dtype="float16")
