"""Faults to plant in the verifier's folders, such as ports, converters and hands have made.

Knows how to change a folder of `header_folders.py`; `FAULTS` names each change. Knows nothing of
fastvlm_mlx.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import header_folders

from tests.cli.command import edit_json

VISION = "vision_tower.vision_model."
CLIP_HEAD = f"{VISION}head.proj"
MIXER = f"{VISION}network.0.0.token_mixer.reparam_conv.weight"
COUNTER = f"{VISION}network.0.0.convffn.conv.bn.num_batches_tracked"
VARIANCE = f"{VISION}network.0.0.convffn.conv.bn.running_var"
LAYER_SCALE = f"{VISION}network.7.0.layer_scale_1"
LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens"

Fault = Callable[[Path], None]


def change_tensors(
    folder: Path,
    *,
    add: dict[str, tuple[str, list[int]]] | None = None,
    drop: tuple[str, ...] = (),
) -> None:
    tensors = header_folders.read_weights(folder) | (add or {})
    for name in drop:
        del tensors[name]
    header_folders.write_weights(folder, tensors)


def add_tensor(name: str, dtype: str, *shape: int) -> Fault:
    return lambda folder: change_tensors(folder, add={name: (dtype, list(shape))})


def drop_tensor(name: str) -> Fault:
    return lambda folder: change_tensors(folder, drop=(name,))


def set_field(file: str, **values: object) -> Fault:
    return lambda folder: edit_json(folder / file, **values)


def set_quantization(**values: object) -> Fault:
    """Change `quantization` and its copy."""

    def fault(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key in {"quantization", "quantization_config"} & set(config):
            config[key] |= values
        header_folders.write_json(folder / "config.json", config)

    return fault


def widen_projector(folder: Path, *paths: str) -> None:
    """Store mm_projector.0 in 8 bits, and say so under these paths."""
    change_tensors(folder, add={"mm_projector.0.weight": ("U32", [128, 3072 // 4])})
    own = {"bits": 8, "group_size": 64, "mode": "affine"}
    set_quantization(**dict.fromkeys(paths, own))(folder)


def write_string_template(folder: Path) -> None:
    """Qwen2's own kind of template: it adds a message's content to text."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
        "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\n"
    )
    (folder / "chat_template.jinja").write_text(template)
    edit_json(folder / "tokenizer_config.json", chat_template=template)


