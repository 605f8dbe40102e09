"""What a stage launches on a chip, summed up: plain values for JSON, rows for a table.

Knows kernels and their kinds. Knows no model and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx

from benchmarks.metal_rules.chips import CHIPS, Chip
from benchmarks.metal_rules.kernels import KINDS, Kernel
from benchmarks.metal_rules.replay import replay
from benchmarks.metal_rules.standins import Trace

Summary: TypeAlias = dict[str, Any]
# The second kernel of a product that is split along K, which a chip's rule adds, not the graph.
SECOND_PASSES = ("steel_gemm_splitk_accum", "col_reduce (split K)")


def summarize(traces: Sequence[Trace], chip: Chip) -> Summary:
    """Sum up the kernels of traces that run one after the other.

    `kernels` counts launches, `second_passes` those of them that only add up a split product;
    `elementwise_bytes` is what elementwise kernels read and write, casts and copies apart.
    """
    kernels = [kernel for trace in traces for kernel in replay(trace, chip)]
    kinds = Counter(kernel.kind for kernel in kernels)
    return {
        "kernels": len(kernels),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "second_passes": sum(kernel.name in SECOND_PASSES for kernel in kernels),
        "slow": _counted(kernel.slow for kernel in kernels if kernel.slow),
        "copies": _counted(kernel.note for kernel in kernels if kernel.kind == "copy"),
        "elementwise_bytes": _bytes(kernels, "elementwise"),
        "copy_bytes": _bytes(kernels, "copy", "cast", "fill"),
        "float32_arrays": sum(trace.of_dtype(mx.float32) for trace in traces),
        "convolutions": _counted(
            kernel.note.partition(":")[0] for kernel in kernels if kernel.kind == "convolution"
        ),
        "products": _products(kernels),
        "attention": _counted(kernel.name for kernel in kernels if kernel.kind == "attention"),
    }


def of_chips(traces: Sequence[Trace], chips: Sequence[str]) -> dict[str, Summary]:
    """Sum up traces on each chip."""
    return {name: summarize(traces, CHIPS[name]) for name in chips}


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _bytes(kernels: Sequence[Kernel], *kinds: str) -> int:
    return sum(k.read_bytes + k.written_bytes for k in kernels if k.kind in kinds)


def _products(kernels: Sequence[Kernel]) -> list[list[Any]]:
    """Return [M N K, kernel, how many] of every product, in order of first use."""
    counted = Counter((k.note, k.name) for k in kernels if k.kind in ("gemm", "quantized"))
    return [[note, name, count] for (note, name), count in counted.items()]


def failures(stages: Mapping[str, Mapping[str, Summary]], limits: Mapping[str, int]) -> list[str]:
    """Say what is over its limit, on a slow path or in float32, one line each.

    A limit of kernels is compared less the second passes. `limits` is by the stage's name.
    """
    found = []
    for stage, chips in stages.items():
        for chip, summary in chips.items():
            own = summary["kernels"] - summary["second_passes"]
            if stage in limits and own > limits[stage]:
                found.append(f"{stage} on {chip}: {own} kernels, more than {limits[stage]}")
            found += [f"{stage} on {chip}: {n} x {slow}" for slow, n in summary["slow"].items()]
            if summary["float32_arrays"]:
                found.append(f"{stage} on {chip}: {summary['float32_arrays']} float32 arrays")
    return found


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as a Markdown table, the first its head; numbers to the right."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
