"""Write quantize/picture_set: the pictures and questions that `fastvlm quantize --report` asks.

Knows which of the examination's pictures are taken (its last forty, as they come) and how they are
stored: PNG, or JPEG where a noisy background would make the PNG large. Refuses to pick by hand.

    cd examples/demo_model && python make_picture_set.py ../../quantize/picture_set
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from held_out import examination
from PIL import Image

PICTURES = 40
EXAMINED = 500  # evaluate.py's default
LARGEST_PNG_BYTES = 20_000
JPEG_QUALITY = 90


def encoded(image: Image.Image) -> tuple[str, bytes]:
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= LARGEST_PNG_BYTES:
        return "png", png.getvalue()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return "jpg", jpeg.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    entries = []
    for paper in examination(EXAMINED)[-PICTURES:]:
        suffix, data = encoded(paper.image)
        name = f"{paper.seed}.{suffix}"
        (folder / name).write_bytes(data)
        questions = [{"question": q.text, "answer": q.answer} for q in paper.questions]
        entries.append({"file": name, "questions": questions})
    text = json.dumps({"pictures": entries}, indent=1)
    (folder / "answers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
