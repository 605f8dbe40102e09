"""Models for a terminal's tests, made from the demo model: slow ones that answer as it does, ones
that never stop by themselves, and ones that write what a test wants to see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.cli.command import copy_of_demo, edit_json

PICTURES = Path(__file__).parents[2] / "examples" / "images"
_LAYER = "model.language_model.layers."
_EMBEDDING = "model.language_model.embed_tokens.weight"
_ADDS = ("o_proj.weight", "down_proj.weight")
_STOPS = (608, 610)  # <|endoftext|> and <|im_end|>
_VOCABULARY = 608  # without the special tokens, whose numbers follow from it
_BYTES = 256


def slow_model(folder: Path, *, layers: int, positions: int = 1024, stops: bool = True) -> Path:
    """A demo model that answers as ever, and takes long: layers that add nothing come after.

    Without `stops` it goes on after its answer, with words that depend on the conversation.
    """
    copy_of_demo(folder)
    weights = load_file(folder / "model.safetensors")
    _add_layers(folder, weights, layers)
    if not stops:
        head = weights[_EMBEDDING].copy()
        head[list(_STOPS)] = 0
        weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors")
    edit_json(
        folder / "config.json",
        tie_word_embeddings=stops,
        text_config__tie_word_embeddings=stops,
        text_config__max_position_embeddings=positions,
    )
    return folder


def scripted_model(
    folder: Path, pieces: Sequence[str], *, again: bool = False, layers: int = 0
) -> Path:
    """A model that answers everything with these texts, one a token, and then stops, or begins
    `again`. Its vocabulary is the bytes and they; each token's output weights name the next one.

    No piece may come twice; there may be 350.
    """
    copy_of_demo(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    letters = _byte_letters()
    spelled = ["".join(letters[byte] for byte in piece.encode()) for piece in pieces]
    unused = [letters[0] * number for number in range(2, 2 + _VOCABULARY - _BYTES - len(pieces))]
    words = [letters[byte] for byte in range(_BYTES)] + spelled + unused
    assert len(set(words)) == _VOCABULARY
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    weights = load_file(folder / "model.safetensors")
    _add_layers(folder, weights, layers)
    for name in weights:
        if name.startswith(_LAYER) and name.endswith(_ADDS):
            weights[name] = np.zeros_like(weights[name])
    rows = np.random.default_rng(0).normal(size=weights[_EMBEDDING].shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    head = np.zeros_like(rows)
    # The template ends with a line's end, the byte 10: what follows it comes first.
    chain = [10, *range(_BYTES, _BYTES + len(pieces))]
    for before, after in zip(chain, [*chain[1:], _BYTES if again else _STOPS[1]], strict=True):
        head[after] += rows[before]
    weights[_EMBEDDING] = rows.astype(np.float16)
    weights["lm_head.weight"] = head.astype(np.float16)
    weights["model.language_model.norm.weight"][:] = 1
    save_file(weights, folder / "model.safetensors")
    edit_json(
        folder / "config.json",
        tie_word_embeddings=False,
        text_config__tie_word_embeddings=False,
        text_config__max_position_embeddings=8192,
    )
    return folder


def _add_layers(folder: Path, weights: dict[str, np.ndarray], count: int) -> None:
    last = {name: value for name, value in weights.items() if name.startswith(f"{_LAYER}2.")}
    for number in range(3, 3 + count):
        for name, value in last.items():
            weights[name.replace(f"{_LAYER}2.", f"{_LAYER}{number}.")] = (
                np.zeros_like(value) if name.endswith(_ADDS) else value
            )
    edit_json(
        folder / "config.json",
        text_config__num_hidden_layers=3 + count,
        text_config__layer_types=["full_attention"] * (3 + count),
    )


def _byte_letters() -> dict[int, str]:
    """How byte-level BPE (GPT-2's) spells each byte: printable ones as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
