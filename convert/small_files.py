"""What lies beside an artifact's weights: configs, tokenizer, templates, licence and card.

Knows which files the native folder (FORMATS.md, D) and the folder for Apple's app (B3) consist of,
and what the processors and generators of their readers want to be told; `config_json.py` knows
config.json, `tokenizer_json.py` the tokenizer, `card.py` the card. Knows no weights.

Sources: mlx-vlm `models/fastvlm/processing.py`; mlx-swift-lm `FastVLM.swift`; the files of
https://huggingface.co/apple/FastVLM-0.5B-fp16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.card import app_card, native_card
from fastvlm_mlx.convert.config_json import app_config, native_config
from fastvlm_mlx.convert.provenance import find_provenance
from fastvlm_mlx.convert.tokenizer_json import IMAGE, TokenizerFiles, make_tokenizer_files

Json = Mapping[str, Any]

# Content is a string (mlx-vlm, transformers) or a list of parts (mlx-swift-lm); both become what
# `prompt/template.py` renders.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The app's content is a string, with <image> in it, and its Jinja of 2025 reads the whole template:
# nothing is in it beyond what Qwen2's own has.
APP_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_native_files(
    folder: Path,
    *,
    source_folder: Path,
    config: ModelConfig,
    raw: Json,
    dtype: str,
    float_modules: Iterable[str],
    source_name: str,
    command: str,
    bits_per_weight: float,
    tower_folder: Path | None = None,
    tower_name: str | None = None,
) -> None:
    """Write everything of a native folder that is not weights.

    `raw` is the source's config.json, `dtype` that of the floats, `float_modules` the canonical
    paths of linear modules that stay float in a quantized model. `source_name` is the source as it
    was asked for, `command` the exact command; both are for the card, as is `bits_per_weight`.
    `tower_folder` and `tower_name` are those of the vision tower's source; no name: it is the same.
    Raises CheckpointError for a broken tokenizer, ConfigError for what the format cannot say.
    """
    tokenizer = make_tokenizer_files(
        source_folder, chat_template=CHAT_TEMPLATE, max_length=config.decoder.max_positions
    )
    provenance = find_provenance(
        source_folder, source_name, tower_folder=tower_folder, tower_name=tower_name
    )
    values = native_config(
        config, raw, dtype=dtype, im_end_id=tokenizer.im_end_id, float_modules=float_modules
    )
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", generation_config(tokenizer))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config, app=False))
    _write_json(folder / "processor_config.json", processor_config(config, app=False))
    (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.encode())
    card = native_card(
        provenance, config=config, dtype=dtype, command=command, bits_per_weight=bits_per_weight
    )
    _write_rest(folder, tokenizer, provenance.license_files, card)


def write_app_files(
    folder: Path,
    *,
    source_folder: Path,
    config: ModelConfig,
    raw: Json,
    dtype: str,
    source_name: str,
    command: str,
    bits_per_weight: float,
    tower_folder: Path | None = None,
    tower_name: str | None = None,
) -> int:
    """Write everything of the folder for Apple's app but weights and mlpackage; return `<image>`'s
    id. Arguments and errors as `write_native_files`.
    """
    tokenizer = make_tokenizer_files(
        source_folder,
        chat_template=APP_CHAT_TEMPLATE,
        max_length=config.decoder.max_positions,
        with_image=True,
    )
    assert tokenizer.image_id is not None  # asked for
    provenance = find_provenance(
        source_folder, source_name, tower_folder=tower_folder, tower_name=tower_name
    )
    values = app_config(
        config, raw, dtype=dtype, im_end_id=tokenizer.im_end_id, image_id=tokenizer.image_id
    )
    _write_json(folder / "config.json", values)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config, app=True))
    _write_json(folder / "processor_config.json", processor_config(config, app=True))
    card = app_card(
        provenance, config=config, dtype=dtype, command=command, bits_per_weight=bits_per_weight
    )
    _write_rest(folder, tokenizer, provenance.license_files, card)
    return tokenizer.image_id


def preprocessor_config(config: ModelConfig, *, app: bool) -> dict[str, Any]:
    """Return preprocessor_config.json: Apple's, or with the classes mlx-vlm and mlx-swift-lm have.

    That pictures are padded to a square is in FastVLM's classes, not in a field.
    """
    side = config.vision.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor" if app else "FastVLMImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": _processor_class(app),
        "resample": 3,  # PIL's number of BICUBIC
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def processor_config(config: ModelConfig, *, app: bool) -> dict[str, Any]:
    """Return processor_config.json; mlx-swift-lm takes the class from it, the app nothing."""
    return {
        "image_token": IMAGE,
        "num_additional_image_tokens": 0,
        "patch_size": config.vision.stride,
        "processor_class": _processor_class(app),
        "vision_feature_select_strategy": None,
    }


def generation_config(tokenizer: TokenizerFiles) -> dict[str, Any]:
    """Return generation_config.json. Apple's names no end, and its readers then run on forever."""
    return {
        "do_sample": False,
        "eos_token_id": [tokenizer.im_end_id, tokenizer.end_of_text_id],
        "pad_token_id": tokenizer.end_of_text_id,
    }


def _processor_class(app: bool) -> str:
    return "LlavaProcessor" if app else "FastVLMProcessor"


def _write_rest(
    folder: Path, tokenizer: TokenizerFiles, license_files: Mapping[str, Path], card: str
) -> None:
    for name, content in tokenizer.contents.items():
        (folder / name).write_bytes(content)
    for name, file in license_files.items():
        shutil.copyfile(file, folder / name)
    (folder / "README.md").write_bytes(card.encode())


def _write_json(path: Path, value: Json) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_bytes(f"{text}\n".encode())
