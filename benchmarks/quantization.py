"""What each width, mode and recipe costs: sizes, divergence and accuracy of one model, swept.

Run from the repository's root:
    python -m benchmarks.quantization --model demo [--exam 500]
    python -m benchmarks.quantization --model apple/FastVLM-0.5B --widths affine:4 affine:8
The unquantized model answers the bundled pictures' questions first; then, one after the other, each
setting is written by `fastvlm quantize`'s own code to a temporary folder, loaded, led along those
answers, and thrown away. `--exam` adds the demo model's held-out examination (exact answers).
Writes NAME.json, a table NAME.md and a plot NAME.svg into `--out`, after every setting; the last
line printed is JSON. No times: a sweep says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastvlm_mlx as fv

# isort: split
import mlx.core as mx

from benchmarks import kl_plot
from fastvlm_mlx.convert.pipeline import convert
from fastvlm_mlx.quantize.compare import Answered, answer_all, compare_all
from fastvlm_mlx.quantize.pictures import bundled_pictures
from fastvlm_mlx.quantize.recipes import make_recipe
from fastvlm_mlx.quantize.report import Report, device_name, summarise
from fastvlm_mlx.quantize.side import describe

WIDTHS = ("affine:8", "affine:4", "mxfp4:4", "nvfp4:4", "affine:6", "affine:5", "affine:3",
          "affine:2", "mxfp8:8")  # fmt: skip
EXAM = Path(__file__).parents[1] / "examples/demo_model"


@dataclass(frozen=True, slots=True)
class Trial:
    """One model of the sweep; `recipe` is empty for the float ones, which `dtype` tells apart."""

    name: str
    dtype: str
    recipe: str = ""
    mode: str = ""
    bits: int = 0


def trials(arguments: argparse.Namespace) -> Iterator[Trial]:
    yield Trial(arguments.dtype, arguments.dtype)
    if arguments.dtype != "bfloat16":
        yield Trial("bfloat16", "bfloat16")
    for width in arguments.widths:
        mode, _, bits = width.partition(":")
        name = f"int{bits}" if mode == "affine" else mode
        for recipe in arguments.recipes:
            if recipe == "balanced" and bits == "8":
                continue  # nothing is wider: the same as uniform
            yield Trial(f"{name} {recipe}", arguments.dtype, recipe, mode, int(bits))


def load(trial: Trial, model: str, folder: Path) -> fv.Engine:
    """Load the model as the trial has it, written to `folder` first if it is quantized."""
    if not trial.recipe:
        return fv.load(model, dtype=trial.dtype)
    make = partial(make_recipe, trial.recipe, bits=trial.bits, mode=trial.mode)
    convert(model, folder, recipe=make, overwrite=True)
    return fv.load(folder, dtype=trial.dtype)


def examine(engine: fv.Engine, pictures: int) -> float:
    """Return the share of exactly right answers in the demo model's held-out examination."""
    sys.path.insert(0, str(EXAM))
    from evaluate import answers
    from held_out import examination

    papers = examination(pictures)
    right = [question.answer for paper in papers for question in paper.questions]
    texts = answers(engine, papers, blank=False)
    return sum(text == answer for text, answer in zip(texts, right, strict=True)) / len(right)


def row(trial: Trial, report: Report, exam: float | None) -> dict[str, Any]:
    side = report.quantized
    return {
        **asdict(trial),
        "bytes": side.size.bytes,
        "decoder_bytes": side.size.decoder_bytes,
        "decoder_bits_per_weight": side.size.decoder_bits_per_weight,
        "packed": side.packed,
        "kl": asdict(report.kl),
        "top1_agreement": report.top1_agreement,
        "same_answers": report.same_answers,
        "exact": side.exact,
        "exam": exam,
    }


def sweep(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row a trial; the first, float trial is the one the others are compared with."""
    pictures = bundled_pictures()
    answered: list[Answered] = []
    before = None
    for trial in trials(arguments):
        engine = load(trial, arguments.model, folder)
        if not answered:
            answered = answer_all(engine, pictures)
            before = describe(engine, [item.answer for item in answered])
        assert before is not None
        compared = compare_all(engine, pictures, answered)
        after = describe(engine, [item.answer for item in compared])
        vocabulary = engine.config.decoder.vocab_size
        report = summarise(pictures, answered, compared, before, after, vocabulary=vocabulary)
        yield row(trial, report, examine(engine, arguments.exam) if arguments.exam else None)
        del engine
        gc.collect()
        mx.clear_cache()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | files, MB | decoder, MB | bits a weight of it | KL, mean | KL, 99 % "
        "| same likeliest token | same answer | set, exact | exam, exact |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        shares = (one["top1_agreement"], one["same_answers"], one["exact"], one["exam"])
        shown = " | ".join("" if share is None else f"{share:.1%}" for share in shares)
        lines.append(
            f"| {one['name']} | {one['bytes'] / 1e6:.2f} | {one['decoder_bytes'] / 1e6:.2f} | "
            f"{one['decoder_bits_per_weight']:.2f} | {one['kl']['mean']:.1e} | "
            f"{one['kl']['p99']:.1e} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """Return the table with what it is, how it was made, and how to read it."""
    rows = result["rows"]
    return f"""# {result["model"]}: what quantizing costs

    {result["command"]}

mlx {result["mlx"]}, {result["device"]}; everything computed in {rows[0]["dtype"]}, packed weights
unpacked first where that is a CPU, unless the row says otherwise. KL (nats) and agreement are along
the {rows[0]["name"]} model's own answers to the bundled set's questions (`quantize/pictures.py`).
*Exact* is the share of exactly right answers, to that set and to the demo model's examination.
Float rows differ in what is computed in, not in the file. A quantized folder's files also hold the
tower, unquantized, and a matrix that only other readers ask for (`head.proj`). *Balanced* keeps
embeddings and some groups wider; at 8 bits nothing is wider.

{table(rows)}"""


def plot(model: str, rows: list[dict[str, Any]]) -> str:
    lines: dict[str, list[kl_plot.Point]] = {}
    for one in rows:
        if one["recipe"] and one["kl"]["mean"] > 0:
            kind = f"{'affine' if one['mode'] == 'affine' else 'float modes'}, {one['recipe']}"
            label = one["name"].split()[0]
            point = kl_plot.Point(label, one["decoder_bits_per_weight"], one["kl"]["mean"])
            lines.setdefault(kind, []).append(point)
    joined = {kind for kind in lines if kind.startswith("affine")}
    return kl_plot.draw(f"{model}: size against divergence", lines, joined=joined)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="MODE:BITS")
    parser.add_argument("--recipes", nargs="+", default=("uniform", "balanced"))
    parser.add_argument("--dtype", default="float32", help="what activations are computed in")
    parser.add_argument("--exam", type=int, default=0, metavar="PICTURES")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    name = f"quantization-{Path(arguments.model).name.lower()}"
    result: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "command": " ".join(["python -m benchmarks.quantization", *sys.argv[1:]]),
        "pictures": "bundled",
        "exam_pictures": arguments.exam,
        "device": device_name(),
        "mlx": version("mlx"),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for one in sweep(arguments, Path(temporary) / "quantized"):
            result["rows"].append(one)
            print(table([one]).splitlines()[-1], flush=True)
            arguments.out.mkdir(parents=True, exist_ok=True)
            write = {"json": json.dumps(result, indent=1) + "\n", "md": page(result)}
            if any(made["recipe"] and made["kl"]["mean"] > 0 for made in result["rows"]):
                write["svg"] = plot(result["model"], result["rows"])
            for suffix, text in write.items():
                (arguments.out / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
