"""The table that `--stats` prints. Knows the fields of Stats and how people read them."""

from __future__ import annotations

from collections.abc import Iterable

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.events import Stats

_STAGES = {
    "image decode": "image_decode_ms",
    "preprocess": "preprocess_ms",
    "vision": "vision_ms",
    "projector": "projector_ms",
    "prompt": "prompt_ms",
    "prefill": "prefill_ms",
    "first token": "first_token_ms",
}


def table(stats: Stats) -> Iterable[str]:
    """Yield the lines of a profiled answer's table.

    A profiled run waits for each stage, so its stages add up to more than an unprofiled TTFT.
    """
    total = 0.0
    for label, name in _STAGES.items():
        value: float = getattr(stats, name) or 0.0
        total += value
        note = f"{stats.prompt_tokens} positions" if name == "prefill_ms" else ""
        yield _row(label, f"{value:.1f} ms", note)
    yield _row("in all", f"{total:.1f} ms", "each stage waited for, warm-up too")
    speed = "-" if stats.decode_tps is None else f"{stats.decode_tps:.1f} tok/s"
    yield _row("decode", speed, f"{stats.generated_tokens} tokens")
    yield _row("peak memory", readable_bytes(stats.peak_bytes), "")


def _row(name: str, value: str, note: str) -> str:
    return f"{name:<12}{value:>14}  {note}".rstrip()
