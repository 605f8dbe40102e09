"""Real-size folders for the verifier, written in a moment: headers as they are, weights as holes.

Names, shapes and dtypes are those that mlx-vlm's own convert left (`tests/parity`), the small
files are typed here from FORMATS' lists, the tokenizer is the demo model's. Knows nothing of
fastvlm_mlx.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
DEMO = TESTS.parent / "fastvlm_mlx" / "demo"
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "I64": 8, "U8": 1, "I32": 4}

Tensors = dict[str, tuple[str, list[int]]]

VISION_CONFIG = {
    "cls_ratio": 2.0,
    "down_patch_size": 7,
    "down_stride": 2,
    "downsamples": [True, True, True, True, True],
    "embed_dims": [96, 192, 384, 768, 1536],
    "hidden_size": 1024,
    "image_size": 1024,
    "intermediate_size": 3072,
    "layer_scale_init_value": 1e-05,
    "layers": [2, 12, 24, 4, 2],
    "mlp_ratios": [4, 4, 4, 4, 4],
    "model_type": "llava_qwen2",
    "num_classes": 1000,
    "patch_size": 64,
    "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
    "projection_dim": 768,
    "repmixer_kernel_size": 3,
    "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
}
PREPROCESSOR = {
    "crop_size": {"height": 1024, "width": 1024},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 1024},
}


def mlx_vlm_run(name: str) -> tuple[dict[str, Any], Tensors]:
    """The config.json and the tensors of one of mlx-vlm's own conversions: bf16, f32 or q4."""
    run = json.loads((TESTS / "parity" / "mlx_vlm_convert.json").read_text())["runs"][name]
    tensors = {key: (dtype, shape) for key, (dtype, shape, _crc) in run["tensors"].items()}
    return run["config"], tensors


def write_header(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whose values are a hole of the right length, in the given order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "mlx"})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_weights(folder: Path, tensors: Tensors) -> None:
    """Write model.safetensors, in the order of names, and its index."""
    write_header(folder / "model.safetensors", dict(sorted(tensors.items())))
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)


def read_weights(folder: Path) -> Tensors:
    """The tensors of model.safetensors, by its header."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a folder; the holes of model.safetensors stay holes."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors"))
    write_header(target / "model.safetensors", read_weights(source))
    return target


def write_native(folder: Path, run: str) -> Path:
    """What mlx-vlm's convert left, with the metadata that it leaves out: a native folder."""
    folder.mkdir(parents=True)
    config, tensors = mlx_vlm_run(run)
    config |= {"image_token_index": -200, "vision_config": VISION_CONFIG}
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    write_json(folder / "config.json", config)
    write_weights(folder, tensors)
    processor = {"processor_class": "FastVLMProcessor"}
    write_json(
        folder / "preprocessor_config.json",
        PREPROCESSOR | processor | {"image_processor_type": "FastVLMImageProcessor"},
    )
    write_json(folder / "processor_config.json", processor)
    tokenizer, settings = _tokenizer()
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    del settings["added_tokens_decoder"]["611"]
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(settings["chat_template"])
    return folder


def write_app(folder: Path) -> Path:
    """The folder of Apple's app, 4 bits: mlx-vlm's conversion without the tower, in float16."""
    folder.mkdir(parents=True)
    config, tensors = mlx_vlm_run("q4")
    for key in ("vision_config", "quantization_config"):
        config.pop(key, None)
    config |= {"image_token_index": 611, "quantization": {"group_size": 64, "bits": 4}}
    write_json(folder / "config.json", config)
    renamed = {
        name.replace("mm_projector.", "multi_modal_projector.linear_"): (
            "F16" if dtype == "BF16" else dtype,
            shape,
        )
        for name, (dtype, shape) in tensors.items()
        if not name.startswith("vision_tower.")
    }
    write_weights(folder, renamed)
    processor = {"processor_class": "LlavaProcessor", "image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | processor)
    tokenizer, settings = _tokenizer()
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    write_package(folder / "fastvithd.mlpackage")
    return folder


def _tokenizer() -> tuple[dict[str, Any], dict[str, Any]]:
    """The demo's tokenizer.json and tokenizer_config.json: <image> is 611, <|im_end|> 610."""
    files = ("tokenizer.json", "tokenizer_config.json")
    tokenizer, settings = (json.loads((DEMO / name).read_text()) for name in files)
    return tokenizer, settings


FLOAT32, FLOAT16 = 65568, 65552


def write_package(
    folder: Path,
    *,
    name: str = "image_features",
    dtype: int = FLOAT32,
    shape: tuple[int, ...] = (1, 256, 3072),
) -> None:
    """A Core ML package with no network inside: manifest, weights and the interface's protobuf."""
    data = folder / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True, exist_ok=True)
    (data / "weights" / "weight.bin").write_bytes(bytes(64))
    takes = _feature("images", FLOAT32, (1, 3, 1024, 1024))
    gives = _feature(name, dtype, shape)
    description = _field(1, takes) + _field(10, gives)
    (data / "model.mlmodel").write_bytes(b"\x08\x07" + _field(2, description))
    entry = {"author": "com.apple.CoreML", "path": "com.apple.CoreML/model.mlmodel"}
    manifest = {"itemInfoEntries": {"A": entry}, "rootModelIdentifier": "A"}
    write_json(folder / "Manifest.json", manifest)


def _feature(name: str, dtype: int, shape: tuple[int, ...]) -> bytes:
    array = _field(1, b"".join(map(_varint, shape))) + b"\x10" + _varint(dtype)
    return _field(1, name.encode()) + _field(3, _field(5, array))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
