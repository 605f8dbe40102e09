"""The demo model's examination through this project's engine: no torch.

Knows only the public API. Prints, for every kind of question, the share of exactly right greedy
answers on held-out pictures, beside chance (always the commonest answer) and the score when the
picture is replaced by a black one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from held_out import Examined, examination, score, table
from PIL import Image

import fastvlm_mlx as fv

MAX_TOKENS = 40


def answers(engine: fv.Engine, papers: list[Examined], blank: bool) -> list[str]:
    texts = []
    black = engine.encode(Image.new("RGB", (256, 256)))
    for paper in papers:
        picture = black if blank else engine.encode(paper.image)
        for question in paper.questions:
            reply = engine.generate(question.text, images=[picture], max_tokens=MAX_TOKENS)
            texts.append(reply.text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers")
    args = parser.parse_args()
    engine = fv.load(args.model, dtype=args.dtype)
    papers = examination(args.pictures)
    seen = answers(engine, papers, blank=False)
    rows = score(papers, seen, answers(engine, papers, blank=True))
    asked = [(paper.seed, q) for paper in papers for q in paper.questions]
    wrong = [
        (seed, q, text) for (seed, q), text in zip(asked, seen, strict=True) if text != q.answer
    ]
    for seed, question, text in wrong[: args.show]:
        print(f"seed {seed}: {question.text} {question.answer!r}, answered {text!r}")
    print(table(rows, args.dtype))
    print(json.dumps({
        "model": args.model, "dtype": args.dtype, "pictures": len(papers),
        "kinds": {row.kind: asdict(row) for row in rows},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
