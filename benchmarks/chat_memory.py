"""Memory of long use: 200 turns in one conversation, 1,000 pictures in one, in many, in none.

    python -m benchmarks.chat_memory                        table, JSON; 5 minutes
    python -m benchmarks.chat_memory --check                exit 1 if anything is above its bound
    python -m benchmarks.chat_memory --plot benchmarks/results      CSV, JSON and SVG as well

On the demo model, whose features are small beside its pixels; `--scale 0.05` is a quick look. What
is held, and the bound of each:

    KV         bytes of a position x (the context's positions + 256): buffers grow by 256
    features   the engine's LRU: `feature_cache_bytes`, 1 MiB here (128 pictures)
    pixels     12,288 bytes a position of the pictures in the transcript, and their features again
    pool       buffers MLX keeps to use again: its cache limit

"active" is MLX's live arrays: weights, KV, features. "resident" is the process as the system sees
it: what it was after the first `SETTLED` steps, plus all of the above, plus SLACK for what malloc
does not give back. A thousand pictures' pixels are 188 MiB, their conversations' KV 375 MiB: more
than the slack, so a leak of either shows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import fastvlm_mlx as fv

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks import memory_plot

MIB = 2**20
PIXEL_BYTES = 64 * 64 * 3  # of a position
FEATURE_CACHE_BYTES = MIB
SETTLED = 20
SLACK_BYTES = 48 * MIB
TURNS, PICTURES = 200, 1000


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes after one step of a scenario; `positions` of the transcript."""

    scenario: str
    step: int
    resident: int
    active: int
    pool: int
    kv: int
    features: int
    pixels: int
    positions: int


@dataclass(frozen=True, slots=True)
class Bound:
    """The most bytes of each that are allowed."""

    resident: int
    active: int
    pool: int
    kv: int
    features: int
    pixels: int


Session = fv.ChatSession | None
Scenario = Callable[[fv.Engine, float], Iterator[Session]]


def picture(number: int) -> np.ndarray:
    """Return picture `number`, uint8 [64, 64, 3]: no two are alike."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = (number % 251, number // 251 * 40, 128)
    pixels[16:48, 16:48] = (255 - number % 256, 200, number * 7 % 256)
    return pixels


def long_conversation(engine: fv.Engine, scale: float) -> Iterator[Session]:
    """200 turns, two pictures of 64 positions every third turn: the context is full after 120."""
    chat = engine.chat(overflow="drop")
    for number in range(int(TURNS * scale)):
        images = [] if number % 3 else [picture(number), picture(number + 1)]
        encoded = [engine.encode(image, resolution=512) for image in images]
        chat.ask("What do you see?", encoded, max_tokens=12)
        yield chat


def pictures_in_one_conversation(engine: fv.Engine, scale: float) -> Iterator[Session]:
    """1,000 turns of a new picture each; the oldest turns are dropped."""
    chat = engine.chat(overflow="drop")
    for number in range(int(PICTURES * scale)):
        chat.ask("What is this?", [picture(number)], max_tokens=3)
        yield chat


def pictures_in_many_conversations(engine: fv.Engine, scale: float) -> Iterator[Session]:
    """1,000 conversations of a turn, each about a new picture."""
    for number in range(int(PICTURES * scale)):
        chat = engine.chat()
        chat.ask("What is this?", [picture(number)], max_tokens=3)
        yield chat


def pictures_in_single_calls(engine: fv.Engine, scale: float) -> Iterator[Session]:
    """1,000 calls of `generate`, each about a new picture."""
    for number in range(int(PICTURES * scale)):
        engine.generate("What is this?", images=[picture(number)], max_tokens=3)
        yield None


# name: (scenario, positions of the context)
SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "200 turns": (long_conversation, 8192),
    "1,000 pictures, one conversation": (pictures_in_one_conversation, 1024),
    "1,000 pictures, a conversation each": (pictures_in_many_conversations, 1024),
    "1,000 pictures, single calls": (pictures_in_single_calls, 1024),
}


def resident_bytes() -> int:
    """Return the bytes of this process in memory now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    shown = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(shown.stdout) * 1024


