"""One FastVLM's tensors by the names, and in the axis order, of each source of checkpoints.

Knows, typed from the other projects' code, what each source calls its tensors. Knows nothing of
fastvlm_mlx: a mistake in its tables must not be repeated here. `Source` holds transformers'
fast_vlm names, fused or in training form; the tower is fused by `fusing.py` where a layout demands
it. `source_folders.py` writes the folders. `test_sources.py` compares with inventories made by
timm, by Apple's code and by mlx-vlm's own convert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import frozen
import fusing
import numpy as np
from numpy.typing import NDArray

TIMM = "model.vision_tower.timm_model."
APPLE = "model.vision_tower.vision_tower.model."

# timm's place -> Apple's place in `network`, where downsamplings and encodings are entries too.
_PLACES = (
    ("stem.", "patch_embed."),
    ("stages.0.blocks.", "network.0."),
    ("stages.1.downsample.", "network.1."),
    ("stages.1.blocks.", "network.2."),
    ("stages.2.downsample.", "network.3."),
    ("stages.2.blocks.", "network.4."),
    ("stages.3.downsample.", "network.5."),
    ("stages.3.pos_emb.pos_enc.", "network.6.pe."),
    ("stages.3.pos_emb.", "network.6."),
    ("stages.3.blocks.", "network.7."),
    ("stages.4.downsample.", "network.8."),
    ("stages.4.pos_emb.pos_enc.", "network.9.pe."),
    ("stages.4.pos_emb.", "network.9."),
    ("stages.4.blocks.", "network.10."),
    ("final_conv.", "conv_exp."),
)
# timm's word -> Apple's, anywhere behind the place.
_WORDS = (
    (".conv_kxk.", ".rbr_conv."),
    (".conv_scale.", ".rbr_scale."),
    (".identity.", ".rbr_skip."),
    (".large_conv.", ".lkb_origin."),
    (".proj.0.reparam_conv.", ".proj.0.lkb_reparam."),
    (".mlp.", ".convffn."),
    (".layer_scale.gamma", ".layer_scale"),
    (".layer_scale_1.gamma", ".layer_scale_1"),
    (".layer_scale_2.gamma", ".layer_scale_2"),
    (".se.fc1.", ".se.reduce."),
    (".se.fc2.", ".se.expand."),
)


@dataclass(frozen=True)
class Source:
    """A FastVLM by transformers' names, its fast_vlm config.json, and a folder with a tokenizer."""

    tensors: Mapping[str, NDArray[Any]]
    config: Mapping[str, Any]
    folder: Path

    @property
    def text(self) -> Mapping[str, Any]:
        """The decoder's part of the config."""
        return self.config["text_config"]

    @property
    def image_size(self) -> int:
        """Pixels a side of the square input."""
        return 64 * math.isqrt(self.config["image_seq_length"])

    def tower(self) -> dict[str, NDArray[Any]]:
        """The tower's tensors by timm's names."""
        return {k[len(TIMM) :]: v for k, v in self.tensors.items() if k.startswith(TIMM)}

    def beside_tower(self) -> dict[str, NDArray[Any]]:
        """Projector and decoder."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(TIMM)}

    def fused(self) -> Source:
        """The same model with a fused tower, float32, and a config that says so."""
        tower = {
            TIMM + key: np.asarray(v, np.float32)
            for key, v in fusing.fuse_tower(self.tower()).items()
        }
        vision = dict(self.config["vision_config"])
        vision["model_args"] = {**vision["model_args"], "inference_mode": True}
        return replace(
            self,
            tensors=self.beside_tower() | _with_counts(tower),
            config={**self.config, "vision_config": vision},
        )

    def untied(self) -> Source:
        """Another model: the same but for an output head of its own. The config still says tied."""
        embed = self.tensors["model.language_model.embed_tokens.weight"]
        whole = np.asarray(embed, np.float32)
        head = ((whole[::-1] + whole) / 2).astype(np.float16).astype(embed.dtype)
        return replace(self, tensors={**self.tensors, "lm_head.weight": head})


def _with_counts(tower: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Give BatchNorm's counters their integer type back."""
    return {
        key: np.asarray(value, np.int64) if key.endswith("num_batches_tracked") else value
        for key, value in tower.items()
    }


