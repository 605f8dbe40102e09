"""config.json of an artifact folder, written from ModelConfig.

Knows which fields the native folder's readers (FORMATS.md, D) and Apple's app (B3) ask for, and in
whose spelling. Nothing is copied from the source key by key, so a native folder made from a native
folder has the same bytes. Knows no other file.

Sources: mlx-vlm `models/fastvlm/config.py`; mlx-swift-lm `FastVLM.swift` and
`BaseConfiguration.swift`; apple/ml-fastvlm `app/FastVLM/FastVLM.swift`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastvlm_mlx.config import ModelConfig, QuantConfig, VisionConfig
from fastvlm_mlx.convert.keys import native_key
from fastvlm_mlx.errors import ConfigError

Json = Mapping[str, Any]

# mlx-vlm's processor writes this id where a picture goes; any other would lose the picture.
_NO_IMAGE_TOKEN = -200
# transformers' fast_vlm has base Qwen2's 131072, but FastVLM was trained on Qwen2-Instruct's.
_FAST_VLM_POSITIONS = 32768
# Fields that mlx-swift-lm demands and no reader makes use of; Apple's values.
_CLIP_WIDTH, _CLIP_DIM, _CLASSES = 1024, 768, 1000


def native_config(
    config: ModelConfig,
    raw: Json,
    *,
    dtype: str,
    im_end_id: int,
    float_modules: Iterable[str],
) -> dict[str, Any]:
    """Return config.json of the native folder, read back as `config` with `im_end_id` to end on.

    `float_modules` are the canonical paths of modules that stay float in a quantized model. `raw`
    gives only what ModelConfig leaves out. Raises ConfigError for tower sizes that the
    format has no field for.
    """
    values = _common(config, raw, dtype=dtype, im_end_id=im_end_id) | {
        "image_token_index": _NO_IMAGE_TOKEN,
        "vision_config": _vision_config(config.vision),
    }
    if config.quant is not None:
        linear = config.projector.kind == "linear"
        quantization = _quantization(config.quant, float_modules, linear_projector=linear)
        values |= {"quantization": quantization, "quantization_config": quantization}
    return values


def app_config(
    config: ModelConfig, raw: Json, *, dtype: str, im_end_id: int, image_id: int
) -> dict[str, Any]:
    """Return config.json of the folder for Apple's app. No `rope_scaling`: the app dies of most.

    Raises ConfigError for a quantization that is not affine or not the same everywhere.
    """
    values = _common(config, raw, dtype=dtype, im_end_id=im_end_id)
    values["image_token_index"] = image_id
    quant = config.quant
    if quant is not None:
        if quant.mode != "affine" or quant.overrides:
            raise ConfigError("Apple's app reads one affine setting for all modules: use `uniform`")
        values["quantization"] = {"bits": quant.bits, "group_size": quant.group_size}
    return values


def _common(config: ModelConfig, raw: Json, *, dtype: str, im_end_id: int) -> dict[str, Any]:
    """The root of both config.json: Qwen2's fields, LLaVA's, and the tokenizer's."""
    decoder, text = config.decoder, raw.get("text_config") or raw
    positions = text.get("max_position_embeddings") or decoder.max_positions
    if raw.get("model_type") == "fast_vlm":
        positions = max(min(positions, _FAST_VLM_POSITIONS), decoder.max_positions)
    bos, side = text.get("bos_token_id"), raw.get("tokenizer_padding_side")
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "bos_token_id": bos if type(bos) is int else None,
        "eos_token_id": im_end_id,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "image_aspect_ratio": config.image_mode,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": positions,
        "mm_hidden_size": config.vision.out_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": config.projector.kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_tower": f"mobileclip_l_{config.vision.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": float(decoder.rms_norm_eps),
        "rope_theta": float(decoder.rope_theta),
        "tie_word_embeddings": decoder.tied,
        "tokenizer_model_max_length": decoder.max_positions,
        "tokenizer_padding_side": side if side in ("left", "right") else "right",
        "torch_dtype": dtype,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vocab_size": decoder.vocab_size,
    }


def _vision_config(vision: VisionConfig) -> dict[str, Any]:
    """The 17 fields that mlx-swift-lm demands, and model_type. Its `mlp_ratios` are integers."""
    known = VisionConfig()
    for field in ("head_dim", "se_ratio"):
        if getattr(vision, field) != getattr(known, field):
            raise ConfigError(f"a tower with {field} {getattr(vision, field)} cannot be written")
    return {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * len(vision.layers),
        "embed_dims": list(vision.embed_dims),
        "hidden_size": _CLIP_WIDTH,
        "image_size": vision.image_size,
        "intermediate_size": vision.out_dim,
        "layer_scale_init_value": 1e-05,
        "layers": list(vision.layers),
        "mlp_ratios": [int(r) if float(r).is_integer() else r for r in vision.mlp_ratios],
        "model_type": "llava_qwen2",
        "num_classes": _CLASSES,
        "patch_size": vision.stride,
        "pos_embs_shapes": [[7, 7] if has else None for has in vision.pos_embs],
        "projection_dim": _CLIP_DIM,
        "repmixer_kernel_size": 3,
        "token_mixers": list(vision.token_mixers),
    }


def _quantization(
    quant: QuantConfig, float_modules: Iterable[str], *, linear_projector: bool
) -> dict[str, Any]:
    """MLX's `quantization`. What differs is named by mlx-vlm's path and by mlx-swift-lm's alias."""
    named: dict[str, Any] = {
        path: {"bits": bits, "group_size": group_size, "mode": mode}
        for path, (bits, group_size, mode) in quant.overrides.items()
    }
    named |= dict.fromkeys(float_modules, False)
    spelled = {
        spelling: setting
        for path, setting in named.items()
        for spelling in _spellings(path, linear_projector=linear_projector)
    }
    return {
        "bits": quant.bits,
        "group_size": quant.group_size,
        "mode": quant.mode,
        **dict(sorted(spelled.items())),
    }


def _spellings(path: str, *, linear_projector: bool) -> tuple[str, ...]:
    """A canonical module path in mlx-vlm's spelling, and in Swift's where that is another."""
    key = native_key(f"{path}.weight", linear_projector=linear_projector)
    ours = key.removesuffix(".weight")
    swift = ours.replace("mm_projector.", "mm_projector.layers.")
    return (ours,) if swift == ours else (ours, swift)
