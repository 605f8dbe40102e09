"""What mlx-vlm computes with the folders that `fastvlm convert` and `fastvlm quantize` write.

    python -m venv vlm && vlm/bin/pip install mlx-vlm==0.7.10 "mlx[cpu]==0.32.4"
    vlm/bin/python tests/parity/make_artifact_reference.py --fastvlm .venv/bin/fastvlm

A quarter of an hour on two cores, as long again for each of two full-size pictures, which
--no-full-size leaves out; 3 GB, 2 GB of disk.

The weights are frozen: a real-size tower with a tiny decoder, and the trained demo model. Each
folder of `artifact_cases.py` is written in a temporary folder, by the command line given or by

    python -m mlx_vlm convert --hf-path SRC --mlx-path DST [-q --q-bits 8|4]

and loaded by mlx-vlm's own `load`, strict as it is. `artifacts.json` gets digests of the weights,
greedy ids with margins, and what mlx-vlm's processor makes of texts and pictures; `artifacts.npz`
projected features and logits, and features of some tokens of a full-size picture. Nothing of
fastvlm_mlx is imported in this process.

mlx-vlm's tower sizes are constants of a class: `vision_config` has no say (the error it then stops
with is kept in `artifacts.json`). For the demo model the constants are set from its config.json;
mlx-vlm's code is otherwise as installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import artifact_cases as cases
import frozen
import mlx.core as mx
import numpy as np
from make_mlx_vlm_reference import inventory
from mlx_vlm import generate, load
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.models.fastvlm.config import VisionConfig
from mlx_vlm.prompt_utils import apply_chat_template
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent
Arrays = dict[str, NDArray[Any]]
CONSTANTS = (
    "layers", "embed_dims", "mlp_ratios", "downsamples", "token_mixers", "repmixer_kernel_size",
    "down_patch_size", "down_stride", "cls_ratio",
)  # fmt: skip


def build(artifact: cases.Artifact, source: Path, target: Path, fastvlm: str | None) -> None:
    """Write one folder, by `fastvlm` if it is given and by mlx-vlm if not."""
    if fastvlm is not None:
        subprocess.run([fastvlm, *artifact.command(source, target)], check=True)
        return
    command = [sys.executable, "-m", "mlx_vlm", "convert", "--hf-path", str(source)]
    subprocess.run([*command, "--mlx-path", str(target), *artifact.arguments], check=True)


def set_constants(folder: Path) -> None:
    """Give mlx-vlm's tower the sizes of a folder's vision_config, which it does not read."""
    sizes = json.loads((folder / "config.json").read_text())["vision_config"]
    for name in CONSTANTS:
        setattr(VisionConfig, name, sizes[name])
    shapes = sizes["pos_embs_shapes"]
    VisionConfig.pos_embs_shapes = [None if shape is None else tuple(shape) for shape in shapes]


def scaled(pixels: NDArray[np.uint8]) -> mx.array:
    """Return [1, 3, height, width] as mlx-vlm's processor would: a 255th of each value."""
    whole = pixels.astype(np.float32) / np.float32(255)
    return mx.array(whole.transpose(2, 0, 1)[None])


def rendered(model: Any, processor: Any, question: str, pictures: int) -> tuple[str, list[int]]:
    """Return the prompt's text and ids by mlx-vlm's template and processor; a picture is -200."""
    text = apply_chat_template(processor, model.config, question, num_images=pictures)
    return text, processor(text=text)["input_ids"][0].tolist()


def ask(model: Any, ids: list[int], pixels: mx.array) -> tuple[dict[str, Any], Arrays]:
    """Return greedy ids with margins, and features [tokens, hidden] and logits along the way."""
    every = mx.array([ids])
    embeddings = model.get_input_embeddings(every, pixels).inputs_embeds
    slot, tokens = ids.index(-200), embeddings.shape[1] - len(ids) + 1
    cache = make_prompt_cache(model.language_model)
    out = model.language_model(every, inputs_embeds=embeddings, cache=cache)
    chosen: list[int] = []
    margins: list[float] = []
    logits: list[NDArray[np.float32]] = []
    while True:
        logits.append(np.array(out.logits[0, -1].astype(mx.float32)))
        first, second = np.sort(logits[-1])[:-3:-1]
        chosen.append(int(logits[-1].argmax()))
        margins.append(round(float(first - second), 6))
        if len(chosen) == cases.STEPS:
            break
        out = model.language_model(mx.array([chosen[-1:]]), cache=cache)
    features = np.array(embeddings[0, slot : slot + tokens].astype(mx.float32))
    arrays = {
        "features": features,
        "last": logits[0],
        "logits": np.stack(logits)[:, :: cases.COLUMN_STRIDE],
    }
    return {"ids": chosen, "margins": margins}, arrays


def answer(model: Any, processor: Any, text: str, pixels: NDArray[np.uint8], file: Path) -> str:
    """Return what mlx-vlm's own `generate` says about a picture in a file."""
    Image.fromarray(pixels).save(file)
    said = generate(model, processor, text, image=str(file), max_tokens=32, temperature=0.0)
    return str(said.text)


