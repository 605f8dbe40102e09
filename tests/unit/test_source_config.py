"""Each source's config.json is read in its own spelling; what may change the model is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastvlm_mlx.checkpoint.source_config import read_config, require_fastvlm
from fastvlm_mlx.config import PRESETS, ModelConfig, QuantConfig
from fastvlm_mlx.errors import ConfigError

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


@pytest.mark.parametrize("model_type", ["llava_llama", "llava-qwen2", "qwen2", None])
def test_other_models_are_refused_in_one_line(model_type: str | None) -> None:
    """`llava-qwen2` (hyphen) is another model, and a Vicuna decoder is not built yet."""
    with pytest.raises(ConfigError, match=repr(model_type)):
        require_fastvlm({"model_type": model_type})
