from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tokenizers

from fastvlm_mlx.convert.tokenizer_json import TokenizerFiles, make_tokenizer_files
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.prompt.tokenizer import Tokenizer
from fastvlm_mlx.prompt.tokenizer_files import read_tokenizer
from tests.unit.small_tokenizer import (
    CONTROLS,
    CORPUS,
    QWEN2_SPLIT,
    train,
    write_slow_files,
    write_tokenizer_json,
)

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"
TEXTS = [
    *CORPUS.splitlines(),
    CORPUS,
    "e\u0301 and é: NFC makes one of both; \u212b too",
    "12345 1 000,50 ½ ² ٣",
    "a\r\nb\n\n\n  c   \t d \n ",
    "I'LL don't we'Ve",
    "\0\x07\u200b\ufeff\uffff",
    "<|im_end|> <|im_start|>user <image> <|endoftext|> <tool_call> <|fim_pad|>",
]
# Qwen2.5's added tokens, 151643 to 151664 there; those that its tokenizer_config.json calls
# special. Typed from https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/tokenizer_config.json.
QWEN25 = {
    **dict.fromkeys(
        """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
        <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
        <|vision_pad|> <|image_pad|> <|video_pad|>""".split(),
        True,
    ),
    **dict.fromkeys(
        """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
        <|repo_name|> <|file_sep|>""".split(),
        False,
    ),
}


def make(folder: Path, *, with_image: bool = False) -> TokenizerFiles:
    return make_tokenizer_files(
        folder, chat_template="{{ messages }}", max_length=8192, with_image=with_image
    )


def written(folder: Path, files: TokenizerFiles) -> Path:
    folder.mkdir()
    for name, content in files.contents.items():
        (folder / name).write_bytes(content)
    return folder