def change_added(content: str, **values: object) -> Fault:
    """Change an added token of tokenizer.json, or drop it where nothing is given."""

    def fault(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        kept = []
        for token in tokenizer["added_tokens"]:
            if token["content"] == content:
                if not values:
                    continue
                token |= values
            kept.append(token)
        tokenizer["added_tokens"] = kept
        header_folders.write_json(folder / "tokenizer.json", tokenizer)

    return fault


def add_image_token_where_7b_has_another(folder: Path) -> None:
    """Qwen2.5's 22 added tokens: the id after <|im_end|>'s is <|object_ref_start|>."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    image = tokenizer["added_tokens"][-1]
    assert (image["content"], image["id"]) == ("<image>", 611)
    tokenizer["added_tokens"][-1:] = [
        image | {"content": "<|object_ref_start|>"},
        image | {"id": 612},
    ]
    header_folders.write_json(folder / "tokenizer.json", tokenizer)


def add_stray(name: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        header_folders.write_header(folder / name, {"weight": ("F16", [2])})

    return fault


def truncate_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def unsort(folder: Path) -> None:
    tensors = dict(reversed(header_folders.read_weights(folder).items()))
    header_folders.write_header(folder / "model.safetensors", tensors)


def drop_metadata(folder: Path) -> None:
    tensors = header_folders.read_weights(folder)
    header_folders.write_header(folder / "model.safetensors", tensors, {"format": "pt"})


def drop_from_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["mm_projector.0.bias"]
    header_folders.write_json(path, index)


def forget_quantization(folder: Path) -> None:
    edit_json(folder / "config.json", quantization=None, quantization_config=None)


def pack_the_tower(folder: Path) -> None:
    path = f"{VISION}network.7.0.token_mixer.qkv"
    packed = {"weight": ("U32", [2304, 96]), "scales": ("BF16", [2304, 12])}
    packed["biases"] = packed["scales"]
    change_tensors(folder, add={f"{path}.{leaf}": entry for leaf, entry in packed.items()})


def package(**values: Any) -> Fault:
    return lambda folder: header_folders.write_package(folder / "fastvithd.mlpackage", **values)


def drop_package_weights(folder: Path) -> None:
    weights = folder / "fastvithd.mlpackage" / "Data" / "com.apple.CoreML" / "weights"
    (weights / "weight.bin").unlink()


def cut_package_weights(folder: Path) -> None:
    """A download cut short: the header counts a blob that is not there."""
    weights = folder / "fastvithd.mlpackage" / "Data" / "com.apple.CoreML" / "weights"
    (weights / "weight.bin").write_bytes((1).to_bytes(4, "little") + bytes(60))


def add_image_token_beside(folder: Path) -> None:
    header_folders.write_json(folder / "added_tokens.json", {"<image>": 611})


def end_elsewhere(folder: Path) -> None:
    header_folders.write_json(folder / "generation_config.json", {"eos_token_id": 608})


def write_template(content: bytes) -> Fault:
    def fault(folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(content)

    return fault


def make_template_a_folder(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()


def name_a_list_for_root(folder: Path) -> None:
    edit_json(folder / "fastvithd.mlpackage" / "Manifest.json", rootModelIdentifier=[])


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
FOUR_BITS = {"bits": 4, "group_size": 64}
LINEAR_ROPE = {"type": "linear", "factor": 2.0}

FAULTS: dict[str, Fault] = {
    # tensors
    "no CLIP head": drop_tensor(CLIP_HEAD),
    "a BatchNorm counter": add_tensor(COUNTER, "I64"),
    "OIHW": add_tensor(MIXER, "BF16", 96, 1, 3, 3),
    "PyTorch's layer scale": add_tensor(LAYER_SCALE, "BF16", 768, 1, 1),
    "no variance": drop_tensor(VARIANCE),
    "a head beside a tied one": add_tensor(LM_HEAD, "BF16", 1024, 128),
    "a tower tensor": add_tensor(CLIP_HEAD, "F16", 3072, 768),
    "whole numbers": add_tensor("mm_projector.0.bias", "I32", 128),
    "unsorted": unsort,
    "PyTorch's metadata": drop_metadata,
    "a tensor the index lacks": drop_from_index,
    "half a file": truncate_weights,
    "an adapter below": add_stray("extra/adapter.safetensors"),
    # config
    "no num_classes": set_field(CONFIG, vision_config__num_classes=None),
    "no layers": set_field(CONFIG, vision_config__layers=None),
    "ratios without end": set_field(CONFIG, vision_config__mlp_ratios=[float("inf")] * 5),
    "encodings by name": set_field(CONFIG, vision_config__pos_embs_shapes=[{"a": 7}] * 5),
    "ratios of 4.0": set_field(CONFIG, vision_config__mlp_ratios=[4.0] * 5),
    "two ends": set_field(CONFIG, eos_token_id=[610, 608]),
    "another end's id": set_field(CONFIG, eos_token_id=608),
    "no padding side": set_field(CONFIG, tokenizer_padding_side=None),
    "an image id": set_field(CONFIG, image_token_index=611),
    "the sentinel": set_field(CONFIG, image_token_index=-200),
    "a text_config": set_field(CONFIG, text_config={"hidden_size": 128}),
    "model type fastvlm": set_field(CONFIG, model_type="fastvlm"),
    "linear rope": set_field(CONFIG, rope_scaling=LINEAR_ROPE),
    "fractions in mrope": set_field(CONFIG, rope_scaling={"mrope_section": [2.5, 1]}),
    "another end for answers": end_elsewhere,
    # quantization
    "bits of another width": set_quantization(bits=8),
    "no quantization": forget_quantization,
    "quantization_config differs": set_field(CONFIG, quantization_config={"bits": 8}),
    "mixed, mlx-vlm's path": lambda folder: widen_projector(folder, "mm_projector.0"),
    "mixed, Swift's path": lambda folder: widen_projector(folder, "mm_projector.layers.0"),
    "a setting of a norm": set_quantization(**{"language_model.model.norm": FOUR_BITS}),
    "a setting without mode": set_quantization(
        **{"mm_projector.0": FOUR_BITS, "mm_projector.layers.0": FOUR_BITS}
    ),
    "a remark": set_quantization(recipe="balanced"),
    "a packed tower": pack_the_tower,
    "a mode": set_quantization(mode="affine"),
    "a setting of one module": set_quantization(**{EMBEDDING: FOUR_BITS}),
    # processor, tokenizer, template
    "LLaVA's processor": set_field(PROCESSOR, processor_class="LlavaProcessor"),
    "FastVLM's processor": set_field(PROCESSOR, processor_class="FastVLMProcessor"),
    "no crop width": set_field(PROCESSOR, crop_size__width=None),
    "no shortest edge": set_field(PROCESSOR, size__shortest_edge=None),
    "a string template": write_string_template,
    "a template in Latin-1": write_template("{{ 'é' }}".encode("latin-1")),
    "a folder for a template": make_template_a_folder,
    "a template that nests without end": write_template(b"{{ " + b"(" * 5000),
    "a template that formats nothing": write_template(b"{{ '{a}'.format() }}"),
    "two templates": set_field(TOKENIZER, chat_template="{{ 1 }}"),
    "clean-up": set_field(TOKENIZER, clean_up_tokenization_spaces=True),
    "clean-up by default": set_field(TOKENIZER, clean_up_tokenization_spaces=None),
    "another end": set_field(TOKENIZER, eos_token="<|endoftext|>"),
    "<image> as a token": add_image_token_beside,
    "no <image>": change_added("<image>"),
    "<image> as text": change_added("<image>", special=False),
    "7B's tokens": add_image_token_where_7b_has_another,
    # Core ML
    "float16 features": package(dtype=header_folders.FLOAT16),
    "features by another name": package(name="features"),
    "features of a picture's form": package(shape=(1, 3072, 16, 16)),
    "a list for the root model": name_a_list_for_root,
    "no weight.bin": drop_package_weights,
    "weight.bin cut short": cut_package_weights,
}
