"""The probe of a machine's peaks: what it reports and what it holds, never how fast it was."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from fastvlm_mlx.bench.probe import measure_peaks

SMALL = 2**20


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_probe_finds_both_peaks_and_says_how(dtype: mx.Dtype) -> None:
    peaks = measure_peaks(dtype, seconds=0.01, buffer_bytes=SMALL)
    assert peaks.flops_s and peaks.flops_s > 0
    assert peaks.bandwidth_bytes_s and peaks.bandwidth_bytes_s > 0
    assert f"mlx.core.{peaks.dtype}" == str(dtype)
    assert re.fullmatch(
        r"measured, the best of 3 rounds: a product of (256|512) x \1, "
        r"a (matrix times a vector|sum of two arrays)",
        peaks.how,
    )


def test_the_probe_holds_three_buffers_at_most_and_keeps_none() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    measure_peaks(mx.float32, seconds=0.01, buffer_bytes=SMALL)
    assert mx.get_peak_memory() - before <= 3.1 * SMALL
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() == 0
