"""Quantize a model, see what it lost, and ask both: python examples/quantize_and_compare.py"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import fastvlm_mlx as fv
from fastvlm_mlx.convert.pipeline import convert
from fastvlm_mlx.quantize.recipes import make_recipe
from fastvlm_mlx.quantize.report import measure

PICTURE = Path(__file__).parent / "images" / "three_crosses_and_a_star.png"
QUESTION = "How many crosses are there?"


def main() -> None:
    recipe = partial(make_recipe, "balanced", bits=4)
    with tempfile.TemporaryDirectory() as scratch:
        artifact = convert("demo", Path(scratch) / "int4", recipe=recipe)
        print(f"{artifact.weight_bytes / 1e6:.1f} MB, the vision tower and all")
        report = measure(partial(fv.load, "demo"), partial(fv.load, artifact.folder))
        print(
            f"the same likeliest token in {report.top1_agreement:.1%} of {report.positions} places"
        )
        for model in ("demo", artifact.folder):
            print(fv.load(model).generate(QUESTION, images=[PICTURE]).text)


if __name__ == "__main__":
    main()
