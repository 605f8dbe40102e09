"""The folder for Apple's app: its files as Apple's own, and the same answers in our engine.

Counts and sizes are those of Apple's released exports, as listed by the hub (FORMATS B3).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
import source_folders as folders
import sources
from asking import DEMO
from make_mlx_vlm_reference import inventory
from test_real_sizes import apple_folder

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.convert.app import export_app
from fastvlm_mlx.convert.parts import app_parts
from fastvlm_mlx.convert.safetensors_writer import index_json, plan_shards
from fastvlm_mlx.convert.verify import verify
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.quantize.recipes import make_recipe, plan_modules

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python")

PICTURE = DEMO.parents[1] / "examples" / "images" / "number_42.png"
FILES = {
    "README.md", "added_tokens.json", "config.json", "fastvithd.mlpackage", "merges.txt",
    "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "bits", "tensors", "index_bytes", "weight_bytes"),
    [("0.5b", 16, 295, 25_258, 1.27e9), ("1.5b", 8, 743, 63_292, 1.90e9)],
)
def test_real_sizes_have_the_tensors_and_bytes_of_apples_exports(
    tmp_path: Path, size: str, bits: int, tensors: int, index_bytes: int, weight_bytes: float
) -> None:
    """Apple kept lm_head, equal or not: `decide_tied`, which would drop it, is not asked here."""
    checkpoint = open_checkpoint(apple_folder(tmp_path / "model", size, "fused"))
    settings = {}
    if bits < 16:
        layers = checkpoint.config.decoder.num_layers
        recipe = make_recipe("uniform", bits=bits, num_layers=layers, projector=bits)
        settings, left = plan_modules(recipe, checkpoint.shapes)
        assert left == ()
    specs = [spec for part in app_parts(checkpoint, "float16", settings) for spec in part.specs]
    assert len(specs) == tensors
    assert len(json.dumps(index_json(plan_shards(specs)), indent=4)) == index_bytes
    assert sum(spec.nbytes for spec in specs) == pytest.approx(weight_bytes, rel=3e-3)


@pytest.fixture(scope="module", params=[16, 8, 4])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("app") / f"bits{request.param}"
    export_app("demo", folder, bits=request.param)
    return folder


def test_the_folder_holds_the_apps_files_and_answers_with_the_demos_tower(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    engine = fv.load(exported, vision_from="demo")
    assert engine.layout == "apple-app"
    answer = engine.generate("Describe the image.", images=[PICTURE]).text
    assert answer == "The number 42 in blue."


def test_everything_is_float16_or_packed_alike(exported: Path) -> None:
    rows = inventory(exported)
    assert {row[0] for row in rows.values()} <= {"F16", "U32"}
    quantization = json.loads((exported / "config.json").read_text()).get("quantization")
    packed = {key for key, row in rows.items() if row[0] == "U32"}
    matrices = {key for key, row in rows.items() if key.endswith(".weight") and len(row[1]) == 2}
    if exported.name == "bits16":
        assert quantization is None and not packed
    else:
        assert quantization == {"group_size": 64, "bits": int(exported.name[4:])}
        assert packed == matrices
    assert not [key for key in rows if "vision" in key]


def test_a_package_cut_short_by_a_byte_is_found_and_others_may_read_it(tmp_path: Path) -> None:
    """coremltools makes its folders for one user only; a copy cut short looks whole."""
    export_app("demo", tmp_path / "app", bits=4)
    package = tmp_path / "app" / "fastvithd.mlpackage"
    folder_mode = (tmp_path / "app").stat().st_mode & 0o777
    for place in package.rglob("*"):
        wanted = folder_mode if place.is_dir() else folder_mode & 0o666
        assert place.stat().st_mode & 0o777 == wanted
    weights = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"

    def finding() -> bool | None:
        found = {one.requirement: one.passed for one in verify(tmp_path / "app", "app")}
        return found["coreml.package"]

    assert finding() is True
    weights.write_bytes(weights.read_bytes()[:-1])
    assert finding() is False


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("once", "twice"):
        export_app("demo", tmp_path / name, bits=8, command="the command")
    once, twice = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")
         if p.is_file()}
        for name in ("once", "twice")
    )  # fmt: skip
    assert once == twice


def test_weights_are_the_native_folders_own_quantized_alike(tmp_path: Path) -> None:
    """One quantizer: what the app reads is bit for bit what `quantize` would write."""
    from fastvlm_mlx.convert.pipeline import convert

    export_app("demo", tmp_path / "app", bits=4)
    convert(
        "demo",
        tmp_path / "native",
        dtype="float16",
        recipe=partial(make_recipe, "uniform", bits=4, projector=4),
    )
    native = mx.load(str(tmp_path / "native" / "model.safetensors"))
    for key, array in mx.load(str(tmp_path / "app" / "model.safetensors")).items():
        name = key.replace("multi_modal_projector.linear_", "mm_projector.")
        assert mx.array_equal(array, native[name]), key


def test_what_the_app_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16, 8 or 4 bits, not 3"):
        export_app("demo", tmp_path / "app", bits=3)
    source = sources.read_source(DEMO).fused()
    first = {k: v for k, v in source.tensors.items() if "multi_modal_projector.linear_2" not in k}
    folder = folders.write_apple(
        tmp_path / "apple", sources.Source(first, source.config, source.folder)
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(ConfigError, match="one linear layer"):
        export_app(folder, tmp_path / "app", bits=4)
