"""transformers' own FastVlmForConditionalGeneration on the demo checkpoint, in float32.

    pip install torch==2.15.0 timm==1.0.31 transformers==5.23.0 pillow
    python tests/parity/make_demo_reference.py [FOLDER]       # under a minute; default: the demo

For every case of `demo_cases.py`: the prompt's segments, the logits at its last position, 32
greedy ids with nothing stopping them (`ids`; after the answer mostly <|im_end|>), 32 from which
stop ids are barred (`barred_ids`: every one a real word piece), the margin (top-1 minus top-2) at
each step, and three beams' ids. For every picture: what the tower and the projector give. Of a
group's questions the one with the widest smallest margin is kept, and MARGIN is asked of it, so
that no id hangs on rounding. Writes `demo.json` and `demo.npz`, with the sha256 of the weights.
Imports none of fastvlm_mlx. Last of all, transformers must load `source_folders.py`'s fused folder
and agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo_cases
import numpy as np
import source_folders
import sources
import timm
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import FastVlmForConditionalGeneration

HERE = Path(__file__).parent
TOKENS = 32
MARGIN = 0.005  # 50 times the logits' tolerance
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def load(folder: Path) -> FastVlmForConditionalGeneration:
    """Load in float32; every tensor must be used and every weight found."""
    model, info = FastVlmForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"the checkpoint does not load cleanly: {problems}")
    return model.eval()


def padded(pixels: np.ndarray, side: int) -> np.ndarray:
    """Apple's pad: a black square, floor of half the difference, PIL's bicubic, uint8."""
    height, width = pixels.shape[:2]
    square = Image.new("RGB", (max(height, width),) * 2)
    square.paste(
        Image.fromarray(pixels),
        ((max(height, width) - width) // 2, (max(height, width) - height) // 2),
    )
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def prompt_segments(count: int, question: str) -> list[str | None]:
    """Text of the prompt, None where a picture goes; each text is tokenized apart."""
    head, tail = f"{SYSTEM}<|im_start|>user\n", f"{question}<|im_end|>\n<|im_start|>assistant\n"
    if count == 0:
        return [head + tail]
    return [head, *[None, "\n"] * (count - 1), None, "\n" + tail]


class Reference:
    """The model, its tokenizer and the pictures as it sees them."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.stop_ids = self.model.generation_config.eos_token_id
        self.tokens = self.model.config.image_seq_length
        self.side = 64 * int(self.tokens**0.5)
        self.pixels = {
            name: padded(demo_cases.picture(name), self.side) for name in demo_cases.PICTURES
        }

    def inputs(self, pictures: Sequence[str], question: str) -> tuple[list[Any], dict[str, Any]]:
        """Return the segments as ids (None for a picture) and transformers' inputs."""
        segments = [
            text if text is None else self.tokenizer.encode(text, add_special_tokens=False).ids
            for text in prompt_segments(len(pictures), question)
        ]
        image = [self.model.config.image_token_id] * self.tokens
        ids = [i for segment in segments for i in (image if segment is None else segment)]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if pictures:
            stack = np.stack([self.pixels[name] for name in pictures])
            inputs["pixel_values"] = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255
        return segments, inputs

    @torch.inference_mode()
    def greedy(
        self, inputs: dict[str, Any], count: int, barred: Sequence[int] = ()
    ) -> tuple[np.ndarray, list[int], list[float]]:
        """Return the first logits, `count` ids, none of them barred, and the margin of each."""
        out = self.model(**inputs, use_cache=True)
        first, ids, margins = out.logits[0, -1].numpy(), [], []
        while True:
            logits = out.logits[0, -1].clone()
            logits[list(barred)] = -torch.inf
            best = logits.topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
            if len(ids) == count:
                return first, ids, margins
            step = torch.tensor([ids[-1:]])
            out = self.model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)

    @torch.inference_mode()
    def beams(self, inputs: dict[str, Any]) -> list[int]:
        """Ids of `generate(num_beams=3)` with the checkpoint's own stop ids, the stop included."""
        out = self.model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            num_beams=3,
            max_new_tokens=TOKENS,
            do_sample=False,
            early_stopping=False,
            length_penalty=1.0,
        )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def group(self, group: demo_cases.Group) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
        """Return (what the JSON holds, first logits) of each case, for the clearest question."""
        tried = []
        for question in group.questions:
            inputs = {n: self.inputs(names, question)[1] for n, names in group.cases.items()}
            found = {
                name: (self.greedy(each, TOKENS), self.greedy(each, TOKENS, self.stop_ids))
                for name, each in inputs.items()
            }
            margins = [min(run[2]) for runs in found.values() for run in runs]
            tried.append((min(margins), question, found))
        smallest, question, found = max(tried, key=lambda row: row[0])
        cases = {}
        for name, ((logits, ids, margins), (_, barred, barred_margins)) in found.items():
            segments, inputs = self.inputs(group.cases[name], question)
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            on = self.tokenizer.decode(barred, skip_special_tokens=False)
            print(f"{name}: {question!r} margin {min(margins):.3f}: {text!r}")
            print(f"    no stop: margin {min(barred_margins):.3f}: {on!r}")
            case = {
                "pictures": group.cases[name],
                "question": question,
                "segments": segments,
                "ids": ids,
                "margins": [round(margin, 4) for margin in margins],
                "barred_ids": barred,
                "barred_margins": [round(margin, 4) for margin in barred_margins],
                "beams": self.beams(inputs),
                "text": text,
            }
            cases[name] = case, logits
        if smallest < MARGIN:
            raise SystemExit(f"{list(cases)}: no question has a margin of {MARGIN} at every step")
        return cases

    @torch.inference_mode()
    def features(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what the tower [tokens, channels] and the projector [tokens, hidden] give."""
        pixels = torch.from_numpy(self.pixels[name].copy()).permute(2, 0, 1)[None].float() / 255
        out = self.model.get_image_features(pixels, return_dict=True)
        return out.last_hidden_state[0].flatten(1).T.numpy(), out.pooler_output[0].numpy()


def fused_difference(folder: Path, reference: Reference, cases: dict[str, Any]) -> float:
    """Return the largest difference of logits when transformers loads the fused folder instead."""
    with tempfile.TemporaryDirectory() as temporary:
        fused = Path(temporary) / "fused"
        source_folders.write_fast_vlm(fused, sources.read_source(folder).fused())
        other = Reference(fused)
        worst = 0.0
        for case in cases.values():
            _, inputs = reference.inputs(case["pictures"], case["question"])
            ours, theirs = (model.greedy(inputs, 1)[0] for model in (other, reference))
            worst = max(worst, float(np.abs(ours - theirs).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    demo = HERE.parents[1] / "fastvlm_mlx" / "demo"
    parser.add_argument("folder", type=Path, nargs="?", default=demo)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)  # small matrices: threads cost more than they give
    reference = Reference(folder)
    arrays: dict[str, np.ndarray] = {}
    cases: dict[str, Any] = {}
    for group in demo_cases.GROUPS:
        for name, (case, logits) in reference.group(group).items():
            cases[name], arrays[f"{name}.logits"] = case, logits
    digests = {}
    for name, pixels in reference.pixels.items():
        arrays[f"{name}.tower"], arrays[f"{name}.projected"] = reference.features(name)
        digests[name] = hashlib.sha256(pixels.tobytes()).hexdigest()
    for one, other in (("one image", "other image"), ("two images", "two images swapped")):
        if cases[one]["ids"] == cases[other]["ids"]:
            raise SystemExit(f"{one} and {other}: other pictures, the same ids")
    info = {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "versions": {m.__name__: m.__version__ for m in (torch, timm, transformers)},
        "fused_folder_logit_difference": fused_difference(folder, reference, cases),
        "padded_pixels_sha256": digests,
        "stop_ids": reference.stop_ids,
        "cases": cases,
    }
    np.savez_compressed(HERE / "demo.npz", **arrays)
    (HERE / "demo.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n")
    print(f"fused folder: {info['fused_folder_logit_difference']:.1e}")


if __name__ == "__main__":
    main()
