"""Train the demo model from scratch and write its checkpoint.

Knows the schedule. Refuses to see a held-out picture: a training picture whose pixels equal one
of the held-out pictures is replaced. Everything follows from --seed: the one command in README.md
makes the model again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from dialogues import batch_dialogues
from landmarks import CELLS, LandmarkHeads, landmarks
from network import build, hidden_states, save_checkpoint, to_input
from scenes import TRAIN_SEEDS, Scene, held_out_scenes, make_scene, pixel_digest, square_pixels
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import FastVlmForConditionalGeneration
from vocabulary import encode, train_tokenizer

Texts = tuple[Tensor, Tensor, Tensor]  # ids, labels, the picture of each image slot in order
Batch = tuple[Tensor, list[Texts], tuple[Tensor, Tensor]]  # pixels, short and long rows, landmarks
HELD_OUT = 500


class Batches(Dataset[Batch]):
    """Batch number i, the same in every run."""

    def __init__(
        self, tokenizer: Tokenizer, args: argparse.Namespace, held_out: set[bytes]
    ) -> None:
        self.tokenizer, self.held_out = tokenizer, held_out
        self.batch, self.steps, self.first = args.batch, args.steps, TRAIN_SEEDS * args.seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        first = self.first + index * self.batch
        pictures = [picture(first + i, self.held_out) for i in range(self.batch)]
        rng = np.random.default_rng([first, 11])
        rows = [encode(self.tokenizer, d) for d in batch_dialogues([s for s, _ in pictures], rng)]
        rows.sort(key=lambda row: len(row[0]))
        cut = len(rows) * 3 // 4
        pixels = torch.from_numpy(np.stack([pixels for _, pixels in pictures]))
        marks = landmarks([scene for scene, _ in pictures])
        return pixels, [pad(rows[:cut]), pad(rows[cut:])], marks


def picture(seed: int, held_out: set[bytes]) -> tuple[Scene, np.ndarray]:
    """The scene of a training seed and its pixels; another seed's if they are held out."""
    while True:
        scene = make_scene(seed)
        pixels = square_pixels(scene.image)
        if pixel_digest(pixels) not in held_out:
            return scene, pixels
        seed += 1_000_000_000


def held_out_digests() -> set[bytes]:
    return {pixel_digest(square_pixels(s.image)) for _, s in held_out_scenes(HELD_OUT)}


def pad(rows: list[tuple[list[int], list[int], list[int]]]) -> Texts:
    """Rows of one length; what follows a row's end is never learnt and nothing looks back at it."""
    ids = np.zeros((len(rows), max(len(row[0]) for row in rows)), np.int64)
    labels = np.full_like(ids, -100)
    for row, (row_ids, row_labels, _) in enumerate(rows):
        ids[row, : len(row_ids)], labels[row, : len(row_ids)] = row_ids, row_labels
    slots = np.array([picture for row in rows for picture in row[2]], np.int64)
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(slots)


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only: not for biases, norms and layer scales."""
    vectors = {n for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".gamma")}
    matrices = [p for n, p in model.named_parameters() if n not in vectors]
    others = [p for n, p in model.named_parameters() if n in vectors]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def losses(model: nn.Module, heads: nn.ModuleList, batch: Batch) -> tuple[Tensor, ...]:
    """(loss, landmark loss, answer tokens right, digits right); the head runs on answers only."""
    pixels, parts, marks = batch
    seen = model.get_image_features(to_input(pixels))
    states, targets = [], []
    for ids, labels, slots in parts:
        learnt = labels[:, 1:] != -100
        states.append(hidden_states(model, seen.pooler_output, ids, slots)[:, :-1][learnt])
        targets.append(labels[:, 1:][learnt])
    logits, target = model.lm_head(torch.cat(states)), torch.cat(targets)
    tokens = seen.pooler_output.transpose(1, 2).unflatten(2, (CELLS, CELLS))
    on_tower, _ = heads[0](seen.last_hidden_state, *marks)
    on_tokens, digits = heads[1](tokens, *marks)
    right = (logits.argmax(-1) == target).float().mean()
    return functional.cross_entropy(logits, target), on_tower + on_tokens, right, digits


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.time()
    tokenizer = train_tokenizer()
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    held_out = held_out_digests()
    model = build(tokenizer)
    if args.start:
        old = FastVlmForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        model.load_state_dict(old.state_dict())
    model.train()
    widths = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    heads = nn.ModuleList([LandmarkHeads(width) for width in widths])
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{tokenizer.get_vocab_size()} tokens",
        flush=True,
    )
    learners = nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(parameter_groups(learners, 0.05), args.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.steps, pct_start=0.1, final_div_factor=100
    )
    data = Batches(tokenizer, args, held_out)
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)
    recent: list[list[float]] = []
    for step, batch in enumerate(loader, 1):
        loss, landmark, *shares = losses(model, heads, batch)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.landmarks * landmark).backward()
        nn.utils.clip_grad_norm_(learners.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        recent.append([value.item() for value in (loss, landmark, *shares)])
        if step % 50 == 0 or step == args.steps:
            loss, landmark, tokens, digits = np.nanmean(recent, axis=0)
            print(
                f"step {step} loss {loss:.4f} landmarks {landmark:.3f} tokens {tokens:.4f} "
                f"digits {digits:.3f} {time.time() - started:.0f} s",
                flush=True,
            )
            recent.clear()
        if step % 50 == 0 or step == args.steps:
            save_checkpoint(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--landmarks", type=float, default=0.5, help="weight of the extra lessons")
    parser.add_argument("--seed", type=int, default=1, help="also picks the training pictures")
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
