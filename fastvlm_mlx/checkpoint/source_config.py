"""A source's config.json in its own spelling → our ModelConfig. Knows each source's keys.

A listed set of Hugging Face root keys says nothing about inference and is passed over; other
unknown root keys are logged as a warning; unknown `mm_*`, `vision_config` and `model_args` keys
raise, because they may change the network. Knows no tensors but whether a head is among them.

Sources: apple/ml-fastvlm `llava_qwen.py`, `mobileclip_encoder.py`; transformers
`configuration_fast_vlm.py`; mlx-vlm `models/fastvlm/config.py`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fastvlm_mlx.config import (
    DecoderConfig,
    ImageMode,
    ModelConfig,
    ProjectorConfig,
    QuantConfig,
    VisionConfig,
)
from fastvlm_mlx.errors import ConfigError

Json = Mapping[str, Any]

log = logging.getLogger("fastvlm_mlx")

# LLaVA cuts prompts here (tokenizer_model_max_length of every released FastVLM).
DEFAULT_MAX_POSITIONS = 8192

# transformers pads fast_vlm vocabularies to a multiple of 64 with random rows after Qwen2's own.
FAST_VLM_VOCABULARY = {152000: 151936, 152128: 152064}

_SILENT_ROOT_KEYS = frozenset(
    """_name_or_path architectures attention_dropout auto_map bos_token_id do_sample dtype
    freeze_mm_mlp_adapter generation_config image_grid_pinpoints image_seq_length image_token_id
    image_token_index initializer_range layer_types max_window_layers mm_projector_lr model_type
    multimodal_projector_bias pad_token_id projector_hidden_act quantization quantization_config
    repetition_penalty rope_parameters sliding_window temperature text_config
    tokenizer_padding_side top_k top_p torch_dtype transformers_version tune_mm_mlp_adapter
    unfreeze_mm_vision_tower use_cache use_mm_proj use_sliding_window vision_config
    vision_feature_layer vision_feature_select_strategy""".split()
)
_READ_ROOT_KEYS = frozenset(
    """eos_token_id hidden_act hidden_size image_aspect_ratio intermediate_size
    max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
    rope_scaling rope_theta tie_word_embeddings tokenizer_model_max_length vocab_size
    mm_vision_tower mm_hidden_size mm_projector_type""".split()
)
# LLaVA's training switches, and choices that its MobileCLIP tower ignores.
_SILENT_MM_KEYS = frozenset(
    """mm_projector_lr mm_vision_select_feature mm_vision_select_layer mm_vision_tower_lr
    mm_use_im_start_end mm_use_im_patch_token""".split()
)
_VISION_KEYS = frozenset(
    """cls_ratio down_patch_size down_stride downsamples embed_dims hidden_size image_size
    intermediate_size layer_scale_init_value layers mlp_ratios model_type num_classes patch_size
    pos_embs_shapes projection_dim repmixer_kernel_size token_mixers""".split()
)
_MODEL_ARGS = frozenset("inference_mode layers embed_dims mlp_ratios token_mixers".split())


def read_config(
    raw: Json,
    layout: str,
    *,
    has_head: bool,
    rename_module: Callable[[str], str | None],
    vision: VisionConfig | None = None,
) -> ModelConfig:
    """Return the ModelConfig that a config.json of this layout describes.

    `has_head` says whether an lm_head is stored (tied or not is decided from tensors later);
    `rename_module` gives a source module path's canonical one, for quantization overrides;
    `vision` replaces the tower's sizes where the tower comes from another folder.
    Raises ConfigError naming the key that is unknown, missing or not supported.
    """
    try:
        if layout == "fast_vlm":
            return _fast_vlm(raw, has_head)
        return _llava(raw, has_head, rename_module, vision)
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json: {error}") from error


def require_fastvlm(raw: Json) -> None:
    """Raise ConfigError unless `model_type` is one of FastVLM's, saying what it is instead."""
    model_type = raw.get("model_type")
    if model_type in ("llava_qwen2", "fast_vlm", "fastvlm"):
        return
    text = raw.get("text_config")
    decoder = text.get("model_type") if isinstance(text, dict) else None
    what = f"{model_type!r}" + (f" with a {decoder} decoder" if decoder else "")
    raise ConfigError(
        f"model type {what} is not supported: FastVLM with a Qwen2 decoder is "
        "(llava_qwen2, fast_vlm, fastvlm)"
    )


