"""How much memory a model will take and how much is free. Knows sizes, no weights.

Free memory is what the kernel says it can hand out (Linux MemAvailable, macOS free + inactive +
speculative pages), or the GPU's own memory where it is apart from the machine's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastvlm_mlx.errors import MemoryLimitError


def readable_bytes(count: int) -> str:
    """Return a size as people write it, in decimal units: 1.24 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def free_bytes() -> int:
    """Return bytes of memory that could be allocated now without swapping."""
    if sys.platform == "darwin":
        return _parse_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True).stdout)
    return _parse_meminfo(Path("/proc/meminfo").read_text())


def _parse_meminfo(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise MemoryLimitError("/proc/meminfo has no MemAvailable line")


def _parse_vm_stat(text: str) -> int:
    lines = text.splitlines()
    page = int(lines[0].split("page size of ")[1].split()[0])
    counted = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    pages = sum(
        int(line.split(":")[1].strip().rstrip(".")) for line in lines if line.startswith(counted)
    )
    return pages * page


def require_memory(needed: int, *, limit: int | None, what: str) -> None:
    """Raise MemoryLimitError if `needed` bytes exceed the limit, or what is free now."""
    if limit is not None and needed > limit:
        raise MemoryLimitError(
            f"{what} needs {readable_bytes(needed)}, the memory limit is {readable_bytes(limit)}"
        )
    free = free_bytes()
    if needed > free:
        raise MemoryLimitError(
            f"{what} needs {readable_bytes(needed)}, {readable_bytes(free)} is free: "
            "close other programs or take a smaller or quantized model"
        )
