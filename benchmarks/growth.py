"""How cost grows: vision with pixels, prefill with tokens, decode with context, memory with each.

    python -m benchmarks.growth                            0.5B, 256 to 1024 px: about 5 minutes
    python -m benchmarks.growth --size demo                a quick look
    python -m benchmarks.growth --save benchmarks/results  growth.json, growth.csv and growth.png
    python -m benchmarks.growth --gpu-forms                the forms a GPU runs, on a CPU too

Synthetic weights of real size, in the forms that the engine chooses: on an x86-64 CPU in float32
its own ones, which the result names; run on a quiet machine. Each size is measured in turn, round
after round, and its fastest round counts, since other work only ever adds. It is fitted by the
terms of the cost's formula: vision and prefill constant, linear and square (attention), decode
constant (weights) and linear (KV cache). Beside each point are the operations and bytes of the
formula (`fastvlm_mlx/bench/costs.py`, which the tests hold equal to the traced graph of a GPU's
forms). "worse" is the time an operation takes at the largest size over the least it took at any:
far above 1, time grew faster than the formula. A byte in place of an operation for decode, which
reads more than it computes.
Memory is what MLX held at most beyond the weights, and for the KV cache what it holds. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
from benchmarks.arguments import Arguments, positive, several, side
from benchmarks.growth_fit import Fit, fit
from benchmarks.growth_points import (
    DECODE_STEPS,
    Point,
    measure_decode,
    measure_prefill,
    measure_vision,
)
from fastvlm_mlx.backend import DTYPES
from fastvlm_mlx.bench.costs import Storage
from fastvlm_mlx.bench.files import require_folder, write_json, write_whole
from fastvlm_mlx.bench.machine import machine_card
from fastvlm_mlx.bench.plots import require_matplotlib
from fastvlm_mlx.bench.synthetic import SIZES, synthetic_checkpoint, synthetic_engine
from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.model.fastvlm import FastVLM

SIDES = (256, 384, 512, 640, 768, 1024)
TOKENS = (32, 64, 128, 256, 512, 1024)
# 16 short of where mlx-lm's buffers grow, by a copy, so that no measured step does.
CONTEXTS = (240, 1008, 2032, 4080, 8176)
TERMS = {
    "vision": ("constant", "linear", "square"),
    "prefill": ("constant", "linear", "square"),
    "decode": ("constant", "linear"),
}
OPTIONS = {
    "vision": ("--sides", side, SIDES, "pixels a side, multiples of 64"),
    "prefill": ("--tokens", positive, TOKENS, "of prompts"),
    "decode": ("--contexts", positive, CONTEXTS, "positions in the KV cache"),
}
UNITS = {"vision": "pixels", "prefill": "tokens", "decode": "positions in the KV cache"}


def merge(rounds: Sequence[Sequence[Point]]) -> list[Point]:
    """Join the rounds' points of each size."""
    merged = list(rounds[0])
    for later in rounds[1:]:
        for point, other in zip(merged, later, strict=True):
            point.ms += other.ms
            point.cpu_ms += other.cpu_ms
            point.peak_bytes = max(point.peak_bytes, other.peak_bytes)
    return merged


def worse(points: Sequence[Point]) -> float:
    """Time an operation (decode: a byte) takes at the largest size, over the least it took."""
    units = [point.moved_bytes if point.kind == "decode" else point.flops for point in points]
    each = [point.best_ms / unit for point, unit in zip(points, units, strict=True)]
    return each[-1] / min(each)


def fitted(points: Sequence[Point]) -> Fit:
    """Fit a kind's points by its formula's terms."""
    xs = [float(point.x) for point in points]
    return fit(xs, [point.best_ms for point in points], TERMS[points[0].kind])


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """What is reported of one kind."""
    found = fitted(points)
    return {
        "unit": UNITS[points[0].kind],
        "points": [asdict(p) | {"best_ms": p.best_ms, "fit_ms": found.at(p.x)} for p in points],
        "fit_ms": dict(found.coefficients),
        "shares_at_the_largest": found.shares(points[-1].x),
        "worst_residual": found.worst_residual,
        "worse": worse(points),
    }


def lines(kinds: dict[str, list[Point]]) -> Iterator[str]:
    """Yield the table."""
    for kind, points in kinds.items():
        found = fitted(points)
        terms = " + ".join(f"{v:.3g} {n}" for n, v in found.coefficients.items() if v)
        yield f"{kind}, ms against {UNITS[kind]}: {terms}"
        yield f"  worst residual {found.worst_residual:.0%}, worse {worse(points):.2f}"
        yield f"  {'size':>9}{'ms':>10}{'fit':>10}{'GF':>9}{'GF/s':>8}{'MB':>9}{'peak MB':>9}"
        for point in points:
            rate = point.flops / point.best_ms / 1e6
            yield (
                f"  {point.x:>9}{point.best_ms:>10.1f}{found.at(point.x):>10.1f}"
                f"{point.flops / 1e9:>9.2f}{rate:>8.1f}{point.moved_bytes / 1e6:>9.1f}"
                f"{point.peak_bytes / 1e6:>9.1f}"
            )


