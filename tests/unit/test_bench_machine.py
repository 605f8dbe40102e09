"""The machine card, from texts as the tools print them, and on the machine that runs the tests.

The Macs' texts are written after the formats of sysctl, pmset and system_profiler; no Mac was at
hand. Linux's are of this project's machines, shortened.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.bench import machine, system_text
from fastvlm_mlx.bench.file_cache import file_cache_state, resident_share
from fastvlm_mlx.bench.machine import machine_card

# A MacBook Pro, M1 Max, on its battery in low power mode

LAPTOP_SYSCTL = """machdep.cpu.brand_string: Apple M1 Max
hw.ncpu: 10
hw.memsize: 68719476736
kern.hv_vmm_present: 0
"""
LAPTOP_GPU = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "kHW_AppleM1MaxItem",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_ndrvs" : [
        { "_name" : "Color LCD", "_spdisplays_pixels" : "3456 x 2234" }
      ],
      "spdisplays_vendor" : "sppci_vendor_Apple",
      "sppci_bus" : "spdisplays_builtin",
      "sppci_cores" : "32",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Apple M1 Max"
    }
  ]
}"""
LAPTOP_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=21364835)\t83%; discharging; 4:12 remaining present: true
"""
LAPTOP_SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 lowpowermode         1
 displaysleep         2 (display sleep prevented by Google Chrome)
"""

# A Mac Studio, M2 Ultra

DESKTOP_GPU = LAPTOP_GPU.replace('"32"', '"76"').replace("M1 Max", "M2 Ultra")
DESKTOP_BATTERY = "Now drawing from 'AC Power'\n"
DESKTOP_SETTINGS = LAPTOP_SETTINGS.replace("lowpowermode         1", "lowpowermode         0")

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
flags\t\t: fpu vme de pse tsc msr hypervisor lahf_lm avx2

