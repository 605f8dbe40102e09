"""Which keys each source's config.json may hold, and how one of them is read with its type checked.

A listed set of Hugging Face root keys says nothing about inference and is passed over; other
unknown root keys are logged as a warning; unknown `mm_*`, `vision_config` and `model_args` keys
raise, because they may change the network. Knows no sizes: `source_config.py` makes them.

Sources: apple/ml-fastvlm `llava_qwen.py`; transformers `configuration_fast_vlm.py`,
`configuration_timm_wrapper.py`, `configuration_utils.py`; mlx-vlm `models/fastvlm/config.py`.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from fastvlm_mlx.config import KINDS, is_kind
from fastvlm_mlx.errors import ConfigError

Json = Mapping[str, Any]
Value = TypeVar("Value")

log = logging.getLogger("fastvlm_mlx")

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
    mm_vision_tower mm_hidden_size mm_projector_type mm_patch_merge_type""".split()
)
# LLaVA's training switches, and choices that its MobileCLIP tower ignores.
_SILENT_MM_KEYS = frozenset(
    """mm_projector_lr mm_vision_select_feature mm_vision_select_layer mm_vision_tower_lr
    mm_use_im_start_end mm_use_im_patch_token""".split()
)
# mlx-vlm's and mlx-swift-lm's `vision_config`.
VISION_KEYS = frozenset(
    """cls_ratio down_patch_size down_stride downsamples embed_dims hidden_size image_size
    intermediate_size layer_scale_init_value layers mlp_ratios model_type num_classes patch_size
    pos_embs_shapes projection_dim repmixer_kernel_size token_mixers""".split()
)
# transformers' `vision_config`: TimmWrapperConfig's own, what FastVlmConfig and timm's hub files
# add, then what any PreTrainedConfig may save. Only `architecture` and `model_args` shape a tower.
TIMM_KEYS = frozenset(
    """architecture do_pooling initializer_range label_names model_args model_type num_classes
    global_pool hidden_size num_features pretrained_cfg
    _name_or_path architectures chunk_size_feed_forward dtype id2label is_encoder_decoder label2id
    num_labels output_attentions output_hidden_states problem_type return_dict torch_dtype
    transformers_version""".split()
)
MODEL_ARGS = frozenset("inference_mode layers embed_dims mlp_ratios token_mixers".split())


def get(
    values: Json, key: str, kind: type[Value], default: Value | None = None, *, where: str = ""
) -> Value:
    """Return the value at a key, the default if it is absent or null; numbers are above 0.

    Raises ConfigError naming `where` and the key for a value of another type, and for an absent
    one without default.
    """
    found = values.get(key)
    if found is None:
        if default is None:
            raise ConfigError(f"config.json lacks '{where}{key}'")
        return default
    if not is_kind(kind, found):
        raise ConfigError(
            f"config.json: {where}{key} must be {KINDS[kind]}, not {reprlib.repr(found)}"
        )
    return found


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


def stated_tied(raw: Json) -> bool | None:
    """Return what a config.json claims of a tied head, None if nothing. Raises ConfigError."""
    for source in (get(raw, "text_config", dict, {}), raw):
        if source.get("tie_word_embeddings") is not None:
            return get(source, "tie_word_embeddings", bool)
    return None


def check_root(raw: Json) -> None:
    """Warn of unknown root keys; raise ConfigError for what may change the model."""
    merge = get(raw, "mm_patch_merge_type", str, "flat")
    if merge != "flat":
        raise ConfigError(f"mm_patch_merge_type {merge!r} is not supported (flat)")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if get(raw, key, bool, False):
            raise ConfigError(f"{key} is not supported: no released FastVLM sets it")
    unknown = set(raw) - _SILENT_ROOT_KEYS - _READ_ROOT_KEYS - _SILENT_MM_KEYS
    multimodal = sorted(key for key in unknown if key.startswith("mm_"))
    if multimodal:
        raise ConfigError(
            f"config.json: {', '.join(multimodal)} is not known, and may change the model"
        )
    if unknown:
        log.warning("config.json: passing over unknown keys %s", ", ".join(sorted(unknown)))


def refuse_unknown(where: str, values: Json, known: frozenset[str]) -> None:
    """Raise ConfigError for keys that are none of the known ones."""
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"config.json: unknown {where} keys {', '.join(unknown)}")
