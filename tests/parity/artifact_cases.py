"""Which artifacts mlx-vlm and this engine both load, from which weights, and what they are asked.

Knows neither mlx-vlm nor fastvlm_mlx: `make_artifact_reference.py` and `test_artifacts.py` both
read it, so they build the same folders and ask about the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import frozen
import numpy as np
import source_folders
from demo_cases import picture as demo_picture
from numpy.typing import NDArray
from sources import Source, frozen_source, read_source

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "fastvlm_mlx" / "demo"

STEPS = 16
"""Greedy ids a question."""
COLUMN_STRIDE = 16
"""Of the logits along an answer, every so many columns are kept."""
TOKEN_STRIDE = 17
"""Of a full-size picture's tokens, every so many are kept; prime to the 16 of a row."""

Kind = Literal["random", "untied", "demo"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder made from one of the sources by a command line, and the dtype of its floats."""

    source: Kind
    arguments: tuple[str, ...]
    dtype: str = "bfloat16"

    def command(self, source: Path, target: Path) -> tuple[str, ...]:
        """Return the arguments of `fastvlm` (or of `mlx_vlm`) with the folders in their place."""
        name, *options = self.arguments
        return (name, str(source), str(target), *options)


_BF16 = ("--dtype", "bfloat16")
_F32 = ("--dtype", "float32")
_UNIFORM = ("quantize", "--recipe", "uniform", *_BF16)
_UNIFORM_F32 = ("quantize", "--recipe", "uniform", *_F32)

# By `fastvlm`. What is packed how is spelled out, but for `balanced`: where its table changes, the
# reference must be made again. An embedding of 8 bits is affine, so modes are mixed in a folder.
# Folders with packed weights and float32 beside them are there for a tight check of every mode: in
# bfloat16 the decoder's own rounding, packed products' above all, is as large as most margins.
OURS: dict[str, Artifact] = {
    "float32": Artifact("random", ("convert", *_F32), "float32"),
    "bfloat16": Artifact("random", ("convert", *_BF16)),
    "int8": Artifact("random", (*_UNIFORM, "--bits", "8")),
    "int4": Artifact("random", (*_UNIFORM, "--bits", "4")),
    "int4 projector": Artifact("random", (*_UNIFORM, "--bits", "4", "--projector", "4")),
    "int8 float32": Artifact("random", (*_UNIFORM_F32, "--bits", "8"), "float32"),
    "int4 float32": Artifact("random", (*_UNIFORM_F32, "--bits", "4"), "float32"),
    "balanced float32": Artifact("random", ("quantize", *_F32), "float32"),
    "mxfp4 float32": Artifact(
        "random", (*_UNIFORM_F32, "--mode", "mxfp4", "--embeddings", "8"), "float32"
    ),
    "nvfp4 float32": Artifact(
        "random", (*_UNIFORM_F32, "--mode", "nvfp4", "--embeddings", "8"), "float32"
    ),
    "mxfp8 float32": Artifact("random", (*_UNIFORM_F32, "--mode", "mxfp8"), "float32"),
    "untied float32": Artifact(
        "untied", (*_UNIFORM_F32, "--bits", "8", "--projector", "8"), "float32"
    ),
    "demo float32": Artifact("demo", ("convert", *_F32), "float32"),
    "demo bfloat16": Artifact("demo", ("convert", *_BF16)),
    "demo int8": Artifact("demo", (*_UNIFORM, "--bits", "8")),
    "demo int4": Artifact("demo", (*_UNIFORM, "--bits", "4")),
    "demo balanced": Artifact("demo", ("quantize", *_BF16)),
    "demo mxfp4": Artifact("demo", (*_UNIFORM, "--mode", "mxfp4")),
    "demo nvfp4": Artifact("demo", (*_UNIFORM, "--mode", "nvfp4")),
}
# By `python -m mlx_vlm convert`.
THEIRS: dict[str, Artifact] = {
    "mlx-vlm bfloat16": Artifact("random", ()),
    "mlx-vlm int8": Artifact("random", ("-q", "--q-bits", "8")),
    "mlx-vlm int4": Artifact("random", ("-q", "--q-bits", "4")),
}
ARTIFACTS: dict[str, Artifact] = OURS | THEIRS

QUESTION = "What colour is it?"
DEMO_QUESTION = "Describe the image."
DEMO_PICTURES = ("red circle", "blue square", "three")

# Texts around pictures as mlx-vlm's processor must render them: (question, pictures).
PROMPTS: tuple[tuple[str, int], ...] = (
    (QUESTION, 1),
    ("Ein Satz mit Umlauten: äöü, 漢字 and\nnew lines  twice.", 1),
    ("Hello", 0),
)
# Pictures as mlx-vlm's processor must prepare them: height, width, seed.
PREPARED: tuple[tuple[int, int, int], ...] = ((1024, 1024, 1), (300, 200, 1), (700, 1501, 2))
FULL_SIZE = PREPARED[2]


def questions(kind: Kind) -> dict[str, str]:
    """Return picture → question for the artifacts of one source."""
    if kind == "demo":
        return dict.fromkeys(DEMO_PICTURES, DEMO_QUESTION)
    return dict.fromkeys(("picture", "negative"), QUESTION)


def pixels(kind: Kind, name: str) -> NDArray[np.uint8]:
    """Return the pixels the tower is given, uint8 [height, width, 3].

    Small, for a tower in bfloat16 is slow on a CPU, and not square, so that no axes are swapped.
    The negative is as far from the picture as a frozen tower, whose weights are random, can see.
    """
    if kind == "demo":
        return demo_picture(name)
    shown = frozen.picture(128, 192, 1)
    return shown if name == "picture" else 255 - shown


def random_source() -> Source:
    """Return the real-size tower and a tiny decoder, frozen, whose answers depend on the picture.

    Made of `frozen_source`, which answers every picture with one id over and over: its embedding
    drowns everything else. Here that is a sixteenth, a picture speaks four times as loud, and
    queries look twice as sharply. Powers of two: each value stays bfloat16's.
    """
    shapes = json.loads((HERE / "keys_timm_fused.json").read_text())
    source = frozen_source(shapes, DEMO)
    gains = {"embed_tokens.weight": 1 / 16, "linear_2.": 4.0, "q_proj.weight": 2.0}

    def louder(key: str, values: NDArray[Any]) -> NDArray[Any]:
        found = [gain for part, gain in gains.items() if part in key]
        return values * np.float32(found[0]) if found else values

    return replace(source, tensors={k: louder(k, v) for k, v in source.tensors.items()})


def untied(source: Source) -> Source:
    """Return the model with a head of its own, the embedding upside down; config.json says tied."""
    embedding = source.tensors["model.language_model.embed_tokens.weight"]
    return replace(source, tensors={**source.tensors, "lm_head.weight": embedding[::-1].copy()})


def write_source(folder: Path, kind: Kind, source: Source | None = None) -> Path:
    """Write a source as Apple's folder of bfloat16; `source` is `random_source()`, if at hand."""
    if kind == "demo":
        return source_folders.write_apple(folder, read_source(DEMO).fused(), "BF16")
    source = random_source() if source is None else source
    source_folders.write_apple(folder, source if kind == "random" else untied(source), "BF16")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]  # a real checkpoint of Apple's has none
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def split_digests(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return an inventory as numbers to compare: tensors, and a digest of tower and of the rest."""

    def digest(of_tower: bool) -> str:
        some = {k: v for k, v in rows.items() if k.startswith("vision_tower.") is of_tower}
        return hashlib.blake2b(json.dumps(some, sort_keys=True).encode(), digest_size=8).hexdigest()

    return {"tensors": len(rows), "tower": digest(True), "rest": digest(False)}
