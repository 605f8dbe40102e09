"""The same weights in every layout that people hold give the same 32 greedy ids.

The folders are written by `source_folders.py`, which shares no table with fastvlm_mlx and is held
against inventories of timm, Apple's code and mlx-vlm in `test_sources.py`. Quantized folders are
held against their float32 twin, unpacked in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import quantizing
import source_folders as folders
import sources
from asking import CASES, DEMO, barred_ids, rendered
from fileformats import Stored, stored
from numpy.typing import NDArray
from sources import Source

import fastvlm_mlx as fv
from fastvlm_mlx.errors import CheckpointMismatch

Ids = dict[str, list[int]]
# Text only, one picture, a picture to pad, two pictures.
ASKED = ("text only", "one image", "landscape", "two images")

# name: (layout that must be recognised, how the folder is written)
LAYOUTS: dict[str, tuple[str, Callable[[Path, Source], Path]]] = {
    "timm training form": ("fast_vlm", lambda f, s: folders.write_fast_vlm(f, s, "F16")),
    "timm fused": ("fast_vlm", lambda f, s: folders.write_fast_vlm(f, s.fused())),
    "apple": ("llava_qwen2", lambda f, s: folders.write_apple(f, s.fused())),
    "apple sharded": ("llava_qwen2", lambda f, s: folders.write_apple(f, s.fused(), shards=3)),
    "apple bin": ("llava_qwen2", lambda f, s: folders.write_apple(f, s.fused(), suffix="bin")),
    "apple bin sharded": (
        "llava_qwen2",
        lambda f, s: folders.write_apple(f, s.fused(), suffix="bin", shards=2),
    ),
    "apple training form": ("llava_qwen2", lambda f, s: folders.write_apple(f, s, "F16")),
    "apple training form bin": (
        "llava_qwen2",
        lambda f, s: folders.write_apple(f, s, "F16", suffix="bin"),
    ),
    "mlx-vlm": ("mlx-vlm", lambda f, s: folders.write_mlx_vlm(f, s, "F32")),
}


@pytest.fixture(scope="module")
def source() -> Source:
    return sources.read_source(DEMO)


def ids_of(engine: fv.Engine) -> Ids:
    """32 ids a prompt; stop ids are barred, so that all of them are words."""
    return {name: barred_ids(engine, CASES[name]) for name in ASKED}


def load(folder: Path, vision_from: Path | None = None, keep_quantized: bool = False) -> fv.Engine:
    return fv.load(folder, dtype="float32", vision_from=vision_from, keep_quantized=keep_quantized)


@pytest.fixture(scope="module")
def demo_ids() -> Ids:
    return ids_of(load(DEMO))


def test_answers_differ_from_case_to_case(demo_ids: Ids) -> None:
    """Else equal ids would prove nothing about pictures."""
    assert len({tuple(ids) for ids in demo_ids.values()}) == len(ASKED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_demo_models_ids(
    tmp_path: Path, source: Source, demo_ids: Ids, name: str
) -> None:
    layout, write = LAYOUTS[name]
    engine = load(write(tmp_path / "model", source))
    assert engine.layout == layout
    assert engine.config.decoder.tied  # Apple's lm_head is there and equal: held once
    assert ids_of(engine) == demo_ids


def test_slow_tokenizer_files_give_the_same_prompt_ids(tmp_path: Path, source: Source) -> None:
    """Apple's folders have vocab.json and merges.txt, and no tokenizer.json."""
    apple, demo = load(folders.write_apple(tmp_path / "apple", source.fused())), load(DEMO)
    assert not (tmp_path / "apple" / "tokenizer.json").exists()
    for case in CASES.values():
        assert rendered(apple, case) == rendered(demo, case)


def test_untied_head_is_used_whatever_the_config_says(
    tmp_path: Path, source: Source, demo_ids: Ids
) -> None:
    """Ports took the tied path for the untied 7B, or believed the flag against the tensors."""
    untied = source.untied()
    engines = [
        load(folders.write_fast_vlm(tmp_path / "fast_vlm", untied)),
        load(folders.write_apple(tmp_path / "apple", untied.fused())),
        load(folders.write_mlx_vlm(tmp_path / "mlx", untied, "F32")),
    ]
    assert not any(engine.config.decoder.tied for engine in engines)
    first, *others = [ids_of(engine) for engine in engines]
    assert first != demo_ids
    assert all(ids == first for ids in others)


def twin(tmp_path: Path, source: Source, tensors: Mapping[str, NDArray[np.float32]]) -> Ids:
    """Ids of the mlx-vlm folder that holds these values as float32."""
    whole = {key: stored(values, "F32") for key, values in tensors.items()}
    return ids_of(load(folders.write_mlx_vlm(tmp_path / "twin", source, tensors=whole)))


def test_bfloat16_folder_equals_its_float32_twin(tmp_path: Path, source: Source) -> None:
    engine = load(folders.write_mlx_vlm(tmp_path / "bf16", source, "BF16"))
    rounded = quantizing.bfloat16_rounded(sources.mlx_tensors(source))
    assert ids_of(engine) == twin(tmp_path, source, rounded)


MIXED = {"language_model.model.layers.0.mlp.down_proj": 8, "mm_projector.0": 8}


@pytest.mark.parametrize(
    ("bits", "dtype", "overrides"), [(4, "BF16", {}), (8, "BF16", {}), (4, "F16", MIXED)]
)
@pytest.mark.parametrize("untied", [False, True])
def test_quantized_folder_equals_its_dequantized_twin(
    tmp_path: Path, source: Source, bits: int, dtype: str, overrides: dict[str, int], untied: bool
) -> None:
    """embed_tokens, lm_head and mm_projector are quantized too, as mlx-vlm does; bits may mix."""
    if untied:
        source = source.untied()
    tensors = sources.mlx_tensors(source)
    packed, floats, quantization = quantizing.quantize(tensors, bits, dtype, overrides)
    assert "mm_projector.0.scales" in packed
    assert ("language_model.lm_head.scales" in packed) is untied
    folder = folders.write_mlx_vlm(
        tmp_path / "packed", source, tensors=packed, quantization=quantization
    )
    wanted = twin(tmp_path, source, floats)
    assert ids_of(load(folder)) == wanted
    assert ids_of(load(folder, keep_quantized=True)) == wanted


def app_export(tmp_path: Path, source: Source) -> tuple[Path, Path]:
    """Return (Apple's export for its app, the mlx-vlm folder with the same decoder and a tower)."""
    packed: dict[str, Stored]
    packed, _, quantization = quantizing.quantize(sources.mlx_tensors(source), 8, "F16")
    whole = folders.write_mlx_vlm(
        tmp_path / "whole", source, tensors=packed, quantization=quantization
    )
    return folders.write_app(tmp_path / "app", source, packed, quantization), whole


def test_app_export_with_a_tower_from_elsewhere_gives_the_same_ids(
    tmp_path: Path, source: Source
) -> None:
    app, whole = app_export(tmp_path, source)
    assert ids_of(load(app, vision_from=whole)) == ids_of(load(whole))


def test_app_export_alone_says_that_the_tower_is_elsewhere(tmp_path: Path, source: Source) -> None:
    app, _ = app_export(tmp_path, source)
    with pytest.raises(CheckpointMismatch, match=r"no vision tower.*--vision-from"):
        load(app)
