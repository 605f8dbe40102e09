"""Each kind of bad input ends in one line that names it, exit code 2, and nothing on stdout."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import quantizing
import source_folders
import sources
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.cli.command import DEMO, Ran, Run, edit_json, spawn, wait

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

Tensors = dict[str, np.ndarray]

PROJECTOR = "model.multi_modal_projector.linear_1.weight"
TOWER = "model.vision_tower.timm_model."


def ask(run: Run, model: object, *words: object) -> Ran:
    return run("generate", "-p", "hi", "--model", model, *words)


# ---- weights


def damage(model: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the weights after `change`."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def transpose(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: np.ascontiguousarray(t[name].T)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(PROJECTOR), ["1 tensors missing", "projector.linear_1.weight"]),
        (lambda t: t.pop("model.language_model.norm.weight"), ["missing", "norm.weight"]),
        (lambda t: t.pop(TOWER + "stem.1.conv_kxk.0.bn.running_var"), ["stem.1", "running_var"]),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(TOWER + "stages.2.blocks.1.")],
            ["tensors missing", "stages.2.blocks.1"],
        ),
    ],
    ids=["projector", "decoder", "batch norm", "whole block"],
)
def test_a_missing_tensor_is_named(
    run: Run, model: Path, change: Callable[[Tensors], object], words: list[str]
) -> None:
    damage(model, change)
    message = ask(run, model).refused()
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "name",
    [
        "model.surprise.weight",
        "model.language_model.layers.3.input_layernorm.weight",  # one layer more than the config's
        "model.language_model.layers.0.self_attn.q_norm.weight",
        TOWER + "stages.0.blocks.7.mlp.fc1.bias",
        TOWER + "stem.0.conv_kxk.5.bn.bias",
        TOWER + "head.fc.weight",
    ],
)
def test_an_extra_tensor_is_named(run: Run, model: Path, name: str) -> None:
    damage(model, lambda tensors: tensors.update({name: np.zeros(16, np.float16)}))
    message = ask(run, model).refused()
    assert name in message or name.removeprefix(TOWER).split(".conv")[0] in message, message


@pytest.mark.parametrize(
    "name",
    [
        PROJECTOR,
        "model.language_model.layers.1.mlp.down_proj.weight",
        TOWER + "stages.4.blocks.0.token_mixer.qkv.weight",
        TOWER + "stages.1.downsample.proj.1.conv_kxk.0.conv.weight",
    ],
)
def test_a_wrong_shape_is_refused_with_the_tensors_place(run: Run, model: Path, name: str) -> None:
    damage(model, transpose(name))
    message = ask(run, model).refused()
    module = {"downsample.proj": "stages.1.downsample", "token_mixer.qkv": "stages.4.blocks.0"}
    assert next((place for part, place in module.items() if part in name), name) in message


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.001, 0.5, 0.999])
def test_a_truncated_file_says_to_download_it_again(run: Run, model: Path, share: float) -> None:
    file = model / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))
    message = ask(run, model).refused()
    assert f"{file} is truncated or corrupt" in message and "download it again" in message


def test_a_truncated_shard_is_named(run: Run, tmp_path: Path) -> None:
    source = sources.read_source(DEMO).fused()
    folder = source_folders.write_apple(tmp_path / "sharded", source, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard} is truncated or corrupt" in ask(run, folder).refused()
    shard.unlink()
    message = ask(run, folder).refused()
    assert f"{shard} is missing" in message and "download it again" in message


@pytest.mark.parametrize("junk", [b"\xff" * 4096, b"PK\x03\x04" + b"\0" * 99, b"<!doctype html>"])
def test_a_file_that_is_no_safetensors_is_refused(run: Run, model: Path, junk: bytes) -> None:
    (model / "model.safetensors").write_bytes(junk)
    assert "truncated or corrupt" in ask(run, model).refused()


def test_a_dtype_nobody_trained_in_is_refused(run: Run, model: Path) -> None:
    header = {"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    assert "F8_E4M3" in ask(run, model).refused()


def test_tensors_of_another_model_are_refused_with_the_layouts_that_are_known(
    run: Run, model: Path
) -> None:
    save_file({"bert.pooler.weight": np.zeros(3, np.float32)}, model / "model.safetensors")
    message = ask(run, model).refused()
    assert "bert.pooler.weight" in message and "llava_qwen2, fast_vlm, mlx-vlm" in message


def test_a_folder_without_weights_is_refused(run: Run, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no *.safetensors" in ask(run, model).refused()
    (model / "adapter_model.safetensors").touch()
    assert "holds only an adapter" in ask(run, model).refused()


def test_an_export_for_apples_app_needs_the_tower_of_its_original(run: Run, tmp_path: Path) -> None:
    source = sources.read_source(DEMO)
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), 4, "F16")
    folder = source_folders.write_app(tmp_path / "app", source, packed, quantization)
    assert "holds no vision tower" in ask(run, folder).refused()
    edit_json(folder / "config.json", hidden_size=896)
    assert "apple/FastVLM-0.5B" in ask(run, folder).refused()
    edit_json(folder / "config.json", hidden_size=128)
    assert ask(run, folder, "--vision-from", "demo", "--max-tokens", 1).code == 0
    assert "nowhere" in ask(run, folder, "--vision-from", "./nowhere").refused()


def test_a_model_with_a_tower_takes_no_other(run: Run, model: Path) -> None:
    message = ask(run, model, "--vision-from", "demo").refused()
    assert message == f"{model} has its own tower: leave out --vision-from"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, path: t.pop(path + "biases"), "weight has no .biases beside it"),
        (
            lambda t, path: t.update({path + "weight": t[path + "weight"].view(np.int32)}),
            "weight is int32, not uint32",
        ),
        (
            lambda t, path: t.update({path + "biases": t[path + "biases"][:, :1].copy()}),
            "biases is (128, 1), 4 bits in groups of 64, affine ask for (128, 2)",
        ),
    ],
    ids=["no biases", "signed codes", "narrow biases"],
)
def test_a_damaged_packed_module_is_named(
    run: Run, tmp_path: Path, change: Callable[[Tensors, str], object], words: str
) -> None:
    source = sources.read_source(DEMO)
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), 4, "F16")
    folder = source_folders.write_mlx_vlm(
        tmp_path / "q4", source, tensors=packed, quantization=quantization
    )
    path = "language_model.model.layers.0.self_attn.o_proj."
    damage(folder, lambda tensors: change(tensors, path))
    for words_of_command in (("generate", "-p", "hi", "--model", folder), ("inspect", folder)):
        assert path + words in run(*words_of_command).refused()


class Hostile:
    """Pickles to a call of a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(
    run: Run, model: Path, tmp_path: Path
) -> None:
    import zipfile

    marker = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    hostile = pickle.dumps({"w": Hostile(f"touch {marker}")}, 2)
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", hostile)
        archive.writestr("archive/version", "3\n")
    for words in (("generate", "-p", "hi", "--model", model), ("inspect", model)):
        assert "system" in run(*words).refused()
        assert not marker.exists()
    (model / "pytorch_model.bin").write_bytes(hostile)  # not even a zip
    ask(run, model).refused()
    assert not marker.exists()


