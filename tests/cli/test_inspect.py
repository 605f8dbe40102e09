"""`fastvlm inspect`: true of every layout, from headers alone."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quantizing
import source_folders
import sources
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.model.fused_qwen2 import source_weights
from tests.cli.command import COMMAND, DEMO, TESTS, Run, copy_of_demo


def facts(run: Run, *words: object) -> dict[str, Any]:
    ran = run("inspect", *words, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def source() -> sources.Source:
    return sources.read_source(DEMO)


@pytest.fixture(scope="module")
def folders(source: sources.Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    floats = sources.mlx_tensors(source)
    packed, _, quantization = quantizing.quantize(floats, 4, "F16")
    return {
        "apple": source_folders.write_apple(root / "apple", source.fused(), shards=3),
        "bin": source_folders.write_apple(root / "bin", source, "F16", suffix="bin"),
        "untied": source_folders.write_apple(root / "untied", source.untied().fused()),
        "mlx": source_folders.write_mlx_vlm(root / "mlx", source, "BF16"),
        "q4": source_folders.write_mlx_vlm(
            root / "q4", source, tensors=packed, quantization=quantization
        ),
        "app": source_folders.write_app(root / "app", source, packed, quantization),
    }


def test_what_it_says_of_the_demo_is_what_loading_gives(run: Run) -> None:
    said = facts(run, "demo")
    engine = fv.load("demo", dtype="float32")
    weights = tree_flatten(engine.pipeline.model.parameters())
    for part, values in said["parts"].items():
        loaded = sum(array.size for name, array in weights if name.startswith(part + "."))
        assert values["parameters"] == loaded
    assert said["resident_bytes"]["float32"] == sum(array.nbytes for _, array in weights)
    assert said["config"] == json.loads(json.dumps(engine.config.to_json()))
    assert {int(i) for i in said["stop_ids"]} == set(engine.pipeline.stop_ids)
    assert "<|im_end|>" in said["stop_ids"].values()
    assert (said["image_size"], said["image_tokens"], said["image_mode"]) == (256, 16, "pad")


@pytest.mark.parametrize(
    ("name", "layout", "form", "head", "dtype"),
    [
        ("apple", "llava_qwen2", "fused", "stored", "float32"),
        ("bin", "llava_qwen2", "training", "stored", "float16"),
        ("untied", "llava_qwen2", "fused", "stored", "float32"),
        ("mlx", "mlx-vlm", "fused", "tied", "bfloat16"),
        ("q4", "mlx-vlm", "fused", "tied", "uint32"),
    ],
)
def test_every_layout_is_told_apart(
    run: Run, folders: dict[str, Path], name: str, layout: str, form: str, head: str, dtype: str
) -> None:
    said = facts(run, folders[name])
    assert (said["layout"], said["tower_form"], said["head"]) == (layout, form, head)
    assert next(iter(said["parts"]["decoder"]["stored_bytes"])) == dtype


def test_stored_bytes_are_those_of_the_tensors_in_the_files(
    run: Run, folders: dict[str, Path]
) -> None:
    from safetensors import safe_open

    with safe_open(folders["mlx"] / "model.safetensors", framework="np") as file:
        names = [name for name in file.keys() if not name.endswith("head.proj")]  # noqa: SIM118
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert facts(run, folders["mlx"])["stored_bytes"] == 2 * count


def test_quantization_is_told_by_setting_and_part(run: Run, folders: dict[str, Path]) -> None:
    said = facts(run, folders["q4"])
    (setting,) = said["quantization"]
    assert (setting["bits"], setting["group_size"], setting["mode"]) == (4, 64, "affine")
    assert set(setting["modules"]) == {"decoder", "projector"}
    engine = fv.load(folders["q4"], dtype="float32", keep_quantized=True)
    weights = source_weights(engine.pipeline.model)
    assert setting["modules"]["decoder"] == sum(
        name.startswith("decoder.") and name.endswith(".scales") for name in weights
    )
    assert said["resident_bytes_quantized"]["float32"] == sum(a.nbytes for a in weights.values())
    text = run("inspect", folders["q4"]).out
    assert "4 bits, groups of 64, affine: 22 in decoder, 2 in projector" in text
    assert "kept quantized" in text


def test_mixed_quantization_shows_each_setting(
    run: Run, source: sources.Source, tmp_path: Path
) -> None:
    floats = sources.mlx_tensors(source)
    override = {"language_model.model.layers.0.mlp.down_proj": 8}
    packed, _, quantization = quantizing.quantize(floats, 4, "F16", override)
    folder = source_folders.write_mlx_vlm(
        tmp_path / "mixed", source, tensors=packed, quantization=quantization
    )
    said = facts(run, folder)["quantization"]
    assert [setting["bits"] for setting in said] == [4, 8]
    assert said[1]["modules"] == {"decoder": 1}


def test_an_app_export_is_shown_with_the_tower_of_its_original(
    run: Run, folders: dict[str, Path]
) -> None:
    assert "add --vision-from" in run("inspect", folders["app"]).refused()
    said = facts(run, folders["app"], "--vision-from", "demo")
    assert said["layout"] == "apple-app"
    assert (
        said["parts"]["vision"]["parameters"] == facts(run, "demo")["parts"]["vision"]["parameters"]
    )


def test_text_is_short_and_names_what_matters(run: Run) -> None:
    ran = run("inspect", "demo")
    assert ran.code == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert len(lines) < 25 and all(len(line) <= 96 for line in lines)
    for words in (
        "transformers' fast_vlm",
        "610 <|im_end|>",
        "training form",
        "quantization  none",
        "1024 positions",
        "vocabulary 640, head tied",
        "float16",
        "in memory",
    ):
        assert words in ran.out, words


def seven_billion(folder: Path) -> Path:
    """Apple's 7B with a whole header and a hole for its 15.5 GB of weights."""
    folder.mkdir()
    shapes = json.loads((TESTS / "parity" / "keys_apple_fused.json").read_text())
    width, between, rows = 3584, 18944, 152064
    sizes = {"q_proj": width, "k_proj": 512, "v_proj": 512}
    for layer in range(28):
        at = f"model.layers.{layer}."
        for name, size in sizes.items():
            shapes[f"{at}self_attn.{name}.weight"] = [size, width]
            shapes[f"{at}self_attn.{name}.bias"] = [size]
        shapes[f"{at}self_attn.o_proj.weight"] = [width, width]
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = [between, width]
        shapes[f"{at}mlp.down_proj.weight"] = [width, between]
        shapes[f"{at}input_layernorm.weight"] = [width]
        shapes[f"{at}post_attention_layernorm.weight"] = [width]
    shapes["model.norm.weight"] = [width]
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = [rows, width]
    for number, inputs in ((0, 3072), (2, width)):
        shapes[f"model.mm_projector.{number}.weight"] = [width, inputs]
        shapes[f"model.mm_projector.{number}.bias"] = [width]
    header, offset = {}, 0
    for name, shape in shapes.items():
        dtype, size = ("I64", 8) if name.endswith("num_batches_tracked") else ("BF16", 2)
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    copy = copy_of_demo(folder / "demo")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).rename(folder / name)
    config = source_folders.apple_config(sources.read_source(DEMO))
    del config["vision_config"]
    config |= {
        "hidden_size": width, "intermediate_size": between, "vocab_size": rows,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
        "mm_hidden_size": 3072, "mm_vision_tower": "mobileclip_l_1024",
        "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# A process's own peak: Linux hands a parent's ru_maxrss on to its child, VmHWM begins anew.
PEAK_BYTES = (
    "__import__('resource').getrusage(0).ru_maxrss"
    if sys.platform == "darwin"
    else "1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
)


def test_seven_billion_parameters_are_inspected_without_reading_one(tmp_path: Path) -> None:
    folder = seven_billion(tmp_path / "7b")
    assert (folder / "model.safetensors").stat().st_size > 15 * 10**9
    code = COMMAND[-1].replace("sys.exit(main())", "code = main()") + (
        f"; print({PEAK_BYTES}, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(folder), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["parts"]["decoder"]["parameters"] == 7_615_616_512  # as Qwen2-7B's card counts
    assert said["parts"]["vision"]["parameters"] == pytest.approx(125e6, rel=0.02)
    assert said["image_tokens"] == 256 and said["head"] == "stored"
    assert int(done.stderr) < 400 * 2**20


@pytest.mark.slow
def test_a_model_too_large_for_the_machine_is_refused_before_it_is_read(
    run: Run, tmp_path: Path
) -> None:
    folder = seven_billion(tmp_path / "7b")
    refused = run("generate", "-p", "hi", "--model", folder, "--memory-limit", "20GB").refused()
    assert refused.startswith(f"{folder} needs 3") and "the memory limit is 20 GB" in refused