def read_picture_form(raw: Json) -> tuple[int, ImageMode]:
    """Return the side in pixels of a model's square pictures and how they are fitted into it.

    Looks at nothing else of a config.json. Raises ConfigError.
    """
    require_fastvlm(raw)
    try:
        if raw["model_type"] == "fast_vlm":
            return _fast_vlm_image_size(raw), "pad"
        return _llava_image_size(raw), _image_mode(raw)
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json: {error}") from error


def _llava(
    raw: Json,
    has_head: bool,
    rename_module: Callable[[str], str | None],
    vision: VisionConfig | None,
) -> ModelConfig:
    """Apple's keys, also written by mlx-vlm: Qwen2's and LLaVA's at the root."""
    _check_root(raw)
    text = _object(raw, "text_config") or raw
    vision = vision or _llava_vision(raw)
    decoder = _decoder(text, raw, has_head, vocab_size=text["vocab_size"])
    kind = raw.get("mm_projector_type", "linear")
    if kind not in ("mlp2x_gelu", "linear"):
        raise ConfigError(f"mm_projector_type {kind!r} is not supported (mlp2x_gelu, linear)")
    return ModelConfig(
        vision=vision,
        projector=ProjectorConfig(
            in_dim=raw.get("mm_hidden_size", vision.out_dim), out_dim=decoder.hidden_size, kind=kind
        ),
        decoder=decoder,
        quant=_quant(raw, rename_module),
        eos_ids=_eos_ids(text, raw),
        image_mode=_image_mode(raw),
    )


def _fast_vlm(raw: Json, has_head: bool) -> ModelConfig:
    """transformers' keys: `vision_config` for timm, `text_config` for Qwen2."""
    _check_root(raw)
    source, text = _object(raw, "vision_config"), _object(raw, "text_config")
    if text.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(f"decoder {text['model_type']!r} is not supported: FastVLM's is qwen2")
    architecture = str(source.get("architecture", "")).split(".")[0]
    if architecture != "fastvit_mci3":
        raise ConfigError(
            f"vision tower {architecture!r} is not supported: FastVLM's is fastvit_mci3"
        )
    if raw.get("projector_hidden_act", "gelu") != "gelu":
        raise ConfigError("projector_hidden_act other than gelu is not supported")
    args = _object(source, "model_args")
    _refuse_unknown("vision_config.model_args", args, _MODEL_ARGS)
    vision = _vision(args, image_size=_fast_vlm_image_size(raw))
    rows: int = text["vocab_size"]
    decoder = _decoder(text, raw, has_head, vocab_size=FAST_VLM_VOCABULARY.get(rows, rows))
    return ModelConfig(
        vision=vision,
        projector=ProjectorConfig(in_dim=vision.out_dim, out_dim=decoder.hidden_size),
        decoder=decoder,
        eos_ids=_eos_ids(text, raw),
    )


def _fast_vlm_image_size(raw: Json) -> int:
    side = math.isqrt(raw["image_seq_length"])
    if side * side != raw["image_seq_length"]:
        raise ConfigError(f"image_seq_length {raw['image_seq_length']} is no square")
    return side * VisionConfig().stride


def _llava_image_size(raw: Json) -> int:
    tower = str(raw.get("mm_vision_tower", ""))
    match = re.fullmatch(r"(?:.*/)?mobileclip_l_(\d+)", tower)
    if not match:
        raise ConfigError(
            f"mm_vision_tower {tower!r} is not supported: FastVLM's is mobileclip_l_*"
        )
    return int(match[1])


