"""config.json and what lies beside it: read back as the model it was written from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from fastvlm_mlx.checkpoint.layouts import LAYOUTS
from fastvlm_mlx.checkpoint.source_config import read_config
from fastvlm_mlx.config import (
    PRESETS,
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    QuantConfig,
    VisionConfig,
)
from fastvlm_mlx.convert.config_json import app_config, native_config
from fastvlm_mlx.convert.place import check_destination
from fastvlm_mlx.convert.small_files import (
    APP_CHAT_TEMPLATE,
    CHAT_TEMPLATE,
    preprocessor_config,
    processor_config,
    write_app_files,
    write_native_files,
)
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.prompt.template import IMAGE, Control, ImageMark, Message, render, user_message
from fastvlm_mlx.prompt.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"
# A folder as mlx-swift-lm reads it: every field without a default (FORMATS.md, B2).
SWIFT_VISION_FIELDS = """cls_ratio down_patch_size down_stride downsamples embed_dims hidden_size
    image_size intermediate_size layers layer_scale_init_value mlp_ratios num_classes patch_size
    pos_embs_shapes projection_dim repmixer_kernel_size token_mixers""".split()
SWIFT_ROOT_FIELDS = """model_type hidden_size num_hidden_layers intermediate_size
    num_attention_heads num_key_value_heads vocab_size eos_token_id mm_projector_type mm_hidden_size
    tokenizer_model_max_length tokenizer_padding_side""".split()


def read_demo(folder: Path = DEMO, layout: str = "fast_vlm") -> tuple[ModelConfig, dict[str, Any]]:
    raw = json.loads((folder / "config.json").read_text())
    return read_back(raw, layout, has_head=False), raw


def read_back(
    raw: dict[str, Any], layout: str = "mlx-vlm", *, has_head: bool, **options: Any
) -> ModelConfig:
    table = next(each for each in LAYOUTS if each.name == layout)

    def rename(path: str) -> str | None:
        try:
            renamed = table.rename(f"{path}.weight")
        except KeyError:
            return None
        return renamed[0].removesuffix(".weight") if renamed else None

    return read_config(raw, layout, has_head=has_head, rename_module=rename, **options)


SMALL = ModelConfig(
    vision=VisionConfig(
        layers=(1, 2, 1, 1, 1),
        embed_dims=(16, 32, 32, 64, 128),
        mlp_ratios=(4, 3, 4, 4, 2.5),
        token_mixers=("repmixer", "repmixer", "repmixer", "repmixer", "attention"),
        pos_embs=(False, False, False, False, True),
        image_size=320,
    ),
    projector=ProjectorConfig(in_dim=256, out_dim=64, kind="linear"),
    decoder=DecoderConfig(
        hidden_size=64,
        num_layers=2,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=700,
        tied=False,
        rms_norm_eps=1e-5,
        rope_theta=10000,
        max_positions=500,
    ),
    eos_ids=(7,),
    image_mode="crop",
)
QUANT = QuantConfig(
    bits=4,
    group_size=64,
    overrides={
        "decoder.qwen2.model.embed_tokens": (8, 64, "affine"),
        "decoder.qwen2.model.layers.3.mlp.down_proj": (6, 32, "affine"),
        "projector.linear_1": (8, 32, "mxfp8"),
    },
)
CONFIGS = {
    **PRESETS,
    "small": SMALL,
    "demo": read_demo()[0],
    "quantized": dataclasses.replace(PRESETS["7b"], quant=QUANT),
    "mxfp4": dataclasses.replace(
        PRESETS["0.5b"], quant=QuantConfig(bits=4, group_size=32, mode="mxfp4")
    ),
    "quantized linear": dataclasses.replace(
        SMALL,
        quant=QuantConfig(
            bits=4, group_size=64, overrides={"projector.linear_1": (8, 32, "affine")}
        ),
    ),
}
RAW = {"model_type": "llava_qwen2", "max_position_embeddings": 32768, "bos_token_id": 151643}


def native(
    config: ModelConfig, raw: dict[str, Any] = RAW, floats: tuple[str, ...] = ()
) -> dict[str, Any]:
    values = native_config(
        config, raw, dtype="bfloat16", im_end_id=config.eos_ids[0], float_modules=floats
    )
    copy: dict[str, Any] = json.loads(json.dumps(values))
    return copy


@pytest.mark.parametrize("name", CONFIGS)
def test_native_config_reads_back_as_the_model_it_was_written_from(name: str) -> None:
    config = CONFIGS[name]
    floats = ("projector.linear_2",) if config.quant and config.projector.kind != "linear" else ()
    values = native(config, floats=floats)
    assert read_back(values, has_head=not config.decoder.tied) == config
    assert native(config, values, floats) == values


@pytest.mark.parametrize("name", CONFIGS)
def test_native_config_has_what_mlx_swift_lm_demands(name: str) -> None:
    """mlx-vlm's own convert leaves vision_config out, and no Swift app can load what it wrote."""
    config = CONFIGS[name]
    values = native(config)
    assert set(values) >= {*SWIFT_ROOT_FIELDS, "vision_config"}
    assert set(values["vision_config"]) == {*SWIFT_VISION_FIELDS, "model_type"}
    assert values["model_type"] == values["vision_config"]["model_type"] == "llava_qwen2"
    assert type(values["eos_token_id"]) is int
    assert values["image_token_index"] == -200
    assert not {"text_config", "rope_scaling"} & set(values)