def read_source(folder: Path) -> Source:
    """Read a transformers fast_vlm folder with one model.safetensors of F16 or F32."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
    tensors = {}
    for key, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(raw[start:end], kinds[entry["dtype"]])
        tensors[key] = values.reshape(entry["shape"])
    return Source(tensors, json.loads((folder / "config.json").read_text()), folder)


def frozen_source(shapes: Mapping[str, list[int]], folder: Path) -> Source:
    """Return frozen weights for the real-size tower of these shapes and a tiny two-layer decoder.

    The tower is fused or in training form, as its keys say. The tokenizer is that of `folder`, a
    fast_vlm checkpoint; all values are bfloat16's.
    """
    text = json.loads((folder / "config.json").read_text())["text_config"] | {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 1024,
    }
    width, inner, rows = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    out = shapes["final_conv.se.fc1.weight"][1]
    decoder: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (rows, width)}
    for layer in range(text["num_hidden_layers"]):
        for leaf, sizes in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (width // 2, width)),
            ("self_attn.v_proj", (width // 2, width)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
        ):
            decoder[f"layers.{layer}.{leaf}.weight"] = sizes
            if "attn" in leaf:
                decoder[f"layers.{layer}.{leaf}.bias"] = sizes[:1]
        decoder[f"layers.{layer}.self_attn.o_proj.weight"] = (width, width)
        decoder[f"layers.{layer}.input_layernorm.weight"] = (width,)
        decoder[f"layers.{layer}.post_attention_layernorm.weight"] = (width,)
    decoder["norm.weight"] = (width,)
    every = {TIMM + key: tuple(shape) for key, shape in shapes.items()}
    every |= {f"model.language_model.{key}": shape for key, shape in decoder.items()}
    for name, inputs in (("linear_1", out), ("linear_2", width)):
        every[f"model.multi_modal_projector.{name}.weight"] = (width, inputs)
        every[f"model.multi_modal_projector.{name}.bias"] = (width,)
    tensors = _with_counts({key: frozen_value(key, shape) for key, shape in every.items()})
    args = {"embed_dims": [96, 192, 384, 768, 1536], "layers": [2, 12, 24, 4, 2]}
    config = {
        "image_seq_length": 256,
        "image_token_index": rows - 1,
        "model_type": "fast_vlm",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": {
            "architecture": "fastvit_mci3",
            "hidden_size": out,
            "model_args": {**args, "inference_mode": not fusing.is_training_form(shapes)},
            "model_type": "timm_wrapper",
        },
    }
    return Source(tensors, config, folder)


def frozen_value(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the frozen tensor of a fast_vlm key; the tower's are those of `tower.npz`."""
    return frozen.tensor(key.removeprefix(TIMM), tuple(shape), round_to="bfloat16")


def apple_key(timm_key: str) -> str:
    """Translate one of timm's tower keys into Apple's, without prefix. KeyError if none fits."""
    for place, apple in _PLACES:
        if timm_key.startswith(place):
            key = apple + timm_key[len(place) :]
            for word, theirs in _WORDS:
                key = key.replace(word, theirs)
            return key
    raise KeyError(timm_key)


def apple_tensors(source: Source) -> dict[str, NDArray[Any]]:
    """Everything by the names of Apple's checkpoints; lm_head and head.proj physically there."""
    tower = {APPLE + apple_key(key): value for key, value in source.tower().items()}
    shape = (2 * source.config["vision_config"]["model_args"]["embed_dims"][-1], 768)
    tower[APPLE + "head.proj"] = frozen_value("head.proj.weight", shape)
    rest = {}
    for key, value in source.beside_tower().items():
        key = key.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
        key = key.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
        rest[key.replace("model.language_model.", "model.")] = value
    rest.setdefault("lm_head.weight", rest["model.embed_tokens.weight"])
    return tower | rest


def mlx_key(key: str) -> str | None:
    """Translate a key of Apple's checkpoint into mlx-vlm's; None for one it drops."""
    if key.endswith("num_batches_tracked"):
        return None
    if key.startswith(APPLE):
        key = "vision_tower.vision_model." + key[len(APPLE) :]
        return key.replace(".patch_embed.", ".patch_embed.blocks.")
    if key.startswith("model.mm_projector."):
        return key[len("model.") :]
    return "language_model." + key


def mlx_array(key: str, values: NDArray[Any]) -> NDArray[Any]:
    """Lay a tensor out as mlx-vlm does: convolutions OHWI, layer scales [1, 1, C]."""
    if "layer_scale" in key:
        return values.transpose(1, 2, 0)
    return values.transpose(0, 2, 3, 1) if values.ndim == 4 else values


def mlx_tensors(source: Source) -> dict[str, NDArray[Any]]:
    """Everything as mlx-vlm's convert leaves it before quantization, lm_head only if untied."""
    source = source.fused()
    tied = "lm_head.weight" not in source.tensors
    renamed = {mlx_key(key): value for key, value in apple_tensors(source).items()}
    return {
        key: mlx_array(key, value)
        for key, value in renamed.items()
        if key is not None and not (tied and key == "language_model.lm_head.weight")
    }
