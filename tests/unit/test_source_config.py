"""Each source's config.json is read in its own spelling; what may change the model is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.checkpoint.source_config import read_config, read_picture_form
from fastvlm_mlx.checkpoint.source_keys import require_fastvlm, stated_tied
from fastvlm_mlx.config import PRESETS, ModelConfig, QuantConfig, VisionConfig
from fastvlm_mlx.errors import ConfigError

REAL_FAST_VLM = (
    Path(__file__).parents[1] / "parity" / "config_fast_vlm.json",
    Path(__file__).parents[2] / "fastvlm_mlx" / "demo" / "config.json",
)
SIZES = {
    "0.5b": (896, 24, 4864, 14, 2, 151936),
    "1.5b": (1536, 28, 8960, 12, 2, 151936),
    "7b": (3584, 28, 18944, 28, 4, 152064),
}


def text_fields(size: str) -> dict[str, Any]:
    hidden, layers, intermediate, heads, kv_heads, vocab = SIZES[size]
    return {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
    }


def apple(size: str = "0.5b", **changes: Any) -> dict[str, Any]:
    """The keys of Apple's config.json (FORMATS.md, A1)."""
    return {
        **text_fields(size),
        "architectures": ["LlavaQwen2ForCausalLM"],
        "eos_token_id": 151645,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": 3072,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "mobileclip_l_1024",
        "model_type": "llava_qwen2",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 8192,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        **changes,
    }


def fast_vlm(**changes: Any) -> dict[str, Any]:
    """The keys transformers 5 writes (FORMATS.md, A2)."""
    text = text_fields("0.5b") | {
        "model_type": "qwen2",
        "vocab_size": 152000,
        "eos_token_id": 151643,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }
    return {
        "model_type": "fast_vlm",
        "image_seq_length": 256,
        "image_token_index": 151646,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "model_args": {"inference_mode": True},
        },
        **changes,
    }


def read(
    raw: dict[str, Any], layout: str = "llava_qwen2", *, has_head: bool = False
) -> ModelConfig:
    return read_config(raw, layout, has_head=has_head, rename_module=lambda path: f"our.{path}")


@pytest.mark.parametrize("size", SIZES)
def test_apples_config_gives_the_preset(size: str) -> None:
    assert read(apple(size), has_head=not PRESETS[size].decoder.tied) == PRESETS[size]


def test_fast_vlm_gives_the_same_model_with_its_vocabulary_padding_cut() -> None:
    """transformers pads 151,936 rows to 152,000 with random ones."""
    config, preset = read(fast_vlm(), "fast_vlm"), PRESETS["0.5b"]
    assert config.vision == preset.vision
    assert config.decoder == preset.decoder
    assert config.eos_ids == (151643,)


def test_rope_theta_is_read_in_both_spellings() -> None:
    text = fast_vlm()["text_config"] | {"rope_parameters": {"rope_theta": 5000.0}}
    assert read(fast_vlm(text_config=text), "fast_vlm").decoder.rope_theta == 5000.0
    assert read(apple(rope_theta=7000.0)).decoder.rope_theta == 7000.0


def test_context_is_the_smaller_of_both_limits() -> None:
    assert read(apple()).decoder.max_positions == 8192
    assert read(apple(max_position_embeddings=1024)).decoder.max_positions == 1024


def test_several_stop_ids_are_all_kept() -> None:
    assert read(apple(eos_token_id=[151645, 151643])).eos_ids == (151643, 151645)


def test_another_input_size_is_read_from_the_towers_name() -> None:
    assert read(apple(mm_vision_tower="mobileclip_l_384")).vision.image_size == 384


def test_a_spelled_out_vision_config_gives_other_sizes() -> None:
    spelled = {
        "layers": [1, 1, 2, 1, 1],
        "embed_dims": [16, 32, 64, 128, 256],
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "image_size": 256,
        "model_type": "llava_qwen2",
    }
    raw = apple(vision_config=spelled, mm_vision_tower="mobileclip_l_256", mm_hidden_size=512)
    vision = read(raw).vision
    assert (vision.layers, vision.out_dim) == ((1, 1, 2, 1, 1), 512)
    assert vision.pos_embs == (False, False, False, True, True)


def test_quantization_defaults_and_overrides_are_read() -> None:
    quantization = {
        "group_size": 64,
        "bits": 4,
        "language_model.lm_head": {"group_size": 32, "bits": 8},
        "mm_projector.0": False,
    }
    quant = read(apple(quantization=quantization)).quant
    assert quant == QuantConfig(
        bits=4, group_size=64, overrides={"our.language_model.lm_head": (8, 32, "affine")}
    )
    assert quant.of("anything else") == (4, 64, "affine")


