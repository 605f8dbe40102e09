"""Ask one question about one picture: python examples/describe_a_picture.py PICTURE [QUESTION]."""

from __future__ import annotations

import sys
from pathlib import Path

import fastvlm_mlx as fv

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    picture = sys.argv[1] if len(sys.argv) > 1 else IMAGES / "number_42.png"
    question = sys.argv[2] if len(sys.argv) > 2 else "Describe the image."
    engine = fv.load("demo")
    print(engine.generate(question, images=[picture]).text)


if __name__ == "__main__":
    main()