def measure(
    artifact: cases.Artifact, folder: Path, prompt: list[int] | None
) -> tuple[dict[str, Any], Arrays, list[int]]:
    """Load a folder by mlx-vlm and return what it says, its arrays and its prompt's ids.

    Apple's small files have no template, so mlx-vlm's own convert leaves none: `prompt` is given.
    """
    model, processor = load(str(folder))
    facts: dict[str, Any] = {**cases.split_digests(inventory(folder)), "questions": {}}
    arrays: Arrays = {}
    ids = prompt or []
    for picture, question in cases.questions(artifact.source).items():
        pixels = cases.pixels(artifact.source, picture)
        text = ""
        if prompt is None:
            text, ids = rendered(model, processor, question, 1)
        facts["questions"][picture], found = ask(model, ids, scaled(pixels))
        if artifact.source == "demo":
            said = answer(model, processor, text, pixels, folder / "picture.png")
            facts["questions"][picture]["answer"] = said
        arrays |= {f"{picture}.{name}": values for name, values in found.items()}
    return facts, arrays, ids


def processing(folder: Path) -> dict[str, Any]:
    """Return what mlx-vlm's processor makes of texts and pictures with our tokenizer and template.

    A picture's digest is of the uint8 array that its values are a 255th of, bit for bit.
    """
    model, processor = load(str(folder), lazy=True)
    prompts, prepared = [], []
    for question, pictures in cases.PROMPTS:
        text, ids = rendered(model, processor, question, pictures)
        prompts.append({"question": question, "pictures": pictures, "text": text, "ids": ids})
    for height, width, seed in cases.PREPARED:
        values = processor.image_processor(images=[full_picture(height, width, seed)])
        given = np.asarray(values["pixel_values"])[0].transpose(1, 2, 0)
        whole = np.rint(given * 255).astype(np.uint8)
        exact = bool((whole.astype(np.float32) / np.float32(255) == given).all())
        row = {"shape": list(given.shape), "a 255th": exact, "crc32": zlib.crc32(whole.tobytes())}
        prepared.append({"picture": [height, width, seed], **row})
    return {"prompts": prompts, "prepared": prepared}


def small_files(folder: Path) -> dict[str, Any]:
    """Return what mlx-vlm's convert wrote beside the weights; the vocabulary is the source's."""
    found = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "tokenizer", "tokenizer_config")
    }
    for name in ("vocab", "merges"):
        del found["tokenizer"]["model"][name]
    return found


def full_picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(frozen.picture(height, width, seed))


def full_size(folder: Path) -> NDArray[np.float32]:
    """Return some tokens' features of the full-size picture, prepared by mlx-vlm's processor."""
    model, processor = load(str(folder))
    values = processor.image_processor(images=[full_picture(*cases.FULL_SIZE)])["pixel_values"]
    embeddings = model.get_input_embeddings(mx.array([[-200]]), mx.array(np.asarray(values)))
    every = np.array(embeddings.inputs_embeds[0].astype(mx.float32))
    return every[:: cases.TOKEN_STRIDE]


def refusal(folder: Path) -> str:
    """Return the error with which mlx-vlm refuses a tower of other sizes than its constants."""
    try:
        load(str(folder), lazy=True)
    except ValueError as error:
        return re.sub(r"\s+", " ", str(error))[:160]
    raise SystemExit("mlx-vlm has learnt to read vision_config: leave the constants alone")


def one_line_a_list(report: dict[str, Any]) -> str:
    """Return JSON indented down to lists of numbers, which stay on a line."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    return re.sub(r"\[[\s\d.,-]+\]", lambda found: re.sub(r"\s+", "", found[0]), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fastvlm", required=True, help="the fastvlm command to test")
    parser.add_argument("--no-full-size", action="store_true", help="keep the stored ones")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "mlx_vlm": version("mlx-vlm"),
        "mlx": version("mlx"),
        "artifacts": {},
    }
    arrays: Arrays = {}
    if options.no_full_size:
        with np.load(HERE / "artifacts.npz") as old:
            arrays = {name: old[name] for name in old.files if name.startswith("full size.")}
    with tempfile.TemporaryDirectory() as temporary:
        sources: dict[str, Path] = {}
        ids: list[int] = []
        # The demo model last: its constants would break the real tower.
        in_order = sorted(cases.ARTIFACTS.items(), key=lambda item: item[1].source == "demo")
        for name, artifact in in_order:
            if artifact.source not in sources:
                place = Path(temporary) / artifact.source
                sources[artifact.source] = cases.write_source(place, artifact.source)
            ours = name in cases.OURS
            folder = Path(temporary) / "artifact"
            build(artifact, sources[artifact.source], folder, options.fastvlm if ours else None)
            if artifact.source == "demo" and "demo" not in report:
                report["demo"] = {"constants": list(CONSTANTS), "refused": refusal(folder)}
            if artifact.source == "demo":
                set_constants(folder)
            facts, found, prompt = measure(artifact, folder, None if ours else ids)
            if name == "bfloat16":
                ids = prompt
                report |= processing(folder)
            if not ours:
                facts |= small_files(folder)
            if name in ("float32", "bfloat16") and not options.no_full_size:
                arrays[f"full size.{name}"] = full_size(folder)
            report["artifacts"][name] = facts
            arrays |= {f"{name}.{key}": values for key, values in found.items()}
            shutil.rmtree(folder)
    (HERE / "artifacts.json").write_text(one_line_a_list(report), encoding="utf-8")
    np.savez_compressed(HERE / "artifacts.npz", **arrays)


if __name__ == "__main__":
    main()
