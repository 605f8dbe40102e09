"""One small FastVLM written as each kind of checkpoint folder that people hold.

Knows which files and which config fields each source really carries (FORMATS A1, A2, B1, B3).
Knows nothing of fastvlm_mlx. Tensors are renamed by `sources.py`, written by `fileformats.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fileformats import Stored, stored, write_safetensors, write_sharded, write_torch
from numpy.typing import NDArray
from sources import Source, apple_tensors, mlx_tensors


def apple_config(source: Source) -> dict[str, Any]:
    """config.json of Apple's checkpoints. A real one has no vision_config; a small tower needs it.

    `tie_word_embeddings` is what the trainer wrote, true, whatever the tensors say.
    """
    text = source.text
    return {
        "_name_or_path": "llava-fastvithd",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": text["eos_token_id"],
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text["hidden_size"],
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text["intermediate_size"],
        "max_position_embeddings": text["max_position_embeddings"],
        "max_window_layers": text["num_hidden_layers"],
        "mm_hidden_size": source.config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{source.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": text["num_attention_heads"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_key_value_heads": text["num_key_value_heads"],
        "rms_norm_eps": text["rms_norm_eps"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vision_config": vision_config(source),
        "vocab_size": text["vocab_size"],
    }


def vision_config(source: Source) -> dict[str, Any]:
    """The 17 fields, and model_type, of mlx-community's and mlx-swift-lm's vision_config."""
    args = source.config["vision_config"]["model_args"]
    return {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * 5,
        "embed_dims": list(args["embed_dims"]),
        "hidden_size": 1024,
        "image_size": source.image_size,
        "intermediate_size": 3072,
        "layer_scale_init_value": 1e-05,
        "layers": list(args["layers"]),
        "mlp_ratios": [4] * 5,
        "model_type": "llava_qwen2",
        "num_classes": 1000,
        "patch_size": 64,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": 768,
        "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
    }


# FORMATS A1: the whole of Apple's generation_config.json; mlx-vlm merges it into config.json.
_GENERATION = {"do_sample": True, "temperature": None, "top_p": None}


def mlx_config(source: Source) -> dict[str, Any]:
    """config.json after mlx-vlm's convert: torch_dtype and _name_or_path gone, keys sorted.

    mlx-community's has the full vision_config, convert's own none (bf16) or {} (quantized).
    """
    config = apple_config(source) | _GENERATION | {"generation_config": _GENERATION}
    for key in ("_name_or_path", "torch_dtype"):
        del config[key]
    config["tie_word_embeddings"] = "lm_head.weight" not in source.tensors
    return dict(sorted(config.items()))


def app_config(source: Source) -> dict[str, Any]:
    """config.json of Apple's export for its app: <image> has an id, no vision_config."""
    config = mlx_config(source)
    for key in ("vision_config", "generation_config", *_GENERATION):
        del config[key]
    return config | {"image_token_index": source.config["image_token_index"]}


def write_fast_vlm(folder: Path, source: Source, dtype: str = "F32") -> Path:
    """transformers' own folder, in the form the source has."""
    folder.mkdir(parents=True)
    for name in _TOKENIZER_JSON:
        shutil.copy(source.folder / name, folder)
    _write_json(folder / "config.json", source.config)
    write_safetensors(folder / "model.safetensors", _stored(source.tensors, dtype), "pt")
    return folder


def write_apple(
    folder: Path,
    source: Source,
    dtype: str = "F32",
    *,
    shards: int = 1,
    suffix: str = "safetensors",
) -> Path:
    """Apple's folder, in the form the source has. `suffix` "bin" writes pytorch_model*.bin."""
    folder.mkdir(parents=True)
    write_slow_tokenizer(folder, source)
    _write_json(folder / "config.json", apple_config(source))
    _write_json(folder / "generation_config.json", _GENERATION)
    tensors = _stored(apple_tensors(source), dtype)
    if shards > 1:
        write_sharded(folder, tensors, shards, suffix)
    elif suffix == "bin":
        write_torch(folder / "pytorch_model.bin", tensors)
    else:
        write_safetensors(folder / "model.safetensors", tensors, "pt")
    return folder


def write_mlx_vlm(
    folder: Path,
    source: Source,
    dtype: str = "BF16",
    *,
    tensors: Mapping[str, Stored] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> Path:
    """mlx-vlm's folder; `tensors` and `quantization` come from `quantizing.py`, or are float."""
    folder.mkdir(parents=True)
    for name in _TOKENIZER_JSON:
        shutil.copy(source.folder / name, folder)
    config = mlx_config(source)
    if quantization is not None:
        config |= {"quantization": quantization, "quantization_config": quantization}
    _write_json(folder / "config.json", config)
    _write_mlx_weights(folder, tensors or _stored(mlx_tensors(source), dtype))
    return folder


def write_app(
    folder: Path, source: Source, tensors: Mapping[str, Stored], quantization: Mapping[str, Any]
) -> Path:
    """Apple's export for its app: no tower, projector renamed. `tensors` are mlx-vlm's, float16."""
    folder.mkdir(parents=True)
    for name in _TOKENIZER_JSON:
        shutil.copy(source.folder / name, folder)
    write_slow_tokenizer(folder, source)
    uniform = {key: quantization[key] for key in ("group_size", "bits")}
    _write_json(folder / "config.json", app_config(source) | {"quantization": uniform})
    renamed = {
        key.replace("mm_projector.", "multi_modal_projector.linear_"): value
        for key, value in tensors.items()
        if not key.startswith("vision_tower.")
    }
    _write_mlx_weights(folder, renamed)
    return folder


_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json")


def write_slow_tokenizer(folder: Path, source: Source) -> None:
    """The slow Qwen2 tokenizer's files, without <image>: Apple's checkpoints have no other."""
    tokenizer = json.loads((source.folder / "tokenizer.json").read_text())
    added = {t["content"]: t["id"] for t in tokenizer["added_tokens"] if t["content"] != "<image>"}
    vocab = {k: v for k, v in tokenizer["model"]["vocab"].items() if k not in added}
    vocab.pop("<image>", None)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    _write_json(folder / "added_tokens.json", added)
    specials = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", specials)
    fields = ("lstrip", "normalized", "rstrip", "single_word")
    decoder = {
        str(number): {"content": token, **dict.fromkeys(fields, False), "special": True}
        for token, number in added.items()
    }
    config = {
        **specials,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 8192,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if not (folder / "tokenizer_config.json").exists():
        _write_json(folder / "tokenizer_config.json", config)


def _stored(tensors: Mapping[str, NDArray[Any]], dtype: str) -> dict[str, Stored]:
    return {key: stored(np.asarray(tensors[key]), dtype) for key in sorted(tensors)}


def _write_mlx_weights(folder: Path, tensors: Mapping[str, Stored]) -> None:
    write_safetensors(folder / "model.safetensors", tensors, "mlx")
    index = {
        "metadata": {"total_size": sum(len(value.data) for value in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors"),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
