"""A source's config.json in its own spelling → our ModelConfig. Knows each source's keys.

Null means absent wherever a key may be absent, and a value of the wrong type is refused by its key.
Knows no tensors but whether a head is among them; which keys there are is `source_keys.py`'s.

Sources: apple/ml-fastvlm `llava_qwen.py`, `mobileclip_encoder.py`; transformers
`configuration_fast_vlm.py`; mlx-vlm `models/fastvlm/config.py`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from fastvlm_mlx.checkpoint.source_keys import (
    MODEL_ARGS,
    TIMM_KEYS,
    VISION_KEYS,
    Json,
    check_root,
    get,
    refuse_unknown,
    require_fastvlm,
)
from fastvlm_mlx.config import (
    DecoderConfig,
    ImageMode,
    ModelConfig,
    ProjectorConfig,
    QuantConfig,
    VisionConfig,
)
from fastvlm_mlx.errors import ConfigError

# LLaVA cuts prompts here (tokenizer_model_max_length of every released FastVLM).
DEFAULT_MAX_POSITIONS = 8192

# transformers pads fast_vlm vocabularies to a multiple of 64 with random rows after Qwen2's own. No
# key says how many rows are real, so here alone a meaning is read from a value: the two released.
FAST_VLM_VOCABULARY = {152000: 151936, 152128: 152064}

# LLaVA's builder takes a projector to be linear where config.json does not say; mlx-vlm's config.py
# and Apple's app (which always has linear_0 and linear_2) take it to be mlp2x_gelu.
_DEFAULT_PROJECTOR = {"llava_qwen2": "linear", "mlx-vlm": "mlp2x_gelu", "apple-app": "mlp2x_gelu"}

# FastVlmConfig's image_seq_length in transformers' code; released files say 256.
_FAST_VLM_TOKENS = 576


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
    if layout == "fast_vlm":
        return _fast_vlm(raw, has_head)
    return _llava(raw, layout, has_head, rename_module, vision)


def read_picture_form(raw: Json) -> tuple[int, ImageMode]:
    """Return the side in pixels of a model's square pictures and how they are fitted into it.

    Looks at nothing else of a config.json. Raises ConfigError.
    """
    require_fastvlm(raw)
    if raw["model_type"] == "fast_vlm":
        return _fast_vlm_image_size(raw), "pad"
    return _llava_image_size(raw), _image_mode(raw)


def _llava(
    raw: Json,
    layout: str,
    has_head: bool,
    rename_module: Callable[[str], str | None],
    vision: VisionConfig | None,
) -> ModelConfig:
    """Apple's keys, also written by mlx-vlm: Qwen2's and LLaVA's at the root."""
    check_root(raw)
    text = get(raw, "text_config", dict, {}) or raw
    vision = vision or _llava_vision(raw)
    scaling = text.get("rope_scaling")
    # Apple's app reads mrope_section and runs plain RoPE; its exports may hold one.
    if scaling and not (layout == "apple-app" and _is_plain_mrope(scaling)):
        raise ConfigError("rope_scaling is not supported: no FastVLM decoder has it")
    decoder = _decoder(text, raw, has_head, vocab_size=get(text, "vocab_size", int))
    kind = get(raw, "mm_projector_type", str, _DEFAULT_PROJECTOR[layout])
    if kind not in ("mlp2x_gelu", "linear"):
        raise ConfigError(f"mm_projector_type {kind!r} is not supported (mlp2x_gelu, linear)")
    return ModelConfig(
        vision=vision,
        projector=ProjectorConfig(
            in_dim=get(raw, "mm_hidden_size", int, vision.out_dim),
            out_dim=decoder.hidden_size,
            kind=kind,  # type: ignore[arg-type]
        ),
        decoder=decoder,
        quant=_quant(raw, rename_module),
        eos_ids=_eos_ids(text, raw),
        image_mode=_image_mode(raw),
    )


def _fast_vlm(raw: Json, has_head: bool) -> ModelConfig:
    """transformers' keys: `vision_config` for timm, `text_config` for Qwen2."""
    check_root(raw)
    source, text = get(raw, "vision_config", dict, {}), get(raw, "text_config", dict, {})
    kind = get(text, "model_type", str, "qwen2")
    if kind != "qwen2":
        raise ConfigError(f"decoder {kind!r} is not supported: FastVLM's is qwen2")
    refuse_unknown("vision_config", source, TIMM_KEYS)
    architecture = get(source, "architecture", str, where="vision_config.").split(".")[0]
    if architecture != "fastvit_mci3":
        raise ConfigError(
            f"vision tower {architecture!r} is not supported: FastVLM's is fastvit_mci3"
        )
    if get(raw, "projector_hidden_act", str, "gelu") != "gelu":
        raise ConfigError("projector_hidden_act other than gelu is not supported")
    if text.get("rope_scaling"):
        raise ConfigError("rope_scaling is not supported: no FastVLM decoder has it")
    args = get(source, "model_args", dict, {})
    refuse_unknown("vision_config.model_args", args, MODEL_ARGS)
    vision = _vision(args, image_size=_fast_vlm_image_size(raw))
    in_dim = get(source, "hidden_size", int, vision.out_dim)
    rows = get(text, "vocab_size", int)
    decoder = _decoder(text, raw, has_head, vocab_size=FAST_VLM_VOCABULARY.get(rows, rows))
    return ModelConfig(
        vision=vision,
        projector=ProjectorConfig(in_dim=in_dim, out_dim=decoder.hidden_size),
        decoder=decoder,
        eos_ids=_eos_ids(text, raw),
    )