# ---- config, tokenizer, names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "llava"}, "'llava'"),
        ({"model_type": None}, "model type"),
        ({"text_config__model_type": "llama"}, "decoder 'llama' is not supported"),
        ({"text_config__num_hidden_layers": None}, "num_hidden_layers"),
        (
            {"text_config__num_hidden_layers": "three"},
            "num_hidden_layers must be a whole number above 0, not 'three'",
        ),
        ({"vision_config__architecture": "vit_base"}, "'vit_base'"),
        ({"vision_config__model_args__depth": 3}, "unknown vision_config.model_args keys depth"),
        ({"vision_config__model_args__layers": [1, 1]}, "needs 2 entries, one a stage"),
        ({"image_seq_length": 17}, "17 is no square"),
        ({"mm_tiles": 4}, "mm_tiles"),
        ({"text_config": None}, "config.json lacks 'vocab_size'"),
        ({"vision_config": [1]}, "vision_config must be an object, not [1]"),
        ({"text_config__rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"text_config__num_key_value_heads": 0}, "must be a whole number above 0, not 0"),
        ({"text_config__eos_token_id": "x"}, "eos_token_id must be a token's number"),
        ({"text_config__eos_token_id": [None]}, "eos_token_id must be a token's number"),
        ({"vision_config__out_indices": [3]}, "unknown vision_config keys out_indices"),
        ({"vision_config__model_args__embed_dims": [16, 24, 48, 96, 192]}, "24 is no multiple"),
        ({"text_config__vocab_size": True}, "must be a whole number above 0, not True"),
        ({"text_config__hidden_size": 10**30}, "hidden_size must be a whole number"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_key(
    run: Run, model: Path, values: dict[str, object], words: str
) -> None:
    edit_json(model / "config.json", **values)
    assert words in ask(run, model).refused()


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 4},
        {"bits": "four", "group_size": 64},
        {"bits": 16, "group_size": 64},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "group_size": 64, "mode": "gguf"},
        [4],
    ],
)
def test_a_quantization_that_is_not_understood_is_refused(
    run: Run, tmp_path: Path, quantization: object
) -> None:
    source = sources.read_source(DEMO)
    packed, _, true = quantizing.quantize(sources.mlx_tensors(source), 4, "F16")
    folder = source_folders.write_mlx_vlm(
        tmp_path / "q4", source, tensors=packed, quantization=true
    )
    edit_json(folder / "config.json", quantization=quantization)
    message = ask(run, folder).refused()
    assert "quantization" in message or "group_size" in message


