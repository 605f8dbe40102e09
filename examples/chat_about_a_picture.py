"""A conversation in which each turn computes only what is new."""

from __future__ import annotations

from pathlib import Path

import fastvlm_mlx as fv

IMAGES = Path(__file__).parent / "images"

QUESTIONS = ("Describe the image.", "What shape is on the left?", "What colour is the circle?")


def main() -> None:
    engine = fv.load("demo")
    chat = engine.chat()
    images = [engine.encode(IMAGES / "three_shapes_landscape.png")]
    for question in QUESTIONS:
        print(f"> {question}")
        for event in chat.stream(question, images=images):
            match event:
                case fv.TextDelta(text=text):
                    print(text, end="", flush=True)
                case fv.Finished(stats=stats):
                    new = stats.prompt_tokens - stats.reused_tokens
                    print(f"  ({new} of {stats.prompt_tokens} positions were new)")
        images = []


if __name__ == "__main__":
    main()
