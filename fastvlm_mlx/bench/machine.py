"""What a benchmark ran on: chip, memory, power source, MLX and its BLAS, as far as can be found.

Knows which tool or file says what; `system_text.py` reads their formats. A tool that is missing, a
file that is not there, a format that changed: the field stays empty, and nothing fails.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.backend import BACKENDS
from fastvlm_mlx.bench import system_text
from fastvlm_mlx.bench.results import MachineCard

_CGROUPS = Path("/sys/fs/cgroup")
_TOOL_SECONDS = 20


def machine_card() -> MachineCard:
    """Describe this machine and the device MLX runs on now, which is selected before."""
    device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    found = _macos() if sys.platform == "darwin" else _linux(device)
    return MachineCard(
        chip=found.chip,
        cpu_cores=found.cpu_cores or os.cpu_count(),
        gpu_cores=found.gpu_cores,
        memory_bytes=found.memory_bytes,
        os=found.os,
        power=found.power,
        device=device,
        python=platform.python_version(),
        mlx=_version("mlx"),
        backend=_backend(),
        blas=found.blas,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        virtual=found.virtual,
    )


class _Found:
    """What one operating system's tools said."""

    def __init__(self) -> None:
        self.chip = ""
        self.cpu_cores: int | None = None
        self.gpu_cores: int | None = None
        self.memory_bytes: int | None = None
        self.os = ""
        self.power = ""
        self.blas = ""
        self.virtual: bool | None = None


def _macos() -> _Found:
    found = _Found()
    names = ("machdep.cpu.brand_string", "hw.ncpu", "hw.memsize", "kern.hv_vmm_present")
    # One call each: an unknown name makes sysctl fail as a whole.
    values = system_text.key_values("\n".join(_run("sysctl", name) for name in names))
    model, found.gpu_cores = system_text.apple_gpu(
        _run("system_profiler", "SPDisplaysDataType", "-json")
    )
    found.chip = values.get("machdep.cpu.brand_string", "") or model
    found.cpu_cores = system_text.whole(values.get("hw.ncpu"))
    found.memory_bytes = system_text.whole(values.get("hw.memsize"))
    found.os = f"macOS {platform.mac_ver()[0]}"
    found.power = system_text.mac_power(_run("pmset", "-g", "batt"), _run("pmset", "-g"))
    found.blas = "Accelerate"
    present = values.get("kern.hv_vmm_present")
    found.virtual = None if present is None else present == "1"
    return found


def _linux(device: str) -> _Found:
    found = _Found()
    cpuinfo, groups = _read("/proc/cpuinfo"), _read("/proc/self/cgroup")
    if device == "gpu":
        found.chip, found.memory_bytes = system_text.nvidia_gpu(_nvidia_smi())
    else:
        found.chip = system_text.cpu_name(cpuinfo) or platform.processor() or platform.machine()
        found.memory_bytes = _memory_bytes(groups)
    found.cpu_cores = _cpu_cores(groups)
    found.os = f"{_distribution()}, {platform.system()} {platform.release()}".lstrip(", ")
    found.power = system_text.linux_power(
        {name: _read(supply / name).strip() for name in ("type", "online", "status", "capacity")}
        | {"scope": _read(supply / "scope").strip()}
        for supply in _entries("/sys/class/power_supply")
    )
    found.blas = _blas() if device == "cpu" else ""
    found.virtual = system_text.is_virtual(cpuinfo)
    return found


def _memory_bytes(groups: str) -> int | None:
    """The machine's memory, or less where this process may not have all of it."""
    limit = system_text.lowest_limit(
        _read(_CGROUPS / path / name)
        for path in system_text.cgroup_paths(groups, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    known = [limit, system_text.memory_total(_read("/proc/meminfo"))]
    return min((value for value in known if value is not None), default=None)


def _cpu_cores(groups: str) -> int | None:
    """The cores this process may use."""
    quotas = [
        system_text.cpu_quota(_read(_CGROUPS / path / "cpu.max"))
        for path in system_text.cgroup_paths(groups, "cpu")
    ]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min((cores for cores in [allowed, *quotas] if cores is not None), default=None)


def _nvidia_smi() -> str:
    """nvidia-smi's line about the GPU that CUDA counts first, where that is said by number."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    which = ["-i", first] if first.isdecimal() else []
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    return _run("nvidia-smi", *which, *query)


def _blas() -> str:
    """The BLAS of MLX's products on a CPU: a global OpenBLAS, else the one in MLX's wheel."""
    name, path = system_text.loaded_blas(_read("/proc/self/maps"))
    if not name:
        return "as in MLX's wheel"
    try:
        threads = int(ctypes.CDLL(path).openblas_get_num_threads())
    except (OSError, AttributeError):
        return name
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def _backend() -> str:
    """The installed backend's distribution and version, "" if it has none of its own."""
    for name in ("mlx-metal", *BACKENDS):
        version = _version(name)
        if version:
            return f"{name} {version}"
    return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _run(*command: str) -> str:
    """What a tool prints; "" if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TOOL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str | Path) -> str:
    """A small file's text; "" if it is not there or not ours to read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _entries(folder: str) -> list[Path]:
    try:
        return sorted(Path(folder).iterdir())
    except OSError:
        return []
