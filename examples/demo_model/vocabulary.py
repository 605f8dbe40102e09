"""The demo model's tokenizer and prompt: byte-level BPE in Qwen2's manner.

Knows how text becomes ids and which ids are learnt. Refuses to know about pixels: a picture is
IMAGE_TOKENS places in the sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from dialogues import Turn, batch_dialogues
from scenes import TRAIN_SEEDS, make_scene
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

IMAGE_TOKENS = 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(size: int = 768) -> Tokenizer:
    """Merges learnt from the text of 4,000 training pictures; the special tokens come last."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(TRAIN_SEEDS)
    scenes = [make_scene(TRAIN_SEEDS + i) for i in range(4000)]
    for dialogue in batch_dialogues(scenes, rng):
        for turn in dialogue:
            yield f"user\n{turn.text}"
            yield f"assistant\n{turn.answer}"
    yield from ["system\nYou are a helpful assistant."] * 100


def prompt_segments(turns: list[Turn]) -> list[tuple[str | int, bool]]:
    """(text or picture number, learnt?) in order; text beside a picture is its own segment."""
    segments: list[tuple[str | int, bool]] = []
    pending = SYSTEM
    for turn in turns:
        pending += "<|im_start|>user\n"
        for picture in turn.pictures:
            segments += [(pending, False), (picture, False)]
            pending = "\n"
        pending += f"{turn.text}<|im_end|>\n<|im_start|>assistant\n"
        segments += [(pending, False), (f"{turn.answer}<|im_end|>", True)]
        pending = "\n"
    return segments


def encode(tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[int], list[int]]:
    """(ids, labels, pictures in order); -100 marks what is not learnt.

    Question and answer meet at a special token or a newline that Qwen2's word rule splits at, so
    encoding an answer apart gives the ids that generation would have seen.
    """
    image_id = tokenizer.token_to_id("<image>")
    ids, labels, pictures = [], [], []
    for content, learnt in prompt_segments(turns):
        if isinstance(content, int):
            part = [image_id] * IMAGE_TOKENS
            pictures.append(content)
        else:
            part = tokenizer.encode(content).ids
        ids += part
        labels += part if learnt else [-100] * len(part)
    return ids, labels, pictures


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and its companions, as a Qwen2 checkpoint carries them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    table = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for token in SPECIAL
    }  # fmt: skip
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": table,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"],
        "bos_token": None, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "image_token": "<image>",
        "model_max_length": 1024, "pad_token": "<|endoftext|>", "padding_side": "right",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
