"""The table of chips: every number has its source, and what is unknown stays unknown."""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import urlsplit

import pytest

from fastvlm_mlx.bench.chips import CHIPS, chip_peaks, find_chip
from fastvlm_mlx.bench.results import MachineCard

NUMBERS = ("gpu_cores", "memory_bandwidth_bytes_s", "fp16_flops", "fp32_flops")


def test_every_number_has_a_source_and_no_source_stands_without_one() -> None:
    for chip in CHIPS:
        given = {name for name in NUMBERS if getattr(chip, name) is not None}
        assert set(chip.sources) == given, chip.name
        assert given, f"{chip.name}: nothing is known of it"


def test_every_source_is_a_document_and_no_index() -> None:
    """A document's address has a date, a number or the chip in it, a person's or a shop's not."""
    for source in {source for chip in CHIPS for source in chip.sources.values()}:
        address = urlsplit(source)
        assert address.scheme == "https" and not address.query, source
        assert re.search(r"\d", address.path), source


def test_no_variant_is_listed_twice() -> None:
    variants = [(chip.name, chip.gpu_cores) for chip in CHIPS]
    assert len(set(variants)) == len(variants)


def test_the_families_of_m1_to_m5_and_the_phones_are_listed() -> None:
    names = {chip.name for chip in CHIPS}
    for generation in range(1, 6):
        assert {f"Apple M{generation}{tier}" for tier in ("", " Pro", " Max")} <= names
    assert {f"Apple A{n}" for n in ("15", "16", "18", "18 Pro", "19", "19 Pro")} <= names


@pytest.mark.parametrize(
    ("name", "cores", "gflops"),
    [("Apple M1", 8, 2617), ("Apple M1 Max", 32, 10617), ("Apple M2", 10, 3579)],
)
def test_derived_flops_are_those_their_source_gives(name: str, cores: int, gflops: int) -> None:
    chip = find_chip(name, cores)
    assert chip is not None
    assert chip.fp32_flops == pytest.approx(gflops * 1e9, rel=1e-3)


def test_a_chip_is_found_by_macoss_name_and_its_cores() -> None:
    chip = find_chip("Apple M3 Max", 30)
    assert chip is not None
    assert (chip.memory_bandwidth_bytes_s, chip.fp16_flops) == (300e9, None)


def test_without_its_cores_only_what_all_variants_share_is_known() -> None:
    shared, parted = find_chip("apple m1 max", None), find_chip("Apple M4 Max", None)
    assert shared is not None and parted is not None
    assert shared.memory_bandwidth_bytes_s == 400e9
    assert (shared.gpu_cores, shared.fp32_flops) == (None, None)
    assert parted.memory_bandwidth_bytes_s is None


@pytest.mark.parametrize(("name", "cores"), [("Apple M9", 10), ("AMD EPYC", None), ("Apple M1", 9)])
def test_an_unlisted_chip_is_not_guessed(name: str, cores: int | None) -> None:
    assert find_chip(name, cores) is None


def card(device: str, chip: str = "Apple M2 Ultra", cores: int | None = 76) -> MachineCard:
    return MachineCard(
        chip=chip,
        cpu_cores=24,
        gpu_cores=cores,
        memory_bytes=None,
        os="",
        power="",
        device=device,
        python="",
        mlx="",
        backend="",
        blas="",
        load_average=None,
    )


def test_a_gpus_peaks_are_those_of_the_dtype() -> None:
    peaks = chip_peaks(card("gpu"), "float16")
    assert peaks is not None
    assert (peaks.bandwidth_bytes_s, peaks.how) == (800e9, "specified, Apple M2 Ultra")
    assert peaks.flops_s == pytest.approx(76 * 256 * 1.398e9)


def test_of_a_macs_cpu_and_of_other_gpus_the_table_knows_nothing() -> None:
    assert chip_peaks(card("cpu"), "float32") is None
    assert chip_peaks(dataclasses.replace(card("gpu"), chip="NVIDIA H200"), "float16") is None