def test_vicuna_llava_is_refused_by_its_decoder(run: Run, model: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (model / "config.json").write_text(json.dumps(config))
    message = ask(run, model).refused()
    assert "'llava' with a llama decoder is not supported" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"null", b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_unreadable_json_is_refused_by_file(
    run: Run, model: Path, file: str, content: bytes
) -> None:
    (model / file).write_bytes(content)
    assert file in ask(run, model).refused()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(run: Run, model: Path, file: str) -> None:
    (model / file).unlink()
    message = ask(run, model).refused()
    assert file.removesuffix(".json") in message or "vocab.json" in message


def test_a_tokenizer_of_another_model_is_refused(run: Run, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text("{}")
    assert "<|im_start|>" in ask(run, model).refused()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such", "nowhere", "~/nowhere", "", "a/b/c"])
@pytest.mark.parametrize("command", ["generate", "inspect", "preview"])
def test_a_model_that_is_not_there_is_refused(
    run: Run, red_circle: Path, tmp_path: Path, name: str, command: str
) -> None:
    words = {
        "generate": ("generate", red_circle, "--model", name),
        "inspect": ("inspect", name),
        "preview": ("preview", red_circle, "-o", tmp_path / "out.png", "--model", name),
    }
    message = run(*words[command]).refused()
    assert "does not exist" in message or "is no model" in message
    assert not (tmp_path / "out.png").exists()


def test_an_odd_name_cannot_command_the_terminal(run: Run) -> None:
    message = run("generate", "-p", "hi", "--model", "./\x1b[2J\n\u202ename").refused()
    assert "./?[2J ?name" in message


def test_a_file_given_as_model_is_refused(run: Run, model: Path) -> None:
    assert "give the folder it is in" in ask(run, model / "model.safetensors").refused()


def test_without_a_network_a_hub_name_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
        words = ("generate", "-p", "hi", "--model", "apple/FastVLM-0.5B")
        message = wait(spawn(*words, env=environment)).refused()
    assert "the network is off or" in message and "give a local folder or demo" in message


# ---- pictures


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of these dimensions by its header, whatever its data holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "folder.png").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("What is this? A text file named as a picture.\n")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "giant.png").write_bytes(png(60_000, 60_000, b"\0" * 1000))
    (folder / "long.png").write_bytes(png(100_000, 1, b"\0" * 300_001))
    (folder / "flat.png").write_bytes(png(0, 5, b""))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("corrupt.png", "corrupt.jpg"):
        noise.save(folder / name)
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.png", "no such file"),
        ("folder.png", "is a folder, not a picture"),
        ("empty.jpg", "is empty"),
        ("text.jpg", "is not a picture"),
        ("drawing.svg", "is not a picture"),
        ("script.eps", "is not a picture"),
        ("giant.png", "over the limit of 178 megapixels"),
        ("flat.png", ""),
        ("corrupt.png", "damaged"),
        ("corrupt.jpg", "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "preview"])
def test_a_picture_that_is_none_is_refused_by_name(
    run: Run, pictures: Path, tmp_path: Path, name: str, words: str, command: str
) -> None:
    output = () if command == "generate" else ("-o", tmp_path / "out.png")
    message = run(command, pictures / name, "--model", "demo", *output).refused()
    assert str(pictures / name) in message and words in message
    assert not (tmp_path / "out.png").exists()


def test_a_picture_too_long_is_refused(run: Run, pictures: Path) -> None:
    message = run("generate", pictures / "long.png", "--model", "demo").refused()
    assert "100000x1" in message and "too long" in message


def test_pictures_are_looked_at_before_the_model(run: Run, pictures: Path) -> None:
    """A wrong file name should not cost the download of a model."""
    words = ("--model", "./nowhere")
    assert "no such file" in run("generate", pictures / "missing.png", *words).refused()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_picture_without_permission_is_refused(run: Run, red_circle: Path) -> None:
    red_circle.chmod(0)
    try:
        assert "no permission" in run("generate", red_circle, "--model", "demo").refused()
    finally:
        red_circle.chmod(0o644)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data:image/png;base64,!!!", "base64"),
        ("data:image/png", "comma"),
        ("ftp://example.com/x.png", "no such file"),
        ("http://127.0.0.1:1/x.png", "http://127.0.0.1:1/x.png"),
        ("http://", "http://"),
        ("photo\0.png", "photo?.png"),
        ("two\nlines.png", "two?lines.png"),
        ("x" * 5000, "xxx"),
    ],
)
def test_a_source_that_gives_no_picture_is_refused(run: Run, source: str, words: str) -> None:
    message = run("generate", source, "-p", "hi", "--model", "demo").refused()
    assert words in message and len(message) < 400


