"""On Linux an installed OpenBLAS takes the place of the slow BLAS inside MLX's wheel."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest


def _has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="the Linux wheel's BLAS is meant")
@pytest.mark.skipif(not _has_openblas(), reason="needs libopenblas0-pthread")
@pytest.mark.parametrize(
    ("first", "loaded"), [("fastvlm_mlx, mlx.core", True), ("mlx.core, fastvlm_mlx", False)]
)
def test_openblas_is_loaded_before_mlx_or_not_at_all(first: str, loaded: bool) -> None:
    code = f"import {first}; print('libopenblas' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)


@pytest.mark.skipif(sys.platform != "linux", reason="the Linux wheel's BLAS is meant")
@pytest.mark.skipif(not _has_openblas(), reason="needs libopenblas0-pthread")
def test_the_tests_themselves_run_on_openblas() -> None:
    """A conftest that imported mlx.core first made CI's tower at 1024 px take minutes."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        assert "libopenblas" in maps.read()
