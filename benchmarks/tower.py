"""Our tower beside mlx-vlm's: same weights, same process, turns taken; ratios, never seconds alone.

Run from the repository's root, where both are installed:
    python -m benchmarks.tower [--size 256] [--rounds 5]
Each round runs both, in alternating order; the ratio of a round's processor times is what counts,
since a shared machine slows neighbours in time alike. Features of both must agree, or it stops.
On a CPU this is no proxy for Metal: depthwise convolutions and erf, scalar there, take most of the
time in both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx

from benchmarks import towers
from fastvlm_mlx.backend import select_device

MIB = 2**20


def timed(tower: towers.Tower, pixels: mx.array) -> dict[str, float]:
    """Run once: processor and wall seconds, and MiB at the peak above what was held before."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    mx.eval(tower(pixels))
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mib": (mx.get_peak_memory() - before) / MIB,
    }


def compare(size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Warm both up, take turns, and return medians and the median of the rounds' ratios."""
    both = {"ours": towers.ours(folder, mx.float32), "mlx-vlm": towers.mlx_vlm(folder, mx.float32)}
    pixels = towers.picture(size, size, 1)
    one, other = (tower(pixels) for tower in both.values())
    mx.eval(one, other)
    difference = mx.sqrt(mx.mean((one - other) ** 2) / mx.mean(other**2)).item()
    if difference > 1e-4:
        raise SystemExit(f"the two towers differ by {difference:.1e}: nothing to compare")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for turn in range(rounds):
        for name in list(both) if turn % 2 == 0 else reversed(both):
            runs[name].append(timed(both[name], pixels))

    def ratio(key: str) -> float:
        pairs = zip(runs["ours"], runs["mlx-vlm"], strict=True)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    return {
        "size": size,
        "rounds": rounds,
        "difference": difference,
        "cpu_ratio": ratio("cpu_s"),
        "wall_ratio": ratio("wall_s"),
        "peak_ratio": ratio("peak_mib"),
        "median": {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="pixels a side, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = select_device()
    with tempfile.TemporaryDirectory() as temporary:
        folder = towers.write_folder(Path(temporary) / "tower")
        result = compare(arguments.size, arguments.rounds, folder)
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": str(device),
        "mlx": version("mlx"),
        "mlx-vlm": version("mlx-vlm"),
    }
    for name, values in result["median"].items():
        print(name, {key: round(value, 3) for key, value in values.items()})
    print(f"ours / mlx-vlm: processor {result['cpu_ratio']:.2f}, wall {result['wall_ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
