"""Which of several answers does the model find likeliest? Sums of token log-probabilities."""

from __future__ import annotations

from pathlib import Path

import fastvlm_mlx as fv

IMAGES = Path(__file__).parent / "images"

PICTURE = IMAGES / "red_circle.png"
QUESTION = "Describe the image."
ANSWERS = ("A red circle.", "A blue circle.", "A red square.")


def main() -> None:
    engine = fv.load("demo")
    picture = engine.encode(PICTURE)
    for answer in ANSWERS:
        total = sum(engine.score(QUESTION, [picture], answer))
        print(f"{total:8.2f}  {answer}")


if __name__ == "__main__":
    main()
