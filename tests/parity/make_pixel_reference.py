"""Record what the PIL-backed reference makes of `pictures.py`: digests of uint8 [size, size, 3].

    pip install torch==2.15.0 transformers==5.23.0 pillow==13.0.0
    python tests/parity/make_pixel_reference.py     # writes pixels.json; 20 seconds

"pad" is apple/ml-fastvlm's path: expand2square with int(255 * image_mean) = black, then
CLIPImageProcessor. "crop" is CLIPImageProcessor alone. transformers 5 names the PIL-backed one
CLIPImageProcessorPil; its default, backed by torchvision, differs by a level on 0.26 % of values.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pictures
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CASES = (("pad", 1024), ("pad", 256), ("crop", 256))


def expand_to_square(image: Image.Image) -> Image.Image:
    """Put the picture in the middle of a black square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def reference(image: Image.Image, mode: str, size: int) -> np.ndarray:
    """Return the processor's picture, taken back from its floats to the levels they stand for."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    if mode == "pad":
        image = expand_to_square(image)
    values = processor(image, return_tensors="np")["pixel_values"][0]
    levels = np.rint(values * 255)
    assert np.abs(values * 255 - levels).max() < 1e-3
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))


def main() -> None:
    digests = {
        name: {
            f"{mode}-{size}": hashlib.blake2b(
                reference(Image.fromarray(pictures.picture(name)), mode, size).tobytes(),
                digest_size=16,
            ).hexdigest()
            for mode, size in CASES
        }
        for name in pictures.SIZES
    }
    path = Path(__file__).with_name("pixels.json")
    path.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