def test_a_modules_setting_without_mode_is_affine_whatever_the_others_are() -> None:
    """Ours took the root's mode once; `to_quantized` of MLX and of MLX Swift takes affine."""
    own = {"language_model.lm_head": {"group_size": 32, "bits": 8}}
    quantization = {"bits": 4, "group_size": 32, "mode": "mxfp4"} | own
    quant = read(apple(quantization=quantization)).quant
    assert quant is not None
    assert quant.overrides == {"our.language_model.lm_head": (8, 32, "affine")}


def test_image_aspect_ratio_other_than_pad_crops() -> None:
    assert read(apple()).image_mode == "pad"
    assert read(apple(image_aspect_ratio=None)).image_mode == "crop"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mm_new_switch": 1}, "mm_new_switch"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "openai/clip"),
        ({"mm_vision_tower": "mobileclip_l_1024_s2"}, "mobileclip_l_1024_s2"),
        ({"mm_vision_tower": "mobileclip_l_1000"}, "1000"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "spatial_unpad"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vision_config": {"surprise": 1}}, "surprise"),
        ({"vision_config": {"down_patch_size": 5}}, "down_patch_size"),
        ({"vision_config": {"image_size": 512}}, "contradicts"),
        ({"mm_hidden_size": 1024}, "1024"),
    ],
)
def test_what_may_change_the_model_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read(apple(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_a_missing_size_is_named(missing: str) -> None:
    raw = apple()
    del raw[missing]
    with pytest.raises(ConfigError, match=missing):
        read(raw)


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        ({"architecture": "fastvit_mci4"}, "fastvit_mci4"),
        ({"architecture": "fastvit_mci3", "model_args": {"lkc_use_act": False}}, "lkc_use_act"),
        ({"architecture": "fastvit_mci3", "out_indices": [3]}, "vision_config keys out_indices"),
        ({"architecture": "fastvit_mci3", "hidden_size": 1024}, "takes 1024 channels"),
        ({"architecture": 3}, r"vision_config\.architecture must be text, not 3"),
        ({}, r"lacks 'vision_config\.architecture'"),
    ],
)
def test_other_timm_towers_are_refused(vision: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(fast_vlm(vision_config=vision), "fast_vlm")


def test_unknown_root_keys_warn_and_known_ones_do_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastvlm_mlx"):
        read(apple())
        assert not caplog.records
        read(apple(a_new_trainer_option=3))
    assert "a_new_trainer_option" in caplog.text


@pytest.mark.parametrize("path", REAL_FAST_VLM, ids=["saved by transformers", "demo"])
def test_no_key_that_transformers_saves_is_unknown(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = json.loads(path.read_text())
    # What a PreTrainedConfig saves besides where it is not at its default.
    extra = {
        "dtype": "bfloat16",
        "id2label": {"0": "x"},
        "num_features": 3072,
        "pretrained_cfg": {},
    }
    with caplog.at_level(logging.WARNING, "fastvlm_mlx"):
        plain = read(raw, "fast_vlm")
        assert read(raw | {"vision_config": raw["vision_config"] | extra}, "fast_vlm") == plain
    assert not caplog.records


def test_a_picture_size_that_fast_vlm_leaves_out_is_transformers_default() -> None:
    """FastVlmConfig's default is 576 tokens, 24 of 64 pixels a side, whatever is released."""
    raw = fast_vlm(image_seq_length=None)
    assert read(raw, "fast_vlm").vision.image_size == 24 * 64
    assert read_picture_form(raw) == (24 * 64, "pad")


OPTIONAL = (
    "eos_token_id hidden_act max_position_embeddings mm_hidden_size mm_patch_merge_type "
    "quantization rms_norm_eps rope_scaling rope_theta text_config tie_word_embeddings "
    "tokenizer_model_max_length use_sliding_window vision_config mm_use_im_start_end"
).split()


@pytest.mark.parametrize("key", OPTIONAL)
def test_null_is_absent(key: str) -> None:
    raw = apple()
    raw.pop(key, None)
    assert read(raw | {key: None}) == read(raw)


def test_null_projector_is_what_its_source_takes_it_to_be() -> None:
    """LLaVA's default is linear; mlx-vlm's and that of Apple's app is mlp2x_gelu."""
    for layout, kind in {"llava_qwen2": "linear", "mlx-vlm": "mlp2x_gelu"}.items():
        assert read(apple(mm_projector_type=None), layout).projector.kind == kind


WRONG: list[tuple[str, Any]] = [
    ("eos_token_id", "x"),
    ("eos_token_id", [None]),
    ("eos_token_id", [True]),
    ("eos_token_id", -1),
    ("hidden_act", 1),
    ("hidden_size", "big"),
    ("image_aspect_ratio", 1),
    ("intermediate_size", 1.5),
    ("max_position_embeddings", "8192"),
    ("mm_hidden_size", [3072]),
    ("mm_patch_merge_type", ["flat"]),
    ("mm_projector_type", {}),
    ("mm_use_im_start_end", "no"),
    ("mm_vision_tower", 1024),
    ("num_attention_heads", True),
    ("num_hidden_layers", 0),
    ("num_key_value_heads", -2),
    ("quantization", "4bit"),
    ("rms_norm_eps", "1e-6"),
    ("rope_parameters", 1),
    ("rope_scaling", 2),
    ("rope_theta", "1e6"),
    ("text_config", []),
    ("tokenizer_model_max_length", 1e30),
    ("use_sliding_window", 1),
    ("vision_config", 5),
    ("vocab_size", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        read(apple(**{key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spelled", "named"),
    [
        ({"layers": 5}, "layers must be a list, not 5"),
        ({"layers": "abcde"}, "layers must be a list"),
        ({"embed_dims": [96, 192, 384, 768, "x"]}, "embed_dims"),
        ({"token_mixers": [[], [], [], [], []]}, "unknown token mixer"),
        ({"pos_embs_shapes": 7}, "pos_embs_shapes must be a list"),
        ({"image_size": "1024"}, r"vision_config\.image_size must be a whole number"),
        ({"embed_dims": [96, 192, 384, 768, 1000]}, "1000 is no multiple"),
        ({"embed_dims": [96, 144, 384, 768, 1536]}, "144 is no multiple of the one before, 96"),
    ],
)
def test_a_tower_that_is_misspelled_is_refused_in_one_line(
    spelled: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read(apple(vision_config=spelled))


def test_widths_must_be_multiples_of_the_stage_before() -> None:
    """The downsampling's grouped convolution has whole multiples of its inputs."""
    with pytest.raises(ConfigError, match="stage width 160 is no multiple of the one before, 64"):
        VisionConfig(embed_dims=(32, 64, 160, 320, 640))


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"bits": 4}, r"lacks 'quantization\.group_size'"),
        ({"bits": 4, "group_size": "64"}, r"quantization\.group_size must be"),
        ({"bits": 4, "group_size": 64, "mode": 3}, r"quantization\.mode must be text"),
        ({"bits": 4, "group_size": 64, "x": {"bits": 4}}, r"lacks 'quantization\.x\.group_size'"),
        ({"bits": 4, "group_size": 64, "x": {"bits": 7, "group_size": 64}}, "of our.x is not"),
    ],
)
def test_a_quantization_is_refused_by_its_key(quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(apple(quantization=quantization))


def test_rope_sections_are_passed_over_for_apples_app_only() -> None:
    """Its exports may hold an mrope_section, which the app reads and then runs plain RoPE."""
    sections = {"mrope_section": [2, 1, 1], "rope_type": "mrope"}
    tower = PRESETS["0.5b"].vision
    raw = apple(rope_scaling=sections, mm_vision_tower=None, mm_projector_type=None)

    def read_app(raw: dict[str, Any]) -> ModelConfig:
        return read_config(
            raw, "apple-app", has_head=False, rename_module=lambda path: path, vision=tower
        )

    assert read_app(raw) == PRESETS["0.5b"]
    for other in ({"factor": 4, **sections}, {"type": "yarn"}, "yarn"):
        with pytest.raises(ConfigError, match="rope_scaling"):
            read_app(raw | {"rope_scaling": other})
    with pytest.raises(ConfigError, match="rope_scaling"):
        read(apple(rope_scaling=sections))


def test_the_tied_flag_is_the_text_configs_then_the_roots() -> None:
    assert stated_tied({"tie_word_embeddings": True}) is True
    null = {"tie_word_embeddings": None}
    assert stated_tied({"text_config": null, "tie_word_embeddings": True}) is True
    assert stated_tied(null) is None
    with pytest.raises(ConfigError, match="tie_word_embeddings must be true or false, not 'yes'"):
        stated_tied({"tie_word_embeddings": "yes"})


@pytest.mark.parametrize("model_type", ["llava_llama", "llava-qwen2", "qwen2", None])
def test_other_models_are_refused_in_one_line(model_type: str | None) -> None:
    """`llava-qwen2` (hyphen) is another model, and a Vicuna decoder is not built yet."""
    with pytest.raises(ConfigError, match=repr(model_type)):
        require_fastvlm({"model_type": model_type})