def test_standard_input_without_a_picture_is_refused(run: Run) -> None:
    words = ("generate", "-", "--model", "demo")
    assert run(*words).refused() == "standard input is empty"
    assert "standard input is not a picture" in run(*words, stdin=b"text").refused()
    assert "standard input" in run("generate", "-", "-", "--model", "demo").refused()


def test_a_question_given_as_a_picture_is_recognised(run: Run) -> None:
    message = run("generate", "What is this?", "--model", "demo").refused()
    assert message.endswith("if it is the question, put -p before it")


# ---- prompts and options


def test_no_picture_and_no_prompt_is_refused(run: Run) -> None:
    assert "give a picture, or a question with -p" in run("generate").refused()


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt_is_refused(run: Run, red_circle: Path, prompt: str) -> None:
    assert run("generate", red_circle, "-p", prompt).refused() == "the prompt is empty"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"\n\n", "is empty"), (b"caf\xe9", "is not UTF-8 text (byte 3)")],
)
def test_a_prompt_file_without_a_prompt_is_refused(
    run: Run, tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert run("generate", "--prompt-file", file).refused() == f"{file} {words}"


def test_a_prompt_file_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    message = run("generate", "--prompt-file", missing).refused()
    assert message == f"{missing} cannot be read: No such file or directory"
    assert "Is a directory" in run("generate", "--prompt-file", tmp_path).refused()
    assert "cannot be read" in run("generate", "--prompt-file", "a\0b").refused()


def test_two_prompts_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("hi")
    message = run("generate", "-p", "hi", "--prompt-file", tmp_path / "p").refused()
    assert "--prompt and --prompt-file" in message


def test_bytes_on_the_command_line_that_are_no_text_are_refused() -> None:
    process = spawn("generate", "-p", os.fsdecode(b"caf\xe9"), "--model", "demo")
    assert "not valid UTF-8" in wait(process).refused()


def test_a_prompt_beyond_the_context_is_refused_not_cut(run: Run) -> None:
    message = run("generate", "-p", "word " * 2000, "--model", "demo").refused()
    assert "the model has 1024" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--resolution", "1000"], "1000 is no multiple of 64 up to 4096"),
        (["--resolution", "0"], "0 is no multiple"),
        (["--resolution", "65536"], "65536 is no multiple"),
        (["--resolution", "big"], "'big' is not a valid integer"),
        (["--image-mode", "stretch"], "'stretch' is not one of 'pad', 'crop'"),
        (["--background", "nocolour"], "'nocolour' is no colour: write it like white or #ffcc00"),
        (["--memory-limit", "lots"], "'lots' is no size: write it like 8GB or 500MB"),
        (["--memory-limit", "8"], "'8' is no size"),
        (["--memory-limit", "-1GB"], "'-1GB' is no size"),
        (["--memory-limit", "0GB"], "'0GB' is no size"),
        (["--temperature", "-1"], "temperature must be >= 0 and finite, not -1.0"),
        (["--temperature", "nan"], "temperature must be >= 0"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--top-k", "-1"], "top_k must be >= 0"),
        (["--min-p", "2"], "min_p must be in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty must be > 0"),
        (["--seed", "-1"], "seed must be"),
        (["--max-tokens", "0"], "'--max-tokens'"),
        (["--num-beams", "0"], "'--num-beams'"),
        (["--num-beams", "3", "--temperature", "1"], "beam search takes no temperature"),
        (["--num-beams", "3", "--json", "--logprobs"], "beam search gives no log-probabilities"),
        (["--num-beams", "999"], "999 beams are too many"),
        (["--logprobs"], "--logprobs needs --json"),
        (["--stop", ""], "--stop must not be empty"),
        (["--memory-limit", "1MB"], "demo needs 9.69 MB, the memory limit is 1 MB"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    run: Run, red_circle: Path, words: list[str], message: str
) -> None:
    assert message in run("generate", red_circle, "--model", "demo", *words).refused()


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(run: Run) -> None:
    assert "--device cpu" in ask(run, "demo", "--device", "gpu").refused()


def test_a_model_larger_than_what_is_free_is_refused_before_it_is_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.checkpoint import memory

    monkeypatch.setattr(memory, "free_bytes", lambda: 2_000_000)
    message = ask(run, "demo").refused()
    assert message.startswith("demo needs 9.69 MB, 2 MB is free: ")