def pool_limit() -> int:
    """Return the bytes MLX may keep of buffers that are free."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def measured(name: str, step: int, engine: fv.Engine, chat: Session) -> Held:
    """Return what is held now."""
    images = {} if chat is None else {image.digest: image for image in chat.images}
    pixels = [image.pixels for image in images.values()]
    return Held(
        scenario=name,
        step=step,
        resident=resident_bytes(),
        active=mx.get_active_memory(),
        pool=mx.get_cache_memory(),
        kv=0 if chat is None else chat.kv_bytes,
        features=engine.image_features.nbytes,
        pixels=sum(0 if array is None else array.nbytes for array in pixels),
        positions=0 if chat is None else chat.positions,
    )


def bound_of(engine: fv.Engine, settled: Held, weights: int) -> Bound:
    """Return the bounds for the engine's context, from what was resident once it had settled."""
    sizes = engine.config.decoder
    limit, width = sizes.max_positions, engine.dtype.size
    rows = sizes.num_layers * 2 * sizes.num_kv_heads * (sizes.hidden_size // sizes.num_heads)
    kv = rows * width * (limit + 256)
    pixels = limit * PIXEL_BYTES
    own_features = limit * sizes.hidden_size * width
    features = engine.image_features.max_bytes
    pool = pool_limit()
    active = weights + kv + features + own_features
    resident = settled.resident + kv + pixels + features + own_features + pool + SLACK_BYTES
    return Bound(resident, active, pool, kv, features, pixels)


def run(name: str, scale: float) -> tuple[list[Held], Bound]:
    """Run one scenario on a freshly loaded model."""
    scenario, limit = SCENARIOS[name]
    engine = fv.load("demo", feature_cache_bytes=FEATURE_CACHE_BYTES)
    config = engine.config
    engine.pipeline.model.config = replace(
        config, decoder=replace(config.decoder, max_positions=limit)
    )
    mx.clear_cache()
    weights = mx.get_active_memory()
    engine.warm_up()
    rows = [
        measured(name, step, engine, chat)
        for step, chat in enumerate(scenario(engine, scale), start=1)
    ]
    return rows, bound_of(engine, rows[min(SETTLED, len(rows)) - 1], weights)


def above(rows: list[Held], bound: Bound) -> dict[str, int]:
    """Return by how many bytes each kind was above its bound, if any was."""
    excess = {
        kind: max(getattr(row, kind) for row in rows) - most for kind, most in asdict(bound).items()
    }
    return {kind: by for kind, by in excess.items() if by > 0}


def summary(rows: list[Held], bound: Bound) -> dict[str, Any]:
    """Return the most of each kind beside its bound, and how resident memory grew."""
    most = {kind: max(getattr(row, kind) for row in rows) for kind in asdict(bound)}
    settled = rows[min(SETTLED, len(rows)) - 1]
    return {
        "steps": len(rows),
        "most": most,
        "bound": asdict(bound),
        "resident_growth": rows[-1].resident - settled.resident,
        "most_positions": max(row.positions for row in rows),
        "above": above(rows, bound),
    }


def write_results(folder: Path, found: dict[str, tuple[list[Held], Bound]]) -> None:
    """Write every fifth step as CSV, the summary as JSON, and the plot."""
    with (folder / "chat_memory.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Held)])
        for rows, _ in found.values():
            writer.writerows(astuple(row) for row in rows if row.step % 5 == 0)
    whole = {name: summary(rows, bound) for name, (rows, bound) in found.items()}
    (folder / "chat_memory.json").write_text(json.dumps(whole, indent=1) + "\n")
    panels = [
        memory_plot.Panel(
            name,
            tuple(row.step for row in rows),
            {
                kind: tuple(getattr(row, kind) / MIB for row in rows)
                for kind in ("resident", "active")
            },
            {"resident": bound.resident / MIB, "active": bound.active / MIB},
        )
        for name, (rows, bound) in found.items()
    ]
    (folder / "chat_memory.svg").write_text(memory_plot.draw("MiB after each step", panels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if anything is above its bound"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the turns and pictures")
    parser.add_argument("--plot", type=Path, help="folder for CSV, JSON and SVG")
    options = parser.parse_args()
    found = {}
    for name in SCENARIOS:
        found[name] = run(name, options.scale)
        result = summary(*found[name])
        print(f"{name}: {result['steps']} steps, up to {result['most_positions']} positions")
        for kind, most in result["most"].items():
            print(f"  {kind:9} {most / MIB:8.1f} MiB of {result['bound'][kind] / MIB:8.1f}")
        print(f"  resident grew {result['resident_growth'] / MIB:.1f} MiB", flush=True)
    if options.plot is not None:
        write_results(options.plot, found)
    print(json.dumps({name: summary(*pair) for name, pair in found.items()}))
    if options.check and any(above(*pair) for pair in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
