"""The second half of training: projector and decoder learn to look at a finished tower.

Knows how to ask many questions about one picture in one pass: they share the prompt up to the
picture, and a mask keeps each from seeing the others. Two attention heads are told where to look:
at the shapes that a question points at, then at those that show the answer. The tower is frozen, so
every picture's features are computed once. Refuses to see a held-out picture, as train.py does.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from check_reference import load
from dialogues import batch_dialogues, single_turn
from landmarks import cell_of
from network import hidden_states, joined_embeddings, save_checkpoint, to_input
from PIL import Image
from scenes import TRAIN_SEEDS, Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from train import Texts, held_out_digests, pad, parameter_groups, picture
from vocabulary import IMAGE_TOKENS, encode

Packed = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, labels, positions, question numbers
EASY = {"number": 0.25, "single": 0.25, "groups": 0.7}  # these come up less often
LOOKING = (1, 2)  # decoder layers that are taught: to look at `about`, at `shown_by`
TAUGHT_HEADS = [0, 2]  # one of each key-value head
Step = tuple[Tensor, Packed, Tensor, Texts]


class Pictures(Dataset[tuple[Scene, list[int], np.ndarray]]):
    """Scenes without their image, the cell of each shape, and the pixels."""

    def __init__(self, count: int, first_seed: int, held_out: set[bytes]) -> None:
        self.count, self.first_seed, self.held_out = count, first_seed, held_out

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Scene, list[int], np.ndarray]:
        scene, pixels = picture(self.first_seed + index, self.held_out)
        cells = [cell_of(scene, shape.x, shape.y) for shape in scene.shapes]
        return replace(scene, image=Image.new("RGB", (1, 1))), cells, pixels


class Lessons(Dataset[Step]):
    """Step number i, the same in every run: (picture numbers, packed questions, dialogues)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scenes: list[Scene],
        cells: list[list[int]],
        args: argparse.Namespace,
    ) -> None:
        self.tokenizer, self.scenes, self.cells, self.args = tokenizer, scenes, cells, args
        weights = np.array([EASY.get(scene.layout, 1.0) for scene in scenes])
        self.chances = weights / weights.sum()

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, index: int) -> Step:
        rng = np.random.default_rng([self.args.seed, index, 12])
        chosen = rng.choice(len(self.scenes), self.args.batch, replace=False, p=self.chances)
        scenes = [self.scenes[i] for i in chosen]
        rows, looks = [], []
        for i in range(len(scenes)):
            row, look = self._pack(rng, scenes, i, self.cells[chosen[i]])
            rows.append(row)
            looks.append(look)
        dialogues = [
            d for d in batch_dialogues(scenes, rng) if len(d) > 1 or len(d[0].pictures) != 1
        ]
        dialogues = dialogues or [[single_turn(rng, scenes, 0)]]
        plain = pad([encode(self.tokenizer, d) for d in dialogues])
        width = max(row.shape[1] for row in rows)
        looking = np.zeros((len(LOOKING), len(rows), width, IMAGE_TOKENS), np.float32)
        for i, look in enumerate(looks):
            looking[:, i, : look.shape[1]] = look
        return torch.from_numpy(chosen), _stack(rows), torch.from_numpy(looking), plain

    def _pack(
        self, rng: np.random.Generator, scenes: list[Scene], index: int, cells: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels, positions, question numbers; where to look): the prefix is question 0."""
        parts, looks = [], []
        for number in range(1, self.args.questions + 1):
            turn = single_turn(rng, scenes, index)
            ids, labels, _ = encode(self.tokenizer, [turn])
            shared = len(ids) - ids[::-1].index(self.tokenizer.token_to_id("<image>"))
            row = np.array([ids, labels, range(len(ids)), [number] * len(ids)])
            row[3, :shared] = 0
            look = np.zeros((len(LOOKING), len(ids), IMAGE_TOKENS), np.float32)
            saying = np.flatnonzero(row[1, 1:] != -100)
            for taught, shapes in enumerate((turn.about, turn.shown_by)):
                for shape in shapes:
                    look[taught, saying, cells[shape]] = 1 / len(shapes)
            start = 0 if number == 1 else shared
            parts.append(row[:, start:])
            looks.append(look[:, start:])
        return np.concatenate(parts, axis=1), np.concatenate(looks, axis=1)


def _stack(rows: list[np.ndarray]) -> Packed:
    width = max(row.shape[1] for row in rows)
    packed = np.zeros((4, len(rows), width), np.int64)
    packed[1], packed[3] = -100, -1
    for index, row in enumerate(rows):
        packed[:, index, : row.shape[1]] = row
    ids, labels, positions, questions = torch.from_numpy(packed)
    return ids, labels, positions, questions


def question_mask(questions: Tensor) -> Tensor:
    """[n, 1, length, length]: look back at the shared prefix and at one's own question."""
    same = questions[:, :, None] == questions[:, None, :]
    shared = (questions == 0)[:, None, :]
    return ((same | shared).tril())[:, None]


