"""The verifier against mlx-vlm itself: what mlx-vlm refuses to load, `verify` fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import header_folders
from planted_faults import FAULTS

from fastvlm_mlx.convert import verify

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

REFERENCE = json.loads((Path(__file__).parent / "verify_mlx_vlm.json").read_text())["folders"]

# What loads there and does not work: a rotation that was never trained, pictures that are dropped,
# a model type without a prompt format, weights that are no floats.
LOADS_BUT_FAILS = {"linear rope", "fractions in mrope", "an image id", "model type fastvlm"}
LOADS_BUT_FAILS |= {"whole numbers"}


@pytest.mark.parametrize("run", REFERENCE)
def test_verify_fails_just_what_mlx_vlm_does_not_load_or_loads_in_vain(
    run: str, tmp_path: Path
) -> None:
    """`make_verify_reference.py` had mlx-vlm 0.7.10 load each of these folders."""
    good = header_folders.write_native(tmp_path / "good", run)
    for fault, error in REFERENCE[run].items():
        folder = header_folders.copy_folder(good, tmp_path / fault.replace("/", " "))
        if fault != "nothing":
            FAULTS[fault](folder)
        failed = [f for f in verify.verify(folder, "mlx-vlm") if f.passed is False]
        assert bool(failed) == (error is not None or fault in LOADS_BUT_FAILS), (fault, failed)
    assert sum(error is not None for error in REFERENCE[run].values()) >= 8
