"""The same weights in every layout that people hold give the same features and 32 greedy ids.

Ids alone let a tower pass whose every kernel was transposed (tried): the pictures are too plain.

The folders are written by `source_folders.py`, which shares no table with fastvlm_mlx and is held
against inventories of timm, Apple's code and mlx-vlm in `test_sources.py`. Quantized folders are
held against their float32 twin, unpacked in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import demo_cases
import mlx.core as mx
import numpy as np
import pytest
import quantizing
import source_folders as folders
import sources
from asking import CASES, DEMO, barred_ids, relative_rms, rendered
from fileformats import Stored, stored
from numpy.typing import NDArray
from sources import Source

import fastvlm_mlx as fv
from fastvlm_mlx.errors import CheckpointMismatch

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`


@dataclass(frozen=True)
class Answers:
    """What one loaded folder says: ids by case, projected features [tokens, hidden]."""

    ids: dict[str, list[int]]
    features: NDArray[np.float32]


# No picture, one to pad, two.
ASKED = ("text only", "landscape", "two images")

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


def answers_of(engine: fv.Engine) -> Answers:
    """32 ids a prompt, all of them words since stop ids are barred, and a picture's features."""
    features = engine.encode(demo_cases.picture("portrait")).features
    ids = {name: barred_ids(engine, CASES[name]) for name in ASKED}
    return Answers(ids, np.array(features.astype(mx.float32)))


def assert_same(ours: Answers, theirs: Answers) -> None:
    assert ours.ids == theirs.ids
    assert relative_rms(ours.features, theirs.features) <= 1e-5


def load(folder: Path, vision_from: Path | None = None, keep_quantized: bool = False) -> fv.Engine:
    return fv.load(folder, dtype="float32", vision_from=vision_from, keep_quantized=keep_quantized)


@pytest.fixture(scope="module")
def demo_answers() -> Answers:
    return answers_of(load(DEMO))


def test_answers_differ_from_case_to_case(demo_answers: Answers) -> None:
    """Else equal ids would prove nothing about pictures."""
    assert len({tuple(ids) for ids in demo_answers.ids.values()}) == len(ASKED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_demo_models_ids(
    tmp_path: Path, source: Source, demo_answers: Answers, name: str
) -> None:
    layout, write = LAYOUTS[name]
    engine = load(write(tmp_path / "model", source))
    assert engine.layout == layout
    assert engine.config.decoder.tied  # Apple's lm_head is there and equal: held once
    assert_same(answers_of(engine), demo_answers)


def test_slow_tokenizer_files_give_the_same_prompt_ids(tmp_path: Path, source: Source) -> None:
    """Apple's folders have vocab.json and merges.txt, and no tokenizer.json."""
    apple, demo = load(folders.write_apple(tmp_path / "apple", source.fused())), load(DEMO)
    assert not (tmp_path / "apple" / "tokenizer.json").exists()
    for case in CASES.values():
        assert rendered(apple, case) == rendered(demo, case)


def test_untied_head_is_used_whatever_the_config_says(
    tmp_path: Path, source: Source, demo_answers: Answers
) -> None:
    """Ports took the tied path for the untied 7B, or believed the flag against the tensors."""
    untied = source.untied()
    engines = [
        load(folders.write_fast_vlm(tmp_path / "fast_vlm", untied)),
        load(folders.write_apple(tmp_path / "apple", untied.fused())),
        load(folders.write_mlx_vlm(tmp_path / "mlx", untied, "F32")),
    ]
    assert not any(engine.config.decoder.tied for engine in engines)
    first, *others = [answers_of(engine) for engine in engines]
    assert first.ids != demo_answers.ids
    for other in others:
        assert_same(other, first)


def twin(tmp_path: Path, source: Source, tensors: Mapping[str, NDArray[np.float32]]) -> Answers:
    """Answers of the mlx-vlm folder that holds these values as float32."""
    whole = {key: stored(values, "F32") for key, values in tensors.items()}
    return answers_of(load(folders.write_mlx_vlm(tmp_path / "twin", source, tensors=whole)))


def test_bfloat16_folder_equals_its_float32_twin(tmp_path: Path, source: Source) -> None:
    engine = load(folders.write_mlx_vlm(tmp_path / "bf16", source, "BF16"))
    rounded = quantizing.bfloat16_rounded(sources.mlx_tensors(source))
    assert_same(answers_of(engine), twin(tmp_path, source, rounded))


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
    assert_same(answers_of(load(folder)), wanted)
    assert_same(answers_of(load(folder, keep_quantized=True)), wanted)


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
    assert_same(answers_of(load(app, vision_from=whole)), answers_of(load(whole)))


def test_app_export_alone_says_that_the_tower_is_elsewhere(tmp_path: Path, source: Source) -> None:
    app, _ = app_export(tmp_path, source)
    with pytest.raises(CheckpointMismatch, match=r"no vision tower.*--vision-from"):
        load(app)
