"""A source's tokenizer, in whichever form it has, to the files of an artifact folder.

Knows tokenizer.json, the slow form beside it (vocab.json, merges.txt, added_tokens.json) and
tokenizer_config.json, and that `<image>` is a token in the folder for Apple's app only: elsewhere
it would turn what a user typed into a picture's place. Knows no weights and writes nothing.

The same source gives the same bytes, and a folder made here gives its own files again.

Sources: https://huggingface.co/Qwen/Qwen2-0.5B `tokenizer.json` and `tokenizer_config.json`;
huggingface/tokenizers `added_vocabulary.rs` (how ids are given out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from fastvlm_mlx.checkpoint.tensors import read_json
from fastvlm_mlx.errors import CheckpointError, one_line
from fastvlm_mlx.prompt.tokenizer_files import read_tokenizer

IMAGE = "<image>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_TURNS = ("<|im_start|>", END_OF_TURN)

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
}  # fmt: skip

Vocabulary = dict[str, int]
Token = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """File name → bytes, and the ids that other files name; `image_id` only where asked for."""

    contents: Mapping[str, bytes]
    im_end_id: int
    end_of_text_id: int
    image_id: int | None


def make_tokenizer_files(
    folder: Path, *, chat_template: str, max_length: int, with_image: bool = False
) -> TokenizerFiles:
    """Make tokenizer.json, tokenizer_config.json, vocab.json, merges.txt, added_tokens.json and
    special_tokens_map.json from a source folder.

    `max_length` is in tokens. `with_image` appends `<image>` behind the last added token, as
    Apple's app wants it; otherwise there is no such token, whatever the source has.
    Raises CheckpointError if the source's files are missing, broken or not of Qwen2's kind.
    """
    source = read_tokenizer(folder)
    document = json.loads(source.to_str())
    document |= {"truncation": None, "padding": None}  # leavings of its training
    if not (folder / "tokenizer.json").exists():
        _spell_as_qwen2(document)
    added = [token for token in document["added_tokens"] if token["content"] != IMAGE]
    model = document["model"]
    if len(added) < len(document["added_tokens"]):
        model["vocab"].pop(IMAGE, None)
    ids = {token["content"]: token["id"] for token in added}
    for name in (END_OF_TEXT, *_TURNS):
        if name not in ids:
            raise CheckpointError(f"{folder}: {name} is no added token, so this is not FastVLM's")
    if with_image:
        ids[IMAGE] = max(ids.values()) + 1
        added.append({**added[0], "content": IMAGE, "id": ids[IMAGE], "special": True})
    model["vocab"] = _numbered(model["vocab"], added)
    document["added_tokens"] = added
    before = source.get_vocab(with_added_tokens=True)
    if IMAGE not in model["vocab"]:
        before.pop(IMAGE, None)
    text = _spell(folder, document, before | ids)
    settings = _optional(folder / "tokenizer_config.json")
    names = _special_names(folder, settings, ids)
    contents = {
        "tokenizer.json": text,
        "tokenizer_config.json": _json(
            _config(settings, added, names, chat_template=chat_template, max_length=max_length)
        ),
        # The vocabulary proper, in one line as the slow tokenizers write it: added tokens have
        # their own file.
        "vocab.json": _json({t: i for t, i in model["vocab"].items() if t not in ids}, indent=None),
        "merges.txt": _merges(folder, model["merges"]),
        "added_tokens.json": _json(dict(sorted(ids.items()))),
        "special_tokens_map.json": _json(_special_map(names)),
    }
    return TokenizerFiles(
        contents={name: content.encode() for name, content in contents.items()},
        im_end_id=ids[END_OF_TURN],
        end_of_text_id=ids[END_OF_TEXT],
        image_id=ids.get(IMAGE),
    )


def _spell_as_qwen2(document: dict[str, Any]) -> None:
    """Give what was read from the slow files the settings of Qwen2's own tokenizer.json.

    The ids are the same without; offsets and the spelling are what its readers are tested on.
    """
    split, _ = document["pre_tokenizer"]["pretokenizers"]
    document["pre_tokenizer"]["pretokenizers"] = [split, dict(_BYTE_LEVEL)]
    document["post_processor"] = dict(_BYTE_LEVEL)
    document["decoder"] = dict(_BYTE_LEVEL)
    model = document["model"]
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    added = {token["content"] for token in document["added_tokens"]}
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}


def _numbered(vocab: Vocabulary, added: Sequence[Token]) -> Vocabulary:
    """Return a vocabulary, by id, with which the added tokens get the ids they have.

    Reading tokenizer.json, the library passes over their ids and numbers them on from the end of
    the vocabulary. Where that gives others (there is a gap), they must be in the vocabulary too.
    """
    outside = [token for token in added if token["content"] not in vocab]
    following = range(len(vocab), len(vocab) + len(outside))
    if [token["id"] for token in outside] != list(following):
        vocab = vocab | {token["content"]: token["id"] for token in added}
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _spell(folder: Path, document: Mapping[str, Any], expected: Vocabulary) -> str:
    """Return tokenizer.json in the library's own spelling.

    Raises CheckpointError unless a tokenizer read from it has the ids that it should.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder}: no tokenizer: {one_line(str(error))}") from error
    found = tokenizer.get_vocab(with_added_tokens=True)
    if found != expected or len(set(found.values())) < len(found):
        raise CheckpointError(f"{folder}: the ids of its added tokens contradict its vocabulary")
    text: str = tokenizer.to_str(pretty=True)
    return f"{text}\n"


def _config(
    settings: Mapping[str, Any],
    added: Sequence[Token],
    names: Sequence[str],
    *,
    chat_template: str,
    max_length: int,
) -> dict[str, Any]:
    decoder = {
        str(token["id"]): {"content": token["content"], **{key: token[key] for key in _FLAGS}}
        for token in added
    }
    side = settings.get("padding_side")
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(names),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,  # Swift's default is to clean up
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "padding_side": side if side in ("left", "right") else "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _special_names(folder: Path, settings: Mapping[str, Any], ids: Vocabulary) -> list[str]:
    """Return the additional special tokens the source names, by its first file that names any."""
    for source in (settings, _optional(folder / "special_tokens_map.json")):
        listed = source.get("additional_special_tokens")
        entries = listed if isinstance(listed, list) else []
        names = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
        known = [name for name in names if isinstance(name, str) and name in ids and name != IMAGE]
        if known:
            return known
    return list(_TURNS)


def _special_map(names: Sequence[str]) -> dict[str, Any]:
    def entry(content: str) -> dict[str, Any]:
        return {"content": content, **{key: False for key in _FLAGS if key != "special"}}

    return {
        "additional_special_tokens": list(names),
        "eos_token": entry(END_OF_TURN),
        "pad_token": entry(END_OF_TEXT),
    }


def _merges(folder: Path, merges: Sequence[tuple[str, str]]) -> str:
    if any(" " in left or " " in right for left, right in merges):
        raise CheckpointError(f"{folder / 'tokenizer.json'} merges spaces: it is not byte-level")
    return "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""])


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _json(value: object, *, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
