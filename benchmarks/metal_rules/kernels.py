"""One launch on the GPU, as the rules name it. Knows no rule."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "convolution",
    "gemm",
    "quantized",
    "attention",
    "norm",
    "rope",
    "softmax",
    "reduction",
    "elementwise",
    "cast",
    "copy",
    "fill",
    "gather",
    "arg-reduce",
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A launch: its kind, the kernel's name as far as the rules tell it, bytes read and written.

    `slow` says why its path is one to avoid, or is empty. `note` says what it works on.
    """

    kind: str
    name: str
    read_bytes: int = 0
    written_bytes: int = 0
    slow: str = ""
    note: str = ""