processor\t: 1
model name\t: AMD EPYC
flags\t\t: fpu vme
"""
ARM_CPUINFO = "processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd\nCPU part\t: 0x022\n"


def test_a_laptops_sysctl_and_gpu_are_read() -> None:
    values = system_text.key_values(LAPTOP_SYSCTL)
    assert values["machdep.cpu.brand_string"] == "Apple M1 Max"
    assert system_text.whole(values["hw.memsize"]) == 64 * 2**30
    assert system_text.apple_gpu(LAPTOP_GPU) == ("Apple M1 Max", 32)
    assert system_text.apple_gpu(DESKTOP_GPU) == ("Apple M2 Ultra", 76)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"SPDisplaysDataType": [{"_name": "Intel"}]}'])
def test_a_gpu_of_unknown_cores_has_none(text: str) -> None:
    assert system_text.apple_gpu(text) == ("", None)


@pytest.mark.parametrize(
    ("batteries", "settings", "words"),
    [
        (LAPTOP_BATTERY, LAPTOP_SETTINGS, "battery, 83 %, low power mode"),
        (LAPTOP_BATTERY, DESKTOP_SETTINGS, "battery, 83 %"),
        (DESKTOP_BATTERY, DESKTOP_SETTINGS, "mains"),
        ("Now drawing from 'UPS Power'\n", "", "UPS Power"),
        ("", "", ""),
    ],
)
def test_a_macs_power_source_is_said(batteries: str, settings: str, words: str) -> None:
    assert system_text.mac_power(batteries, settings) == words


MAINS = {"type": "Mains", "online": "1"}
UNPLUGGED = {"type": "Mains", "online": "0"}
BATTERY = {"type": "Battery", "status": "Discharging", "capacity": "71"}
MOUSE = BATTERY | {"scope": "Device", "capacity": "20"}


@pytest.mark.parametrize(
    ("supplies", "words"),
    [
        ([UNPLUGGED, BATTERY], "battery, 71 %"),
        ([MAINS, BATTERY | {"status": "Charging"}], "mains, 71 %"),
        ([MAINS, MOUSE], "mains"),
        ([], ""),
    ],
)
def test_linuxs_power_source_is_said(supplies: list[dict[str, str]], words: str) -> None:
    """A wireless mouse's battery is not the machine's."""
    assert system_text.linux_power(supplies) == words


def test_a_processors_name_and_its_hypervisor_are_read() -> None:
    assert system_text.cpu_name(CPUINFO) == "AMD EPYC"
    assert system_text.is_virtual(CPUINFO) is True
    assert system_text.is_virtual(CPUINFO.replace("hypervisor ", "")) is False
    assert system_text.cpu_name(ARM_CPUINFO) == ""
    assert system_text.is_virtual(ARM_CPUINFO) is None


def test_memory_is_read_in_bytes() -> None:
    assert (
        system_text.memory_total("MemTotal:       24684084 kB\nMemFree: 1 kB\n") == 24684084 * 1024
    )
    assert system_text.memory_total("") is None


def test_the_groups_that_limit_a_process_are_its_own_and_all_above() -> None:
    assert system_text.cgroup_paths("0::/a/b\n", "memory") == ["a/b", "a", ""]
    old = "9:name=systemd:/\n4:memory:/pods/7\n3:cpu,cpuacct:/\n0::/\n"
    assert system_text.cgroup_paths(old, "memory") == ["memory/pods/7", "memory/pods", "memory", ""]


def test_the_lowest_limit_counts_and_no_limit_is_none() -> None:
    assert system_text.lowest_limit(["max\n", "4294967296\n", "8589934592\n"]) == 2**32
    assert system_text.lowest_limit(["max\n", "", "9223372036854771712\n"]) is None


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2), ("150000 100000\n", 2), ("max 100000\n", None)]
)
def test_a_cpu_quota_is_whole_cores(text: str, cores: int | None) -> None:
    assert system_text.cpu_quota(text) == cores


def test_an_nvidia_gpu_is_read_and_its_absence_is_empty() -> None:
    assert system_text.nvidia_gpu("NVIDIA H200, 143771\n") == ("NVIDIA H200", 143771 * 2**20)
    assert system_text.nvidia_gpu("") == ("", None)
    assert system_text.nvidia_gpu("NVIDIA GB10, [N/A]\n") == ("", None)


def test_the_blas_is_the_global_openblas_and_not_numpys_own() -> None:
    lines = [
        "7f00-7f01 r-xp 0 fe:00 1  /env/numpy.libs/libopenblasp-r0.3.27.so",
        "7f02-7f03 r-xp 0 fe:00 2  /usr/lib/openblas-pthread/libopenblasp-r0.3.21.so",
        "7f04-7f05 rw-p 0 00:00 0",
    ]
    path = "/usr/lib/openblas-pthread/libopenblasp-r0.3.21.so"
    assert system_text.loaded_blas("\n".join(lines)) == ("OpenBLAS 0.3.21 (pthread)", path)
    assert system_text.loaded_blas(lines[0]) == ("", "")
    assert system_text.loaded_blas("x r-xp /usr/lib/libopenblas.so.0")[0] == "OpenBLAS"


# This machine


def test_this_machines_card_says_what_ran() -> None:
    card = machine_card()
    assert card.device in ("cpu", "gpu")
    assert card.cpu_cores is not None and 1 <= card.cpu_cores <= (os.cpu_count() or 1)
    assert card.python == ".".join(map(str, sys.version_info[:3]))
    assert card.mlx and card.os
    assert type(card)(**dataclasses.asdict(card)) == card


def test_without_any_tool_or_file_the_card_is_empty_but_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(machine, "_entries", lambda folder: [])
    monkeypatch.setattr(sys, "platform", "darwin")
    mac = machine_card()
    assert (mac.chip, mac.gpu_cores, mac.memory_bytes, mac.power) == ("", None, None, "")
    assert mac.virtual is None
    monkeypatch.setattr(sys, "platform", "linux")
    linux = machine_card()
    assert (linux.memory_bytes, linux.power, linux.virtual) == (None, "", None)


def test_a_failing_tool_says_nothing() -> None:
    assert machine._run("false") == ""
    assert machine._run("no-such-tool-anywhere") == ""


# The file cache

kept_by_the_system = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="mincore is asked on Linux and macOS only"
)


@kept_by_the_system
def test_a_file_just_written_is_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**20))
    assert resident_share(file) == 1.0
    assert file_cache_state([file]) == "warm"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
def test_a_file_dropped_from_memory_is_cold(tmp_path: Path) -> None:
    file, other = tmp_path / "weights", tmp_path / "more"
    for each in (file, other):
        each.write_bytes(bytes(2**20))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_share(file) == 1.0:
        pytest.skip("this file system keeps its files in memory")
    assert file_cache_state([file]) == "cold"
    assert file_cache_state([file, other]) == "unknown"


def test_of_no_file_and_of_an_empty_one_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resident_share(tmp_path / "empty") is None
    assert file_cache_state([tmp_path / "empty"]) == "unknown"
    assert file_cache_state([]) == "unknown"