def _fast_vlm_image_size(raw: Json) -> int:
    tokens = get(raw, "image_seq_length", int, _FAST_VLM_TOKENS)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(f"image_seq_length {tokens} is no square")
    return side * VisionConfig().stride


def _llava_image_size(raw: Json) -> int:
    tower = get(raw, "mm_vision_tower", str)
    match = re.fullmatch(r"(?:.*/)?mobileclip_l_(\d{1,9})", tower)
    if not match:
        raise ConfigError(
            f"mm_vision_tower {tower!r} is not supported: FastVLM's is mobileclip_l_*"
        )
    return int(match[1])


def _llava_vision(raw: Json) -> VisionConfig:
    """Tower sizes: mobileclip_l's, unless a `vision_config` (mlx-vlm) spells them out."""
    image_size = _llava_image_size(raw)
    spelled = get(raw, "vision_config", dict, {})
    refuse_unknown("vision_config", spelled, VISION_KEYS)
    fixed = {"down_patch_size": 7, "down_stride": 2, "repmixer_kernel_size": 3}
    for key, value in fixed.items():
        found = get(spelled, key, int, value, where="vision_config.")
        if found != value:
            raise ConfigError(f"vision_config.{key} {found} is not supported (only {value})")
    found = get(spelled, "image_size", int, image_size, where="vision_config.")
    if found != image_size:
        raise ConfigError(
            f"vision_config.image_size {found} contradicts "
            f"mm_vision_tower {raw['mm_vision_tower']!r}"
        )
    return _vision(spelled, image_size=image_size)


def _vision(values: Json, *, image_size: int) -> VisionConfig:
    """Take what is spelled out of `values`, and mobileclip_l's sizes for the rest."""
    given: dict[str, Any] = {
        key: tuple(get(values, key, list))
        for key in ("layers", "embed_dims", "mlp_ratios", "token_mixers")
        if values.get(key) is not None
    }
    if values.get("pos_embs_shapes") is not None:
        shapes = get(values, "pos_embs_shapes", list)
        given["pos_embs"] = tuple(shape is not None for shape in shapes)
    return VisionConfig(image_size=image_size, **given)


def _decoder(text: Json, raw: Json, has_head: bool, *, vocab_size: int) -> DecoderConfig:
    rope = get(text, "rope_parameters", dict, {})
    if get(rope, "rope_type", str, "default") != "default":
        raise ConfigError("rope_parameters.rope_type is not supported: FastVLM's is default")
    activation = get(text, "hidden_act", str, "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act {activation!r} is not supported: Qwen2's is silu")
    if get(text, "use_sliding_window", bool, False):
        raise ConfigError("use_sliding_window is not supported: no FastVLM decoder has it")
    limit = get(raw, "tokenizer_model_max_length", int, DEFAULT_MAX_POSITIONS)
    return DecoderConfig(
        hidden_size=get(text, "hidden_size", int),
        num_layers=get(text, "num_hidden_layers", int),
        intermediate_size=get(text, "intermediate_size", int),
        num_heads=get(text, "num_attention_heads", int),
        num_kv_heads=get(text, "num_key_value_heads", int),
        vocab_size=vocab_size,
        tied=not has_head,
        rms_norm_eps=get(text, "rms_norm_eps", float, 1e-6),
        rope_theta=float(get(text, "rope_theta", float, get(rope, "rope_theta", float, 1e6))),
        max_positions=min(limit, get(text, "max_position_embeddings", int, limit)),
    )


def _is_plain_mrope(scaling: object) -> bool:
    """Whether a rope_scaling holds nothing but sections, which plain RoPE makes no use of."""
    return (
        isinstance(scaling, dict)
        and set(scaling) <= {"mrope_section", "type", "rope_type"}
        and all(scaling.get(key) in (None, "default", "mrope") for key in ("type", "rope_type"))
    )


def _quant(raw: Json, rename_module: Callable[[str], str | None]) -> QuantConfig | None:
    """MLX's `quantization`: defaults at its root, a module path's own settings beside them."""
    values = get(raw, "quantization", dict, {}) or get(raw, "quantization_config", dict, {})
    if not values:
        return None

    def settings(own: Json, where: str) -> tuple[int, int, str]:
        bits, group_size = (get(own, key, int, where=where) for key in ("bits", "group_size"))
        # A module's own setting is all there is for it: MLX takes no mode to be affine there too.
        return bits, group_size, get(own, "mode", str, "affine", where=where)

    bits, group_size, mode = settings(values, "quantization.")
    overrides = {}
    for path, own in values.items():
        if not isinstance(own, dict):
            continue
        canonical = rename_module(path)
        if canonical is not None:
            overrides[canonical] = settings(own, f"quantization.{path}.")
    return QuantConfig(bits=bits, group_size=group_size, mode=mode, overrides=overrides)


def _eos_ids(*sources: Json) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(number) is not int or not 0 <= number < 2**31 for number in listed):
            raise ConfigError(
                "config.json: eos_token_id must be a token's number or a list of them, "
                f"not {reprlib.repr(value)}"
            )
        ids.update(listed)
    return tuple(sorted(ids))


def _image_mode(raw: Json) -> ImageMode:
    """`pad` as released; LLaVA's processor crops for other values; anyres is not supported."""
    # Null is not absent here: to LLaVA it says that nothing is padded.
    absent = "crop" if "image_aspect_ratio" in raw else "pad"
    ratio = get(raw, "image_aspect_ratio", str, absent)
    if "anyres" in ratio:
        raise ConfigError(f"image_aspect_ratio {ratio!r} is not supported (pad)")
    return "pad" if ratio == "pad" else "crop"