def _llava_vision(raw: Json) -> VisionConfig:
    """Tower sizes: mobileclip_l's, unless a `vision_config` (mlx-vlm) spells them out."""
    image_size = _llava_image_size(raw)
    spelled = _object(raw, "vision_config")
    _refuse_unknown("vision_config", spelled, _VISION_KEYS)
    fixed = {"down_patch_size": 7, "down_stride": 2, "repmixer_kernel_size": 3}
    for key, value in fixed.items():
        if spelled.get(key, value) != value:
            raise ConfigError(f"vision_config.{key} {spelled[key]} is not supported (only {value})")
    if spelled.get("image_size", image_size) != image_size:
        raise ConfigError(
            f"vision_config.image_size {spelled['image_size']} contradicts "
            f"mm_vision_tower {raw['mm_vision_tower']!r}"
        )
    return _vision(spelled, image_size=image_size)


def _vision(values: Json, *, image_size: int) -> VisionConfig:
    """Take what is spelled out of `values`, and mobileclip_l's sizes for the rest."""
    given: dict[str, Any] = {
        key: tuple(values[key])
        for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers")
        if values.get(key) is not None
    }
    if values.get("pos_embs_shapes") is not None:
        given["pos_embs"] = tuple(shape is not None for shape in values["pos_embs_shapes"])
    return VisionConfig(image_size=image_size, **given)


def _decoder(text: Json, raw: Json, has_head: bool, *, vocab_size: int) -> DecoderConfig:
    rope = _object(text, "rope_parameters")
    if text.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError("rope_scaling is not supported: no FastVLM decoder has it")
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {text['hidden_act']!r} is not supported: Qwen2's is silu")
    if text.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is not supported: no FastVLM decoder has it")
    limit = raw.get("tokenizer_model_max_length", DEFAULT_MAX_POSITIONS)
    return DecoderConfig(
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        intermediate_size=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        vocab_size=vocab_size,
        tied=not has_head,
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(text.get("rope_theta") or rope.get("rope_theta") or 1e6),
        max_positions=min(limit, text.get("max_position_embeddings", limit)),
    )


def _quant(raw: Json, rename_module: Callable[[str], str | None]) -> QuantConfig | None:
    """MLX's `quantization`: defaults at its root, a module path's own settings beside them."""
    values = _object(raw, "quantization") or _object(raw, "quantization_config")
    if not values:
        return None
    mode: str = values.get("mode", "affine")
    overrides = {}
    for path, own in values.items():
        if not isinstance(own, dict):
            continue
        canonical = rename_module(path)
        if canonical is not None:
            overrides[canonical] = (own["bits"], own["group_size"], own.get("mode", mode))
    return QuantConfig(
        bits=values["bits"], group_size=values["group_size"], mode=mode, overrides=overrides
    )


def _eos_ids(*sources: Json) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))


def _image_mode(raw: Json) -> ImageMode:
    """`pad` as released; LLaVA's processor crops for other values; anyres is not supported."""
    ratio = raw.get("image_aspect_ratio", "pad")
    if isinstance(ratio, str) and "anyres" in ratio:
        raise ConfigError(f"image_aspect_ratio {ratio!r} is not supported (pad)")
    return "pad" if ratio == "pad" else "crop"


def _check_root(raw: Json) -> None:
    if raw.get("mm_patch_merge_type", "flat") != "flat":
        raise ConfigError(
            f"mm_patch_merge_type {raw['mm_patch_merge_type']!r} is not supported (flat)"
        )
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if raw.get(key):
            raise ConfigError(f"{key} is not supported: no released FastVLM sets it")
    unknown = set(raw) - _SILENT_ROOT_KEYS - _READ_ROOT_KEYS - _SILENT_MM_KEYS
    unknown -= {"mm_patch_merge_type"}
    multimodal = sorted(key for key in unknown if key.startswith("mm_"))
    if multimodal:
        raise ConfigError(
            f"config.json: {', '.join(multimodal)} is not known, and may change the model"
        )
    if unknown:
        log.warning("config.json: passing over unknown keys %s", ", ".join(sorted(unknown)))


def _object(values: Json, key: str) -> Json:
    """Return the object at a key, an empty one if it is absent or null."""
    found = values.get(key)
    if not isinstance(found, Mapping | None):
        raise ConfigError(f"config.json: {key} must be an object, not {found!r}")
    return found or {}


def _refuse_unknown(where: str, values: Json, known: frozenset[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"config.json: unknown {where} keys {', '.join(unknown)}")
