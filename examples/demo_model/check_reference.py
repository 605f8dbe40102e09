"""The same examination answered by transformers, from the stored checkpoint.

Knows torch. Refuses to generate: a greedy answer is exactly right when every token of the right
answer is the likeliest one given those before it, so one pass over question and answer tells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from dialogues import Turn, batch_dialogues
from held_out import examination, score, table
from network import hidden_states, to_input
from scenes import held_out_scenes, square_pixels
from tokenizers import Tokenizer
from torch import nn
from transformers import FastVlmForConditionalGeneration
from vocabulary import encode

WRONG = "(not the right answer)"


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    model, info = FastVlmForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"the checkpoint does not load cleanly: {problems}")
    return model.eval()


@torch.inference_mode()
def features_of(model: nn.Module, pixels: np.ndarray) -> torch.Tensor:
    parts = [
        model.get_image_features(to_input(torch.from_numpy(part)).to(model.dtype))
        for part in np.array_split(pixels, -(-len(pixels) // 25))
    ]
    return torch.cat([part.pooler_output for part in parts])


@torch.inference_mode()
def all_right(
    model: nn.Module, tokenizer: Tokenizer, features: torch.Tensor, dialogues: list[list[Turn]]
) -> list[bool]:
    """Whether every answer of the dialogue is the greedy one."""
    verdicts = []
    for dialogue in dialogues:
        ids, labels, pictures = encode(tokenizer, dialogue)
        slots = torch.tensor(pictures, dtype=torch.long)
        states = hidden_states(model, features, torch.tensor([ids]), slots)[0, :-1]
        targets = torch.tensor(labels[1:])
        learnt = targets != -100
        verdicts.append(bool((model.lm_head(states[learnt]).argmax(-1) == targets[learnt]).all()))
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    model = load(args.folder, getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    papers = examination(args.pictures)
    pixels = np.stack([square_pixels(paper.image) for paper in papers])
    features, blank = features_of(model, pixels), features_of(model, np.zeros_like(pixels[:1]))
    asked = [(i, q) for i, paper in enumerate(papers) for q in paper.questions]
    answers = []
    for seen, slot in ((features, None), (blank, 0)):
        dialogues = [[Turn((i if slot is None else slot,), q.text, q.answer)] for i, q in asked]
        verdicts = all_right(model, tokenizer, seen, dialogues)
        answers.append(
            [q.answer if ok else WRONG for ok, (_, q) in zip(verdicts, asked, strict=True)]
        )
    print(table(score(papers, *answers), f"torch {args.dtype}"))
    scenes = [scene for _, scene in held_out_scenes(args.pictures)]
    dialogues = batch_dialogues(scenes, np.random.default_rng(5))
    groups = {
        "chats, whole": [d for d in dialogues if len(d) > 1],
        "two pictures": [d for d in dialogues if len(d[0].pictures) == 2],
        "plain talk": [d for d in dialogues if not d[0].pictures],
    }
    for name, group in groups.items():
        share = np.mean(all_right(model, tokenizer, features, group))
        print(f"{name:<16}{len(group):>7}{share:>9.1%}")


if __name__ == "__main__":
    main()
