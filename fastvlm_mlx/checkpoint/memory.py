"""How much memory a model will take and how much is free. Knows sizes, no weights.

Free memory is what the kernel says it can hand out (Linux MemAvailable, macOS free + inactive +
speculative pages), less where a container is allowed less; on a CUDA GPU it is the GPU's own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastvlm_mlx.errors import MemoryLimitError


def readable_bytes(count: int) -> str:
    """Return a size as people write it, in decimal units: 1.24 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size:.0f} GB"


def free_bytes() -> int:
    """Return bytes that MLX's default device could be given now without swapping."""
    import mlx.core as mx

    # Only MLX's CUDA backend names this (cuda/device_info.cpp): there the GPU has its own memory.
    own = mx.device_info().get("free_memory")
    if isinstance(own, int):
        return own
    if sys.platform == "darwin":
        return _parse_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True).stdout)
    return min(_parse_meminfo(Path("/proc/meminfo").read_text()), *_cgroup_rooms(Path("/")))


# A memory cgroup's files by the name of its controller in /proc/self/cgroup, version 2 and 1:
# folder below /sys/fs/cgroup, limit, use, and what of the use is file cache that is given back.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Yield what is left in each memory cgroup that this process is in, its own and those around.

    In a container MemAvailable is the whole machine's; the limit to obey is the cgroup's.
    """
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, place = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _CGROUP_FILES:
                continue
            below, limit, used, cached = _CGROUP_FILES[controller]
            inside = PurePosixPath(place.lstrip("/"))
            # A container may see its own cgroup as the root, or a path of the host's.
            for folder in (inside, *inside.parents):
                base = root / "sys/fs/cgroup" / below / folder
                if ".." not in folder.parts and (base / limit).exists():
                    text = [(base / name).read_text() for name in (limit, used, "memory.stat")]
                    yield from _parse_cgroup(text[0], text[1], text[2], cached)


def _parse_cgroup(limit: str, used: str, stat: str, cached: tuple[str, ...]) -> Iterator[int]:
    """Yield the bytes left under a limit, nothing where it is "max"."""
    if limit.strip() != "max":
        rows = (line.split() for line in stat.splitlines())
        given_back = sum(int(count) for name, count in rows if name in cached)
        yield max(int(limit) - int(used) + given_back, 0)


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
