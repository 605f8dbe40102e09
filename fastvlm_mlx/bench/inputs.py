"""Pinned pictures and prompts: the same pixels and words in every run of every benchmark.

Pixels come from whole-number arithmetic alone (gradients, discs, bars, fine noise), so no library's
version changes them; what is pinned is blake2b of their RGB bytes. They are encoded once a run as
JPEG, which is what photos are, into files: TTFT is counted from a path, so it includes reading the
file and decoding JPEG. The encoded bytes depend on the JPEG library, so every runtime that is
compared reads the same files. Knows no clock and no model.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.errors import FastVLMError

PHOTO_SIZE = (4032, 3024)
"""Width and height of a phone's 12-megapixel photo."""
JPEG_QUALITY = 90

_WORDS = (
    "the picture shows a small house near the river with two trees and one red boat on the water "
    "while people walk along the old road to the market under a wide and bright morning sky"
).split()

FOLLOW_UP = "What else is in it?"
"""The question of the second turn, without a picture."""


def words(count: int) -> str:
    """Return a prompt of so many words, the same ones over and over."""
    if count < 1:
        raise FastVLMError(f"a prompt needs at least one word, not {count}")
    return " ".join(_WORDS[i % len(_WORDS)] for i in range(count))


PROMPTS: dict[str, str] = {
    "short": "Describe the image.",
    "medium": "Describe the image. " + words(60),
    "long": "Describe the image. " + words(460),
}
"""Pinned prompts by name: 4, 134 and about 1,000 tokens with the demo's tokenizer, fewer with
Qwen2's. What is reported is counted in the run."""


def prompt_text(name: str) -> str:
    """Return a prompt by its name: one of PROMPTS, or "N words". Raises FastVLMError."""
    if name in PROMPTS:
        return PROMPTS[name]
    count, _, rest = name.partition(" ")
    if rest != "words" or not (count.isascii() and count.isdigit()):
        raise FastVLMError(f'unknown prompt {name!r}: use {", ".join(PROMPTS)} or "N words"')
    return words(int(count))


def pixels(width: int, height: int, index: int = 0) -> np.ndarray:
    """Return pinned picture number `index`, uint8 [height, width, 3]: smooth, edged and grainy."""
    y = np.arange(height, dtype=np.int64)[:, None]
    x = np.arange(width, dtype=np.int64)[None, :]
    unit = max(width, height)
    channels = [
        (x * 200) // width + (y * 40) // height,
        (y * 180) // height + (index * 37) % 60,
        ((x + y) * 160) // (width + height) + 30,
    ]
    picture = np.stack([np.broadcast_to(c, (height, width)) for c in channels], axis=-1).astype(
        np.int16
    )
    for disc in range(6):
        place = _mixed(np.array([1000 * index + 3 * disc + k for k in range(3)], np.uint32))
        centre_x, centre_y, radius = (int(v) for v in place % np.uint32(unit))
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < (unit // 20 + radius // 6) ** 2
        colour = (40 + 30 * disc, 220 - 35 * disc, (90 * disc + 50 * index) % 256)
        picture = np.where(inside[..., None], np.array(colour, np.int16), picture)
    bars = ((x * 24) // unit + index) % 2 == 0
    picture = np.where((bars & (y > height - height // 6))[..., None], 255 - picture, picture)
    counter = np.arange(height * width, dtype=np.uint32) + np.uint32(index << 24)
    grain = (_mixed(counter) % np.uint32(17)).astype(np.int16).reshape(height, width) - 8
    return np.clip(picture + grain[..., None], 0, 255).astype(np.uint8)


def _mixed(counter: np.ndarray) -> np.ndarray:
    """Return pseudo-random uint32 of distinct ones: MurmurHash3's finalizer (A. Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        counter = (counter ^ (counter >> np.uint32(shift))) * np.uint32(factor)
    return counter ^ (counter >> np.uint32(16))


def encode(rgb: np.ndarray) -> bytes:
    """Return a picture's bytes as JPEG, quality 90, Pillow's own chroma subsampling."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def picture(resolution: int, index: int = 0) -> bytes:
    """Return the pinned square picture of `resolution` pixels a side as JPEG bytes."""
    return encode(pixels(resolution, resolution, index))


@dataclass(frozen=True, slots=True)
class InputFiles:
    """Where the pictures of a run lie, encoded; `photo`: every one is a 12-megapixel photo."""

    folder: Path
    photo: bool = False

    def paths(self, case: Case) -> tuple[Path, ...]:
        """Return the files of a case's pictures, in order, each written when first asked for."""
        paths = []
        for index in range(case.images):
            width, height = self.size(case)
            path = self.folder / f"{width}x{height}-{index}.jpg"
            if not path.exists():
                path.write_bytes(_made(width, height, index)[1])
            paths.append(path)
        return tuple(paths)

    def size(self, case: Case) -> tuple[int, int]:
        """Return width and height of the files: the tower's own resolution, or a photo's."""
        return PHOTO_SIZE if self.photo else (case.resolution, case.resolution)

    def digests(self, cases: Iterable[Case]) -> dict[str, str]:
        """Return blake2b of every picture's pixels and every prompt that the cases use, by name."""
        found: dict[str, str] = {}
        for case in cases:
            width, height = self.size(case)
            for index in range(case.images):
                name = f"picture {index}, {width}x{height}"
                if name not in found:
                    found[name] = _made(width, height, index)[0]
            found[f"prompt {case.prompt}"] = digest(prompt_text(case.prompt).encode())
        return found


@lru_cache(maxsize=32)
def _made(width: int, height: int, index: int) -> tuple[str, bytes]:
    """Return the digest of a picture's pixels and its JPEG bytes."""
    rgb = pixels(width, height, index)
    return digest(rgb.tobytes()), encode(rgb)


@contextmanager
def input_files(*, photo: bool = False) -> Iterator[InputFiles]:
    """Give the pictures a temporary folder; it is gone afterwards, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as folder:
        yield InputFiles(Path(folder), photo)


def digest(data: bytes) -> str:
    """Return blake2b of bytes, 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
