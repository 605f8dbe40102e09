"""A checkpoint folder's tokenizer files to a `tokenizers` backend and the ids that end an answer.

Knows tokenizer.json, the slow form Apple's checkpoints have (vocab.json, merges.txt and
added_tokens.json), and tokenizer_config.json. Executes nothing and refuses to guess: files that
are missing, broken or at odds with each other raise CheckpointError, naming the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fastvlm_mlx.errors import CheckpointError, one_line

# Qwen2's split: https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json, `pre_tokenizer`.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json, or vocab.json and merges.txt, and the added tokens beside them."""
    settings = _read_json(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").exists():
        return _from_vocab_and_merges(folder, settings)
    backend = _from_tokenizer_json(folder / "tokenizer.json")
    _add_missing(backend, _added_tokens(folder, settings), folder)
    return backend


def read_stop_ids(backend: tokenizers.Tokenizer, folder: Path) -> frozenset[int]:
    """Return the end-of-sequence ids of the tokenizer's files and generation_config.json, with
    `<|im_end|>` and `<|endoftext|>` where the vocabulary has them.
    """
    names = set(_END_TOKENS)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = _read_json(folder / file).get("eos_token")
        name = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(name, str):
            names.add(name)
    found = (backend.token_to_id(name) for name in names)
    ids = {token_id for token_id in found if token_id is not None}
    generation = _read_json(folder / "generation_config.json").get("eos_token_id")
    for token_id in generation if isinstance(generation, list) else [generation]:
        if isinstance(token_id, int):
            ids.add(token_id)
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} if there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer: {one_line(str(error))}") from error
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{path} is not a byte-level BPE as Qwen2's is")
    return backend


def _from_vocab_and_merges(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build Qwen2's tokenizer: NFC, its split, byte-level BPE, the added tokens at their ids."""
    vocab = _read_json(folder / "vocab.json")
    if not vocab:
        raise CheckpointError(f"{folder} has neither tokenizer.json nor a filled vocab.json")
    if not all(isinstance(token_id, int) and 0 <= token_id < 2**31 for token_id in vocab.values()):
        raise CheckpointError(f"{folder / 'vocab.json'} holds an id that is none")
    added = _added_tokens(folder, settings)
    vocab |= {token.content: token_id for token_id, token in added.items()}
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=_merges(folder)))
    except Exception as error:  # the library raises bare Exception
        reason = one_line(str(error))
        raise CheckpointError(f"{folder}: vocab.json does not fit merges.txt: {reason}") from error
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added.values()))
    return backend


def _merges(folder: Path) -> list[tuple[str, str]]:
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has vocab.json but no merges.txt") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(f"{path} line {number} is not a pair of tokens")
        merges.append((left, right))
    return merges


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """Return id → added token: added_tokens.json, then tokenizer_config.json, which has flags."""
    added: dict[int, tokenizers.AddedToken] = {}
    file = "added_tokens.json"
    try:
        for content, token_id in _read_json(folder / file).items():
            added[int(token_id)] = tokenizers.AddedToken(content, normalized=False, special=True)
        file = "tokenizer_config.json"
        for token_id, entry in settings.get("added_tokens_decoder", {}).items():
            flags = {key: entry.get(key, False) for key in _FLAGS}
            added[int(token_id)] = tokenizers.AddedToken(entry["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / file} lists an added token that is none") from error
    return dict(sorted(added.items()))


def _add_missing(
    backend: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken], folder: Path
) -> None:
    """Add the tokens that tokenizer.json lacks; raise if its ids disagree with the others'."""
    for token_id, token in added.items():
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: {token.content} is {backend.token_to_id(token.content)} in "
                f"tokenizer.json but {token_id} in the files beside it"
            )
