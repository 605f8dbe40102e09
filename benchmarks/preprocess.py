"""A 12-megapixel JPEG to what the tower takes, in ours and in mlx-vlm, interleaved in one process.

    python -m benchmarks.preprocess --rounds 15       where mlx-vlm is installed; half a minute

The pinned photo, 4032 x 3024, and the same upright, as a phone held each way takes them. Decoding
is opening a path until its RGB pixels are there (orientation, transparency); preprocessing is from
those to the array that the model is called with, at 1024 px: ours uint8, mlx-vlm's float32, made by
`load_image` and its image processor. Processor time, medians; a round's ratio is ours / theirs. The
pixels must be the same ones. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_vlm.models.fastvlm.processing import FastVLMImageProcessor
from mlx_vlm.utils import load_image
from PIL import Image

from fastvlm_mlx.bench.files import require_place, write_json
from fastvlm_mlx.bench.inputs import PHOTO_SIZE, encode, pixels
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.prompt.image import fit, open_image

SIDE = 1024
TARGET = 0.65


def cpu_ms(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its processor time."""
    began = time.process_time()
    result = call()
    return result, (time.process_time() - began) * 1000


def ours(path: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Return uint8 [side, side, 3] on the device, and milliseconds."""
    image, decode_ms = cpu_ms(lambda: open_image(path))

    def prepare() -> mx.array:
        given = mx.array(fit(image, SIDE, "pad"))
        mx.eval(given)
        return given

    given, preprocess_ms = cpu_ms(prepare)
    return np.array(given), {"decode": decode_ms, "preprocess": preprocess_ms}


def theirs(path: Path, processor: FastVLMImageProcessor) -> tuple[np.ndarray, dict[str, float]]:
    """Return the same of mlx-vlm, its values times 255 in whole numbers."""
    image, decode_ms = cpu_ms(lambda: load_image(str(path)))

    def prepare() -> mx.array:
        given = mx.array(processor(images=[image])["pixel_values"])
        mx.eval(given)
        return given

    given, preprocess_ms = cpu_ms(prepare)
    whole = np.rint(np.array(given)[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    return whole, {"decode": decode_ms, "preprocess": preprocess_ms}


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Return medians of both and the ratios of the rounds; another one is first in each."""
    processor = FastVLMImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    runs = {"ours": lambda: ours(path), "mlx-vlm": lambda: theirs(path, processor)}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    same = True
    for number in range(-1, rounds):
        seen = {}
        for name in runs if number % 2 == 0 else reversed(runs):
            seen[name], took = runs[name]()
            if number >= 0:
                times[name].append(took | {"both": took["decode"] + took["preprocess"]})
        same &= bool((seen["ours"] == seen["mlx-vlm"]).all())
    found: dict[str, Any] = {"same pixels": same}
    for stage in ("decode", "preprocess", "both"):
        ratios = [
            one[stage] / two[stage]
            for one, two in zip(times["ours"], times["mlx-vlm"], strict=True)
        ]
        found[stage] = {
            f"{name} ms": round(statistics.median(took[stage] for took in times[name]), 1)
            for name in runs
        } | {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| photo | stage | ours ms | mlx-vlm ms | ratio | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for photo, stages in found.items():
        for stage in ("decode", "preprocess", "both"):
            row = stages[stage]
            lines.append(
                f"| {photo} | {stage} | {row['ours ms']} | {row['mlx-vlm ms']} "
                f"| {row['ratio']} | {row['lowest']} to {row['highest']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if options.json:
        try:
            require_place(options.json, ".json")
        except FastVLMError as error:
            parser.error(str(error))
    found = {}
    with tempfile.TemporaryDirectory(prefix="fastvlm-preprocess-") as temporary:
        picture = pixels(*PHOTO_SIZE)
        for name, shown in (("wide", picture), ("tall", picture.transpose(1, 0, 2))):
            path = Path(temporary) / f"{name}.jpg"
            path.write_bytes(encode(np.ascontiguousarray(shown)))
            found[name] = measure(path, options.rounds)
    results = {
        "versions": {name: version(name) for name in ("mlx", "mlx-vlm", "pillow", "numpy")},
        "libjpeg_turbo": Image.core.libjpeg_turbo_version or "none",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "target": TARGET,
        "photos": found,
    }
    print(table(found))
    print(json.dumps(results), flush=True)
    if options.json:
        try:
            write_json(options.json, results)
        except FastVLMError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