def write_demo(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def write_slow_demo(folder: Path) -> None:
    """The demo's tokenizer as Apple's checkpoints have one: no tokenizer.json, no `<image>`."""
    source = json.loads((DEMO / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(source["model"]["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in source["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    added = {t["content"]: t["id"] for t in source["added_tokens"] if t["content"] != "<image>"}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def write_slow_qwen25(folder: Path, *, gap: int = 0) -> None:
    """Qwen2.5's 22 added tokens behind a small vocabulary, with a gap before the last eight."""
    model = train().model
    model.save(str(folder))
    first = len(json.loads((folder / "vocab.json").read_text()))
    added = {name: first + i + (i > 13) * gap for i, name in enumerate(QWEN25)}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    decoder = {
        str(added[name]): {"content": name, "special": special, **flags}
        for name, special in QWEN25.items()
    }
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {"added_tokens_decoder": decoder, "additional_special_tokens": list(QWEN25)[1:14]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_gap(folder: Path) -> None:
    write_slow_qwen25(folder, gap=5)


def write_added_in_vocabulary(folder: Path) -> None:
    """Slow files whose vocab.json lists the added tokens too, as some trainers save it."""
    write_slow_files(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= json.loads((folder / "added_tokens.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab))


def write_image_inside(folder: Path) -> None:
    """A tokenizer.json with `<image>` between the other added tokens."""
    tokenizer = train()
    tokenizer.add_special_tokens(["<image>", "<last>"])
    tokenizer.save(str(folder / "tokenizer.json"))


WRITERS: dict[str, Callable[[Path], object]] = {
    "demo": write_demo,
    "slow demo": write_slow_demo,
    "slow": write_slow_files,
    "tokenizer.json": write_tokenizer_json,
    "Qwen2.5": write_slow_qwen25,
    "gap": write_gap,
    "added in vocabulary": write_added_in_vocabulary,
    "image inside": write_image_inside,
}


@pytest.fixture(params=WRITERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    WRITERS[request.param](folder)
    return folder


def vocabulary(folder: Path) -> dict[str, int]:
    vocab: dict[str, int] = read_tokenizer(folder).get_vocab(with_added_tokens=True)
    return vocab


def document(files: TokenizerFiles) -> Mapping[str, object]:
    parsed: dict[str, object] = json.loads(files.contents["tokenizer.json"])
    return parsed


def test_every_id_stays_but_image_is_no_token(source: Path, tmp_path: Path) -> None:
    before = vocabulary(source)
    before.pop("<image>", None)
    native = written(tmp_path / "native", make(source))
    assert vocabulary(native) == before
    alone = tokenizers.Tokenizer.from_file(str(native / "tokenizer.json"))
    assert alone.get_vocab(with_added_tokens=True) == before


def test_texts_have_the_same_ids_before_and_after(source: Path, tmp_path: Path) -> None:
    native = written(tmp_path / "native", make(source))
    ours = Tokenizer.from_folder(source), Tokenizer.from_folder(native)
    library = read_tokenizer(source), tokenizers.Tokenizer.from_file(str(native / "tokenizer.json"))
    for text in TEXTS:
        assert ours[0].encode(text) == ours[1].encode(text)
        assert ours[1].decode(ours[1].encode(text)) == ours[0].decode(ours[0].encode(text))
        if "<image>" not in text:
            assert library[0].encode(text).ids == library[1].encode(text).ids


def test_what_was_made_is_made_again_from_itself(source: Path, tmp_path: Path) -> None:
    first = make(source)
    assert make(written(tmp_path / "native", first)) == first
    assert make(source) == first


def test_slow_files_alone_hold_the_same_tokenizer(source: Path, tmp_path: Path) -> None:
    native = written(tmp_path / "native", make(source))
    whole = vocabulary(native)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (native / name).unlink()
    assert vocabulary(native) == whole


def test_image_typed_by_a_user_stays_text_for_every_reader(source: Path, tmp_path: Path) -> None:
    """fast_vlm's tokenizers have `<image>`; mlx-vlm would then splice a picture into a question."""
    native = written(tmp_path / "native", make(source))
    assert not any("<image>" in (native / name).read_text() for name in make(source).contents)
    library = tokenizers.Tokenizer.from_file(str(native / "tokenizer.json"))
    assert len(library.encode("an <image> tag").ids) > 4


def test_the_app_gets_image_behind_the_last_added_token(source: Path, tmp_path: Path) -> None:
    native, app = make(source), make(source, with_image=True)
    last = max(json.loads(native.contents["added_tokens.json"]).values())
    assert native.image_id is None
    assert app.image_id == last + 1
    assert json.loads(app.contents["added_tokens.json"])["<image>"] == last + 1
    entries = json.loads(app.contents["tokenizer_config.json"])["added_tokens_decoder"]
    assert entries[str(last + 1)] == {**next(iter(entries.values())), "content": "<image>"}
    folder = written(tmp_path / "app", app)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert library.encode("<image>" * 3).ids == [last + 1] * 3
    assert make(folder) == native
    assert make(folder, with_image=True) == app


@pytest.mark.parametrize("slow", [write_slow_files, write_slow_qwen25, write_added_in_vocabulary])
def test_a_missing_tokenizer_json_is_spelled_as_qwen2s(
    tmp_path: Path, slow: Callable[[Path], object]
) -> None:
    slow(tmp_path)
    made = json.loads(make(tmp_path).contents["tokenizer.json"])
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    assert made["normalizer"] == {"type": "NFC"}
    assert made["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert made["post_processor"] == made["decoder"] == byte_level
    assert not set(made["model"]["vocab"]) & {t["content"] for t in made["added_tokens"]}
    assert list(made["model"]["vocab"].values()) == list(range(len(made["model"]["vocab"])))
    assert (made["truncation"], made["padding"]) == (None, None)


def test_flags_and_special_names_are_the_sources(tmp_path: Path) -> None:
    write_slow_qwen25(tmp_path)
    files = make(tmp_path)
    config = json.loads(files.contents["tokenizer_config.json"])
    entries = config["added_tokens_decoder"].values()
    assert {entry["content"]: entry["special"] for entry in entries} == QWEN25
    assert config["additional_special_tokens"] == list(QWEN25)[1:14]
    assert config["eos_token"] == "<|im_end|>"
    assert config["pad_token"] == "<|endoftext|>"
    assert config["clean_up_tokenization_spaces"] is False
    assert config["model_max_length"] == 8192
    assert config["chat_template"] == "{{ messages }}"


def test_the_demos_special_names_lose_image_only() -> None:
    config = json.loads(make(DEMO).contents["tokenizer_config.json"])
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert make(DEMO, with_image=True).image_id == 611
    assert make(DEMO).im_end_id == 610
    assert make(DEMO).end_of_text_id == 608


def test_apples_small_files_have_their_size_in_bytes(tmp_path: Path) -> None:
    """367 and 101 bytes in apple/FastVLM-0.5B-fp16, whose ids have six digits."""
    write_slow_files(tmp_path)
    files = make(tmp_path, with_image=True)
    assert len(files.contents["special_tokens_map.json"]) == 367
    digits = sum(len(str(i)) for i in json.loads(files.contents["added_tokens.json"]).values())
    assert len(files.contents["added_tokens.json"]) - digits + 4 * 6 == 101


def test_truncation_left_in_a_tokenizer_json_is_not_passed_on(tmp_path: Path) -> None:
    tokenizer = train()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = document(make(tmp_path))
    assert (made["truncation"], made["padding"]) == (None, None)


@pytest.mark.parametrize("missing", CONTROLS)
def test_a_tokenizer_without_the_templates_tokens_is_refused(tmp_path: Path, missing: str) -> None:
    write_slow_files(tmp_path)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(missing, "<other>"))
    with pytest.raises(CheckpointError, match="is no added token"):
        make(tmp_path)


def test_two_tokens_with_one_id_are_refused(tmp_path: Path) -> None:
    write_slow_files(tmp_path)
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    added = {control: first + i for i, control in enumerate(CONTROLS)} | {"<odd>": 5}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError) as raised:
        make(tmp_path)
    assert "\n" not in str(raised.value)