def losses(model: nn.Module, features: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(answer loss, looking loss, share of answer tokens right)."""
    chosen, (ids, labels, positions, questions), looking, plain = step
    tokens = model.model.multi_modal_projector(features[chosen])
    mask = torch.zeros(questions.shape[0], 1, questions.shape[1], questions.shape[1])
    output = model.model.language_model(
        inputs_embeds=joined_embeddings(model, tokens, ids, torch.arange(len(ids))),
        position_ids=positions,
        attention_mask=mask.masked_fill(~question_mask(questions), -1e9),
        output_attentions=True,
        use_cache=False,
    )
    first = int((ids[0] == model.config.image_token_index).nonzero()[0])
    span = slice(first, first + IMAGE_TOKENS)
    heads = torch.stack([output.attentions[layer][:, TAUGHT_HEADS, :, span] for layer in LOOKING])
    look = -(looking * torch.log(heads + 1e-6).mean(2)).sum() / looking.sum().clamp(min=1)
    learnt = labels[:, 1:] != -100
    states, targets = [output.last_hidden_state[:, :-1][learnt]], [labels[:, 1:][learnt]]
    ids, labels, slots = plain
    learnt = labels[:, 1:] != -100
    states.append(hidden_states(model, tokens, ids, slots)[:, :-1][learnt])
    targets.append(labels[:, 1:][learnt])
    logits, target = model.lm_head(torch.cat(states)), torch.cat(targets)
    right = (logits.argmax(-1) == target).float().mean()
    return functional.cross_entropy(logits, target), look, right


@torch.inference_mode()
def tower_features(
    model: nn.Module, pictures: Pictures
) -> tuple[list[Scene], list[list[int]], Tensor]:
    scenes, cells, features = [], [], []
    loader = DataLoader(pictures, 32, num_workers=1, collate_fn=lambda items: items)
    for items in loader:
        scenes += [scene for scene, _, _ in items]
        cells += [places for _, places, _ in items]
        pixels = torch.from_numpy(np.stack([pixels for *_, pixels in items]))
        seen = model.model.vision_tower(to_input(pixels)).last_hidden_state
        features.append(seen.flatten(2).transpose(1, 2).contiguous())
    return scenes, cells, torch.cat(features)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.time()
    tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    model = load(args.start, torch.float32).to(memory_format=torch.channels_last)
    pictures = Pictures(args.pictures, 20 * TRAIN_SEEDS, held_out_digests())
    scenes, cells, features = tower_features(model, pictures)
    model.model.language_model.set_attn_implementation("eager")  # which returns its attention
    features = features.clone()
    print(f"features of {len(scenes)} pictures, {time.time() - started:.0f} s", flush=True)
    learners = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    optimizer = torch.optim.AdamW(parameter_groups(learners, 0.05), args.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.steps, pct_start=0.05, final_div_factor=100
    )
    loader = DataLoader(
        Lessons(tokenizer, scenes, cells, args), None, num_workers=1, prefetch_factor=8
    )
    recent: list[list[float]] = []
    for step, lesson in enumerate(loader, 1):
        loss, look, right = losses(model, features, lesson)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.looking * look).backward()
        nn.utils.clip_grad_norm_(learners.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append([loss.item(), look.item(), right.item()])
        if step % 100 == 0 or step == args.steps:
            means = np.mean(recent, axis=0)
            print(
                f"step {step} loss {means[0]:.4f} looking {means[1]:.3f} tokens {means[2]:.4f} "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
            recent.clear()
            save_checkpoint(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--questions", type=int, default=6, help="a picture and step")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--looking", type=float, default=0.6, help="weight of where to look")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