def rows(kinds: dict[str, list[Point]]) -> str:
    """Every point as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["flops", "moved_bytes", "peak_bytes", "held_bytes", "bound_bytes"]
    writer.writerow(["kind", "x", "unit", "best_ms", "fit_ms", "best_cpu_ms", *names])
    for kind, points in kinds.items():
        found = fitted(points)
        for point in points:
            cpu = min(point.cpu_ms)
            times = [f"{value:.3f}" for value in (point.best_ms, found.at(point.x), cpu)]
            values = ["" if (v := getattr(point, n)) is None else v for n in names]
            writer.writerow([kind, point.x, UNITS[kind], *times, *values])
    return out.getvalue()


def storage_of(model: FastVLM) -> Storage:
    """How a loaded float model lies in memory."""
    return Storage(dtype=str(model.dtype).rpartition(".")[2])  # type: ignore[arg-type]


def fitting(contexts: Sequence[int], config: DecoderConfig) -> list[int]:
    """The sizes that the decoder's positions leave room for."""
    return [size for size in contexts if size + DECODE_STEPS <= config.max_positions]


def measure(model: FastVLM, options: argparse.Namespace) -> dict[str, list[Point]]:
    """Warm up at the smallest of each, then go round."""
    storage, config = storage_of(model), model.decoder.config
    lengths, contexts = fitting(options.tokens, config), fitting(options.contexts, config)
    kinds: dict[str, Callable[[int], Iterator[Point]]] = {
        "vision": lambda n: measure_vision(model, storage, options.sides[:n]),
        "prefill": lambda n: measure_prefill(model, storage, lengths[:n]),
        "decode": lambda n: measure_decode(model, storage, contexts[:n]),
    }
    for run in kinds.values():
        list(run(1))
    everything = max(len(options.sides), len(lengths), len(contexts))
    rounds: dict[str, list[list[Point]]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind, run in kinds.items():
            print(f"round {number + 1} of {options.rounds}: {kind}", flush=True)
            rounds[kind].append(list(run(everything)))
    return {kind: merge(found) for kind, found in rounds.items()}


def forms_of(model: FastVLM) -> str:
    """Which way through the same weights was timed."""
    return "a GPU's forms" if model.vision.form is None else "a CPU's own forms"


def save(folder: Path, result: dict[str, Any], kinds: dict[str, list[Point]]) -> None:
    """Write each file whole or not at all; exits with one line where that fails."""
    from benchmarks import growth_plot

    try:
        write_json(folder / "growth.json", result)
        write_whole(folder / "growth.csv", rows(kinds).encode())
        write_whole(folder / "growth.png", growth_plot.draw(result))
    except FastVLMError as error:
        raise SystemExit(str(error)) from error


def parser() -> Arguments:
    """The options; the defaults are read as what a user types is."""

    def listed(sizes: Sequence[int]) -> str:
        return ",".join(map(str, sizes))

    options = Arguments("benchmarks.growth", __doc__)
    add = options.add_argument
    add("--size", choices=SIZES, default="0.5b", help="of the model; default: %(default)s")
    add("--device", choices=("cpu", "gpu"), help="default: MLX's own choice")
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--rounds", type=positive, default=3, metavar="N", help="default: %(default)s")
    for kind, (option, one, sizes, what) in OPTIONS.items():
        least = len(TERMS[kind])
        add(option, type=several(one), default=listed(sizes), metavar="N,…",
            help=f"{what}: needs {least} sizes or more; default: %(default)s")  # fmt: skip
    add("--low-memory", action="store_true", help="the tower, step by step")
    add("--gpu-forms", action="store_true", help="also where a CPU has its own")
    add("--save", type=Path, metavar="FOLDER", help="write growth.json, growth.csv and growth.png")
    return options


def require_sizes(options: argparse.Namespace) -> None:
    """Raise FastVLMError where fewer sizes than terms are given, or fit the model."""
    config = synthetic_checkpoint(options.size).config.decoder
    for kind, (option, *_) in OPTIONS.items():
        given = getattr(options, option.removeprefix("--"))
        fit_in = given if kind == "vision" else fitting(given, config)
        least = len(TERMS[kind])
        if len(fit_in) < least:
            few = len(fit_in) < len(given)
            room = f" that leave room in {config.max_positions} positions" if few else ""
            raise FastVLMError(f"{option} needs {least} sizes or more{room}, to fit its terms")


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser()
    options = command.parse_args(arguments)
    try:
        require_sizes(options)
        if options.save:
            require_matplotlib()
            require_folder(options.save)
        engine = synthetic_engine(
            options.size,
            device=options.device,
            dtype=options.dtype,
            low_memory=options.low_memory,
            cpu_forms=not options.gpu_forms,
        )
    except FastVLMError as error:
        command.error(str(error))
    model = engine.pipeline.model
    since = time.perf_counter()
    kinds = measure(model, options)
    result: dict[str, Any] = {
        "model": engine.pipeline.name,
        "dtype": storage_of(model).dtype,
        "low_memory": options.low_memory,
        "forms": forms_of(model),
        "rounds": options.rounds,
        "seconds": round(time.perf_counter() - since, 1),
        "machine": asdict(machine_card()),
        **{kind: summary(points) for kind, points in kinds.items()},
    }
    print(f"in {result['forms']}")
    print("\n".join(lines(kinds)))
    print(json.dumps(result), flush=True)
    if options.save:
        save(options.save, result, kinds)


if __name__ == "__main__":
    main()
