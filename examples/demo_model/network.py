"""The demo model's network: transformers' own FastVLM, small, with its training-form branches.

Knows sizes, initial values, how pictures and text are joined and how the folder is written.
Refuses to know about scenes and about optimisation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from scenes import SIDE
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, GenerationConfig
from vocabulary import IMAGE_TOKENS, save_tokenizer, write_json

LAYERS = (1, 1, 2, 1, 1)
WIDTHS = (16, 32, 64, 128, 256)
HIDDEN = 128
LAYER_SCALE = 0.5  # timm starts at 1e-5, from where a short training hardly moves the blocks


def make_config(tokenizer: Tokenizer) -> FastVlmConfig:
    token = tokenizer.token_to_id
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": 2 * WIDTHS[-1],
        "initializer_range": 0.02,
        "model_args": {"layers": LAYERS, "embed_dims": WIDTHS, "inference_mode": False},
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    return FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token("<image>"),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def build(tokenizer: Tokenizer) -> FastVlmForConditionalGeneration:
    model = FastVlmForConditionalGeneration(make_config(tokenizer))
    scales = [p for name, p in model.named_parameters() if name.endswith(".gamma")]
    assert len(scales) == 2 * sum(LAYERS), "every block has two layer scales"
    for scale in scales:
        nn.init.constant_(scale, LAYER_SCALE)
    return model.to(memory_format=torch.channels_last)


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [n, side, side, 3] to float [n, 3, side, side] in 0..1."""
    return (pixels.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)


def hidden_states(
    model: FastVlmForConditionalGeneration, features: Tensor, ids: Tensor, pictures: Tensor
) -> Tensor:
    """The decoder's output, with the features of `pictures` in the image places in order."""
    embeds = joined_embeddings(model, features, ids, pictures)
    return model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def joined_embeddings(
    model: FastVlmForConditionalGeneration, features: Tensor, ids: Tensor, pictures: Tensor
) -> Tensor:
    embeds = model.get_input_embeddings()(ids)
    places = ids == model.config.image_token_index
    joined = features[pictures].flatten(0, 1).to(embeds.dtype)
    return embeds.masked_scatter(places[..., None], joined)


def save_checkpoint(
    model: FastVlmForConditionalGeneration, tokenizer: Tokenizer, folder: Path
) -> None:
    """A transformers fast_vlm folder: training form, float16, BatchNorm kept."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(memory_format=torch.contiguous_format).half().eval()
    for part in (half.config, half.config.text_config, half.config.vision_config):
        part.dtype = torch.float16
    eos, pad = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    half.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[eos, pad], pad_token_id=pad
    )
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    size = {"height": SIDE, "width": SIDE}
    write_json(folder / "preprocessor_config.json", {
        "crop_size": size, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor", "image_std": [1.0, 1.0, 1.0],
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE},
    })  # fmt: skip
    write_json(folder / "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 64,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "full",
    })  # fmt: skip
