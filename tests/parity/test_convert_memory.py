"""Converting holds one module at a time: memory does not grow with the model.

`benchmarks/conversion.py` measures the same at 7B by the system's own count.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
import test_real_sizes
from asking import DEMO

from fastvlm_mlx.convert.pipeline import MakeRecipe, convert
from fastvlm_mlx.quantize.recipes import make_recipe

# Apple's tower and a decoder of many small layers: hidden, layers, heads, kv heads, inner, rows.
SIZE = (512, 16, 8, 2, 4096, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, partial(make_recipe, "balanced", bits=4)])
@pytest.mark.parametrize("form", ["fused", "training"])
def test_the_peak_is_a_module_and_not_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    recipe: MakeRecipe | None,
) -> None:
    monkeypatch.setitem(test_real_sizes.SIZES, "small", SIZE)
    source = test_real_sizes.apple_folder(tmp_path / "source", "small", form)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    written = convert(source, tmp_path / "native", recipe=recipe).weight_bytes
    peak = mx.get_peak_memory() - before
    # Measured: 20 MiB fused, that is one tensor, the largest; 38 in training form.
    assert peak < 60 * 2**20
    assert written > 300 * 2**20
    assert mx.get_active_memory() - before < 2**20
