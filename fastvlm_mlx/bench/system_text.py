"""What system tools and /proc print, as values: text in, values out.

Knows the formats of macOS's sysctl, pmset and system_profiler, of Linux's /proc and /sys and of
nvidia-smi. Runs and opens nothing. What is not in a text, or not as expected, is None or "".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping

# cgroup v1 writes "no limit" as the largest number of whole pages.
_NO_LIMIT = 2**62


def key_values(text: str) -> dict[str, str]:
    """Return the first value of each `key: value` line: sysctl, /proc/cpuinfo, /proc/meminfo."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def whole(text: str | None) -> int | None:
    """Return a whole number above 0 that a text is, else None."""
    stripped = (text or "").strip()
    return int(stripped) or None if stripped.isdecimal() else None


def apple_gpu(profile: str) -> tuple[str, int | None]:
    """Return (model, cores) of the first GPU in `system_profiler SPDisplaysDataType -json`."""
    try:
        gpus = json.loads(profile)["SPDisplaysDataType"]
        gpu = next(gpu for gpu in gpus if "sppci_cores" in gpu)
        return str(gpu.get("sppci_model", "")), whole(str(gpu["sppci_cores"]))
    except (ValueError, KeyError, TypeError, StopIteration):
        return "", None


def mac_power(batteries: str, settings: str) -> str:
    """Return the power source in words, from `pmset -g batt` and `pmset -g`.

    "battery, 83 %", "mains, 100 %", "mains" without a battery; "low power mode" is added.
    """
    source = re.search(r"drawing from '([^']+)'", batteries)
    if source is None:
        return ""
    words = [{"Battery Power": "battery", "AC Power": "mains"}.get(source[1], source[1])]
    charge = re.search(r"(\d+)%", batteries)
    if charge is not None:
        words.append(f"{charge[1]} %")
    if re.search(r"^\s*lowpowermode\s+1\s*$", settings, re.MULTILINE):
        words.append("low power mode")
    return ", ".join(words)


def linux_power(supplies: Iterable[Mapping[str, str]]) -> str:
    """Return the power source in words, from the files of each of /sys/class/power_supply."""
    found = list(supplies)
    online = any(supply.get("online") == "1" for supply in found if supply.get("type") != "Battery")
    # A peripheral's battery (a mouse's) says that its scope is the device.
    batteries = [
        supply
        for supply in found
        if supply.get("type") == "Battery" and supply.get("scope") != "Device"
    ]
    if not batteries:
        return "mains" if online else ""
    charge = batteries[0].get("capacity", "")
    source = "mains" if online or batteries[0].get("status") != "Discharging" else "battery"
    return f"{source}, {charge} %" if charge else source


def cpu_name(cpuinfo: str) -> str:
    """Return the processor's name in /proc/cpuinfo; "" on Arm, where there is none."""
    return key_values(cpuinfo).get("model name", "")


def is_virtual(cpuinfo: str) -> bool | None:
    """Whether the processor is a virtual machine's; None where /proc/cpuinfo has no such flag."""
    flags = key_values(cpuinfo).get("flags")
    return None if flags is None else "hypervisor" in flags.split()


def memory_total(meminfo: str) -> int | None:
    """Return the bytes of the machine's memory in /proc/meminfo."""
    kib = whole(key_values(meminfo).get("MemTotal", "").removesuffix("kB"))
    return None if kib is None else kib * 1024


def cgroup_paths(text: str, controller: str) -> list[str]:
    """Return the groups that limit this process, below /sys/fs/cgroup, from /proc/self/cgroup.

    Its own group and all above it, of cgroup v2 ("") and of v1's `controller`.
    """
    paths = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            paths.append("/".join([*([controller] if controllers else []), *parts[:depth]]))
    return paths


def lowest_limit(texts: Iterable[str]) -> int | None:
    """Return the smallest of some cgroup limits in bytes; "max" and v1's largest are none."""
    limits = [whole(text) for text in texts]
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def cpu_quota(text: str) -> int | None:
    """Return the cores that cgroup v2's cpu.max ("150000 100000") leaves, rounded up."""
    quota, _, period = text.strip().partition(" ")
    most, every = whole(quota), whole(period)
    return None if most is None or every is None else math.ceil(most / every)


def nvidia_gpu(csv: str) -> tuple[str, int | None]:
    """Return (name, bytes of memory) of the first GPU in nvidia-smi's csv of name, memory.total.

    `--format=csv,noheader,nounits`: memory is in MiB.
    """
    name, comma, mib = csv.strip().partition("\n")[0].rpartition(",")
    memory = whole(mib)
    if not comma or memory is None:
        return "", None
    return name.strip(), memory * 2**20


def loaded_blas(maps: str) -> tuple[str, str]:
    """Return (library in words, its path) of the OpenBLAS in /proc/self/maps, or ("", "").

    numpy's and scipy's own copies are left out: MLX does not call them.
    """
    for line in maps.splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if "/numpy" in path or "/scipy" in path:
            continue
        found = re.search(r"/libopenblas(p)?(?:-r([\d.]+?))?\.(?:so|dylib)", path)
        if found is not None:
            version = f" {found[2]}" if found[2] else ""
            return f"OpenBLAS{version}{' (pthread)' if found[1] else ''}", path
    return "", ""
