"""A small tokenizer of Qwen2's kind, trained here, in both forms that checkpoints store."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2_SPLIT = (  # typed from Qwen2's tokenizer.json, not imported from the code under test
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = """You are a helpful assistant. What is on the desk? system user assistant image
Describe the image. There are three red circles and a small blue square to the left of 1,234.
The mug is blue; the book, which she'd left there, isn't. I'll say what's written: "STOP" 2026!
Wie viele Äpfel liegen übrigens auf dem Tisch? C'était déjà l'été à Orléans, où l'on a mangé.
Привет, мир! Как дела? 你好世界，这是什么？ 日本語のテキスト。 안녕하세요 세계 مرحبا بالعالم
😀 😃 👩‍👩‍👧‍👦 🇩🇪 naïve café — “quoted” … x² ≤ ½ ∑∞   two  spaces\tand tabs
"""


def train() -> Tokenizer:
    """Train with a coarser split than Qwen2's, then put Qwen2's in.

    So the vocabulary holds "02" and " she'd", which a tokenizer that splits wrongly would use.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"\s?\S+|\s+"), behavior="isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(QWEN2_SPLIT), behavior="isolated"), to_bytes])
    tokenizer.add_special_tokens([AddedToken(c, normalized=False, special=True) for c in CONTROLS])
    return tokenizer


def write_tokenizer_json(folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, as transformers and MLX converters do."""
    tokenizer = train()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return tokenizer


def write_slow_files(folder: Path) -> Tokenizer:
    """Write the files of Apple's checkpoints: no tokenizer.json."""
    tokenizer = train()
    tokenizer.model.save(str(folder))
    added = {control: tokenizer.token_to_id(control) for control in CONTROLS}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    entries = {
        str(token_id): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for content, token_id in added.items()
    }
    settings = {"added_tokens_decoder": entries, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer
