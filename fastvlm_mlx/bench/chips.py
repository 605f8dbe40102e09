"""Apple's chips: GPU cores, memory bandwidth and peak arithmetic, each number with its source.

Apple names a chip's GPU cores and, for Macs, its memory bandwidth, but no clock and no FLOPS. Those
here are cores x 128 multiply-adds x clock, where somebody measured the clock: so for M1, M2 and
A15. What has no source, or sources that disagree, is None: the probe then stands alone. Read in
November 2026; a chip that Apple had not announced in any source read is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastvlm_mlx.bench.limits import Peaks
from fastvlm_mlx.bench.results import MachineCard

_TURNER = "https://github.com/philipturner"
METAL_BENCHMARKS = (
    f"{_TURNER}/metal-benchmarks/blob/936d911ef61c2e45c336ae94f1bedf9c26b58c9e/README.md"
)
"""Clocks of A15, M1 and M2; 256 operations a clock and core (A15 on), float16 as float32."""
APPLE_GPU_INFO = (
    f"{_TURNER}/applegpuinfo/blob/19055ad90a102c1decebad0acb2f908b7190d1f1/"
    "Sources/AppleGPUInfo/AppleGPUInfo.swift"
)
"""Clocks of the M2 family, 128 multiply-adds a core; M1's memory: 4.266 GT/s on 128 bits."""
_FLOPS_A_CLOCK = 2 * 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One variant of a chip. None is unknown; `sources` has an address for each number given."""

    name: str
    gpu_cores: int | None
    memory_bandwidth_bytes_s: float | None = None
    fp16_flops: float | None = None
    fp32_flops: float | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def peaks(self, dtype: str) -> Peaks:
        """Return what it can do in a second in `dtype`, as far as known.

        bfloat16 counts as float32: whether a GPU is faster in it was nowhere specified.
        """
        flops = self.fp16_flops if dtype == "float16" else self.fp32_flops
        return Peaks(
            flops_s=flops,
            bandwidth_bytes_s=self.memory_bandwidth_bytes_s,
            dtype=dtype,
            how=f"specified, {self.name}",
        )


# (name, GPU cores, GB/s, GPU MHz, where cores, bandwidth and clock are from). A bandwidth that a
# page gives for a chip, with no word about variants, stands for all of them.
_Row = tuple[str, int | None, float | None, float | None, str, str, str]

_M1_PRO_MAX = (
    "https://econotimes.com/"
    "M1-Pro-vs-M1-Max-specs-New-MacBook-Pros-arrive-with-new-Apple-silicon-chips-1619511"
)
_M1_ULTRA = "https://thetechportal.com/2022/03/09/apple-mac-studio-display-m1-ultra-chip/"
_M1_SEVEN = (
    "https://www.ibtimes.com/why-apples-baseline-macbook-air-m1-chip-only-has-7-core-gpu-3081008"
)
_M2 = (
    "https://www.macrumors.com/2022/06/06/"
    "apple-announces-m2-chip-with-support-for-up-to-24gb-memory/"
)
_M2_EIGHT = "https://news.punchjump.com/2022/07/24/macbook-air-m2-review-stuck-in-mid-air/"
_M2_PRO_MAX_CORES = "https://www.xda-developers.com/macbook-pro-2023/"
_PRO_MEMORY = "https://gigazine.net/gsc_news/en/20231101-apple-m3-pro-memory-bandwidth"
_M2_MAX_ULTRA = "https://www.techspot.com/news/98961-apple-launches-new-mac-studio-m2-max-m2.html"
_M3 = "https://www.idownloadblog.com/2023/10/30/imac-m3-chip/"
_M3_MAX = "https://support.apple.com/en-au/117737"
_STUDIO_2025 = "https://english.worldmagazine.it/431260"
_M4_EIGHT = "https://wccftech.com/apple-imac-features-a-slower-m4-thanks-to-chip-binning"
_M4_AND_PRO = "https://support.apple.com/en-sg/121555"
_M4_MAX = "https://www.macrumors.com/2024/10/30/apple-announces-m4-max-chip/"
_M5 = (
    "https://www.tomshardware.com/pc-components/cpus/apple-unveils-m5-chip-with-10-core-cpu-and-"
    "10-core-gpu-company-says-3nm-chip-offers-4x-peak-gpu-performance-over-m4-for-ai-45-percent-"
    "graphics-uplift"
)
_M5_PRO_MAX = "https://hothardware.com/news/apple-unveils-macbook-pro-m5-pro-m5-max"
_M5_VARIANTS = (  # of the 32 cores' memory sources disagree
    "https://www.notebookcheck.net/Apple-M5-Max-40-Core-GPU-Benchmarks-and-Specs.1245824.0.html"
)
_A18 = (
    "https://www.notebookcheck.net/"
    "Apple-A18-and-A18-Pro-announced-with-massive-CPU-and-GPU-performance-gains.886423.0.html"
)
_A19 = (
    "https://itc.ua/news/"
    "protsessory-apple-a19-pro-na-150-bystree-predshestvennykov-otlychyya-chypov-iphone-17-pro-air/"
)

_ROWS: tuple[_Row, ...] = (
    ("Apple M1", 7, 68.256, 1278, _M1_SEVEN, APPLE_GPU_INFO, METAL_BENCHMARKS),
    ("Apple M1", 8, 68.256, 1278, METAL_BENCHMARKS, APPLE_GPU_INFO, METAL_BENCHMARKS),
    ("Apple M1 Pro", 14, 200, 1296, _M1_PRO_MAX, _M1_PRO_MAX, METAL_BENCHMARKS),
    ("Apple M1 Pro", 16, 200, 1296, _M1_PRO_MAX, _M1_PRO_MAX, METAL_BENCHMARKS),
    ("Apple M1 Max", 24, 400, 1296, _M1_PRO_MAX, _M1_PRO_MAX, METAL_BENCHMARKS),
    ("Apple M1 Max", 32, 400, 1296, _M1_PRO_MAX, _M1_PRO_MAX, METAL_BENCHMARKS),
    ("Apple M1 Ultra", 64, 800, 1296, _M1_ULTRA, _M1_ULTRA, METAL_BENCHMARKS),
    ("Apple M2", 8, 100, 1398, _M2_EIGHT, _M2, METAL_BENCHMARKS),
    ("Apple M2", 10, 100, 1398, _M2, _M2, METAL_BENCHMARKS),
    ("Apple M2 Pro", 16, 200, 1398, _M2_PRO_MAX_CORES, _PRO_MEMORY, APPLE_GPU_INFO),
    ("Apple M2 Pro", 19, 200, 1398, _M2_PRO_MAX_CORES, _PRO_MEMORY, APPLE_GPU_INFO),
    ("Apple M2 Max", 30, 400, 1398, _M2_MAX_ULTRA, _M2_MAX_ULTRA, APPLE_GPU_INFO),
    ("Apple M2 Max", 38, 400, 1398, _M2_MAX_ULTRA, _M2_MAX_ULTRA, APPLE_GPU_INFO),
    ("Apple M2 Ultra", 60, 800, 1398, _M2_MAX_ULTRA, _M2_MAX_ULTRA, APPLE_GPU_INFO),
    ("Apple M2 Ultra", 76, 800, 1398, _M2_MAX_ULTRA, _M2_MAX_ULTRA, APPLE_GPU_INFO),
    ("Apple M3", 8, 100, None, _M3, _M3, ""),
    ("Apple M3", 10, 100, None, _M3, _M3, ""),
    ("Apple M3 Pro", 14, 150, None, _PRO_MEMORY, _PRO_MEMORY, ""),
    ("Apple M3 Pro", 18, 150, None, _M3_MAX, _M3_MAX, ""),
    ("Apple M3 Max", 30, 300, None, _M3_MAX, _M3_MAX, ""),
    ("Apple M3 Max", 40, 400, None, _M3_MAX, _M3_MAX, ""),
    ("Apple M3 Ultra", 60, 819, None, _STUDIO_2025, _STUDIO_2025, ""),
    ("Apple M3 Ultra", 80, 819, None, _STUDIO_2025, _STUDIO_2025, ""),
    ("Apple M4", 8, 120, None, _M4_EIGHT, _M4_AND_PRO, ""),
    ("Apple M4", 10, 120, None, _M4_AND_PRO, _M4_AND_PRO, ""),
    ("Apple M4 Pro", 16, 273, None, _M4_AND_PRO, _M4_AND_PRO, ""),
    ("Apple M4 Pro", 20, 273, None, _M4_AND_PRO, _M4_AND_PRO, ""),
    ("Apple M4 Max", 32, 410, None, _STUDIO_2025, _STUDIO_2025, ""),
    ("Apple M4 Max", 40, 546, None, _M4_MAX, _M4_MAX, ""),
    ("Apple M5", 8, 153, None, _M5_VARIANTS, _M5, ""),
    ("Apple M5", 10, 153, None, _M5, _M5, ""),
    ("Apple M5 Pro", 20, 307, None, _M5_PRO_MAX, _M5_PRO_MAX, ""),
    ("Apple M5 Max", 32, None, None, _M5_VARIANTS, "", ""),
    ("Apple M5 Max", 40, 614, None, _M5_PRO_MAX, _M5_PRO_MAX, ""),
    # No source read states a phone's bandwidth but as a leak, and A17 Pro's cores but as a rumour.
    ("Apple A15", 5, None, 1336, METAL_BENCHMARKS, "", METAL_BENCHMARKS),
    ("Apple A16", 5, None, None, METAL_BENCHMARKS, "", ""),
    ("Apple A18", 5, None, None, _A18, "", ""),
    ("Apple A18 Pro", 6, None, None, _A18, "", ""),
    ("Apple A19", 5, None, None, _A19, "", ""),
    ("Apple A19 Pro", 5, None, None, _A19, "", ""),
    ("Apple A19 Pro", 6, None, None, _A19, "", ""),
)


def _chip(row: _Row) -> Chip:
    name, cores, gb_s, mhz, cores_from, memory_from, clock_from = row
    flops = None if mhz is None or cores is None else cores * _FLOPS_A_CLOCK * mhz * 1e6
    given = {
        "gpu_cores": cores_from,
        "memory_bandwidth_bytes_s": memory_from,
        "fp16_flops": clock_from,
        "fp32_flops": clock_from,
    }
    return Chip(
        name=name,
        gpu_cores=cores,
        memory_bandwidth_bytes_s=None if gb_s is None else gb_s * 1e9,
        fp16_flops=flops,
        fp32_flops=flops,
        sources={number: source for number, source in given.items() if source},
    )


CHIPS: tuple[Chip, ...] = tuple(_chip(row) for row in _ROWS)


def find_chip(name: str, gpu_cores: int | None) -> Chip | None:
    """Return the chip called `name` as macOS does ("Apple M3 Max"), of so many GPU cores.

    Where the cores are unknown, only what all its variants share is known of it. None for a name
    or a number of cores that is not listed.
    """
    variants = [chip for chip in CHIPS if chip.name.casefold() == name.strip().casefold()]
    if gpu_cores is not None:
        return next((chip for chip in variants if chip.gpu_cores == gpu_cores), None)
    if not variants:
        return None
    if len(variants) == 1:
        return variants[0]
    shared = {chip.memory_bandwidth_bytes_s for chip in variants}
    memory = shared.pop() if len(shared) == 1 else None
    where = "memory_bandwidth_bytes_s"
    sources = {where: variants[0].sources[where]} if memory is not None else {}
    return replace(
        variants[0],
        gpu_cores=None,
        memory_bandwidth_bytes_s=memory,
        fp16_flops=None,
        fp32_flops=None,
        sources=sources,
    )


def chip_peaks(machine: MachineCard, dtype: str) -> Peaks | None:
    """Return the specified peaks of a machine's GPU in `dtype`; None if it runs on anything else.

    The table is about GPUs: of a Mac's CPU it knows nothing.
    """
    if machine.device != "gpu":
        return None
    chip = find_chip(machine.chip, machine.gpu_cores)
    return None if chip is None else chip.peaks(dtype)