def test_swift_gets_whole_mlp_ratios() -> None:
    ratios = native(PRESETS["0.5b"])["vision_config"]["mlp_ratios"]
    assert [type(ratio) for ratio in ratios] == [int] * 5


def test_fast_vlms_positions_are_cut_to_what_fastvlm_was_trained_for() -> None:
    raw = {"model_type": "fast_vlm", "text_config": {"max_position_embeddings": 131072}}
    assert native(PRESETS["0.5b"], raw)["max_position_embeddings"] == 32768
    raw["model_type"] = "llava_qwen2"
    assert native(PRESETS["0.5b"], raw)["max_position_embeddings"] == 131072


def test_modules_are_named_in_both_spellings_and_float_ones_by_false() -> None:
    """Swift looks settings up by its own path: with mlx-vlm's alone it packs at the wrong width."""
    config = CONFIGS["quantized"]
    values = native(config, floats=("projector.linear_2", "decoder.qwen2.lm_head"))
    quantization = values["quantization"]
    wide = {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    assert quantization == values["quantization_config"]
    assert quantization["mm_projector.0"] == quantization["mm_projector.layers.0"] == wide
    assert quantization["mm_projector.2"] is quantization["mm_projector.layers.2"] is False
    assert quantization["language_model.lm_head"] is False
    assert quantization["language_model.model.embed_tokens"]["bits"] == 8
    assert (quantization["bits"], quantization["group_size"], quantization["mode"]) == (
        4,
        64,
        "affine",
    )
    assert len(quantization) == 3 + 4 + 1 + 2


def test_a_tower_that_the_format_cannot_describe_is_refused() -> None:
    config = dataclasses.replace(
        PRESETS["0.5b"], vision=dataclasses.replace(VisionConfig(), head_dim=64)
    )
    with pytest.raises(ConfigError, match="head_dim"):
        native(config)


def test_app_config_is_what_the_app_decodes() -> None:
    """-200 is no id in Swift's embedding, and the app dies of a rope_scaling without sections."""
    config = dataclasses.replace(PRESETS["1.5b"], quant=QuantConfig(bits=8, group_size=64))
    values = app_config(config, RAW, dtype="float16", im_end_id=151645, image_id=151646)
    assert values["image_token_index"] == 151646
    assert values["quantization"] == {"bits": 8, "group_size": 64}
    assert values["tie_word_embeddings"] is True
    assert not {"vision_config", "rope_scaling", "quantization_config"} & set(values)
    assert read_back(values, "apple-app", has_head=False, vision=config.vision) == config


@pytest.mark.parametrize(
    "quant",
    [QUANT, QuantConfig(bits=4, group_size=32, mode="mxfp4")],
    ids=["overrides", "mxfp4"],
)
def test_the_app_refuses_what_it_cannot_decode(quant: QuantConfig) -> None:
    config = dataclasses.replace(PRESETS["7b"], quant=quant)
    with pytest.raises(ConfigError, match="one affine setting"):
        app_config(config, RAW, dtype="float16", im_end_id=151645, image_id=151665)


def test_processor_files_have_the_size_of_apples_in_bytes() -> None:
    """467 and 168 bytes in apple/FastVLM-0.5B-fp16."""

    def size(values: dict[str, Any]) -> int:
        return len(json.dumps(values, indent=2, sort_keys=True) + "\n")

    assert size(preprocessor_config(PRESETS["0.5b"], app=True)) == 467
    assert size(processor_config(PRESETS["0.5b"], app=True)) == 168


def test_native_processor_files_name_the_classes_of_mlx_vlm() -> None:
    values = preprocessor_config(SMALL, app=False)
    assert values["processor_class"] == "FastVLMProcessor"
    assert values["image_processor_type"] == "FastVLMImageProcessor"
    assert values["crop_size"] == {"height": 320, "width": 320}
    assert values["size"] == {"shortest_edge": 320}
    assert processor_config(SMALL, app=False)["processor_class"] == "FastVLMProcessor"


def spelled(messages: list[Message], *, generation_prompt: bool = True) -> str:
    """What the engine's own template renders, control tokens and pictures in text."""
    text = {Control: lambda part: part.token, ImageMark: lambda _: "<image>"}
    parts = render(messages, generation_prompt=generation_prompt)
    return "".join(text.get(type(part), str)(part) for part in parts)  # type: ignore[operator]


CHATS = {
    "text": [user_message("Hi", 0)],
    "picture": [user_message("What is this?", 1)],
    "pictures": [user_message("What changed?\n<b>", 2)],
    "system": [Message("system", ("Be brief.",)), user_message("What is this?", 1)],
    "turns": [
        user_message("What is this?", 1),
        Message("assistant", ("A mug.",)),
        user_message("Its colour?", 0),
    ],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_templates_render_the_engines_prompt(chat: str, generation_prompt: bool) -> None:
    """A string-only template fails in mlx-swift-lm, a list-only one in mlx-vlm."""
    messages = CHATS[chat]
    expected = spelled(messages, generation_prompt=generation_prompt)
    as_text, as_parts = [], []
    for message in messages:
        pictures = message.content.count(IMAGE)
        text = message.content[-1]
        as_text.append({"role": message.role, "content": "<image>\n" * pictures + str(text)})
        parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]
        as_parts.append({"role": message.role, "content": parts})
    # As transformers compiles templates; Swift's Jinja does not trim.
    for options in ({"trim_blocks": True, "lstrip_blocks": True}, {}):
        environment = jinja2.Environment(**options)  # type: ignore[arg-type]
        template = environment.from_string(CHAT_TEMPLATE)
        given = {"add_generation_prompt": generation_prompt}
        assert template.render(messages=as_text, **given) == expected
        assert template.render(messages=as_parts, **given) == expected
        app = environment.from_string(APP_CHAT_TEMPLATE)
        assert app.render(messages=as_text, **given) == expected


def write_native(folder: Path, source: Path, layout: str, **options: Any) -> Path:
    config, raw = read_demo(source, layout)
    folder.mkdir()
    write_native_files(
        folder,
        source_folder=source,
        config=config,
        raw=raw,
        dtype="float32",
        float_modules=(),
        source_name=options.pop("source_name", "demo"),
        command="fastvlm convert demo out",
        bits_per_weight=32.0,
        **options,
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_native_folder_made_from_itself_has_the_same_bytes(tmp_path: Path) -> None:
    first = write_native(tmp_path / "first", DEMO, "fast_vlm")
    again = write_native(tmp_path / "again", DEMO, "fast_vlm")
    second = write_native(tmp_path / "second", first, "mlx-vlm", source_name=str(first))
    assert contents(first) == contents(again) == contents(second)
    assert set(contents(first)) == {
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_a_native_folder_stops_and_reads_as_its_source_does(tmp_path: Path) -> None:
    """Apple's generation_config.json names no end: readers that take it from there never stop."""
    folder = write_native(tmp_path / "native", DEMO, "fast_vlm")
    assert Tokenizer.from_folder(folder).stop_ids == Tokenizer.from_folder(DEMO).stop_ids
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [610, 608]
    assert read_demo(folder, "mlx-vlm")[0] == read_demo()[0]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert settings["model_max_length"] == 1024


def test_an_app_folder_has_apples_files_and_one_id_for_image(tmp_path: Path) -> None:
    config, raw = read_demo()
    image_id = write_app_files(
        tmp_path,
        source_folder=DEMO,
        config=config,
        raw=raw,
        dtype="float16",
        source_name="demo",
        command="fastvlm export-app demo out",
        bits_per_weight=16.0,
    )
    assert image_id == 611
    assert json.loads((tmp_path / "config.json").read_text())["image_token_index"] == 611
    assert Tokenizer.from_folder(tmp_path).control_id("<image>") == 611
    assert set(contents(tmp_path)) == {
        "README.md",
        "added_tokens.json",
        "config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_licences_travel_with_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((DEMO / name).read_bytes())
    for name in ("LICENSE", "NOTICE.txt", "license_model.md", "LICENSE.py"):
        (source / name).write_text(f"{name} text")
    folder = write_native(tmp_path / "native", source, "fast_vlm", source_name=str(source))
    copied = {name for name in contents(folder) if "licen" in name.lower() or "NOTICE" in name}
    assert copied == {"LICENSE", "NOTICE.txt", "license_model.md"}
    assert (folder / "NOTICE.txt").read_text() == "NOTICE.txt text"


@pytest.mark.parametrize("app", [False, True])
def test_the_licences_of_a_tower_from_elsewhere_travel_too(tmp_path: Path, app: bool) -> None:
    """Apple's terms came with the folder of --vision-from, and were left behind."""
    source, tower, folder = (tmp_path / name for name in ("source", "tower", "out"))
    for each in (source, tower, folder):
        each.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((DEMO / name).read_bytes())
    (source / "LICENSE").write_text("the source's")
    (tower / "LICENSE").write_text("the tower's")
    config, raw = read_demo(source)
    options: dict[str, Any] = {} if app else {"float_modules": ()}
    (write_app_files if app else write_native_files)(
        folder,
        source_folder=source,
        config=config,
        raw=raw,
        dtype="float16",
        source_name=str(source),
        command="",
        bits_per_weight=16.0,
        tower_folder=tower,
        tower_name="apple/FastVLM-0.5B",
        **options,
    )
    assert (folder / "LICENSE").read_text() == "the source's"
    assert (folder / "LICENSE-vision-tower").read_text() == "the tower's"
    assert "base_model: apple/FastVLM-0.5B\n" in (folder / "README.md").read_text()
    check_destination(folder, overwrite=True, source=None)
