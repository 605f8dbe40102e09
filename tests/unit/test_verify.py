"""The verifier: folders that do for each consumer pass, and what it asks for is what they ask for.

The folders are `header_folders.py`'s, made from what mlx-vlm's own convert leaves, so a fault in
our tables of names cannot hide here.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import header_folders
import numpy as np
import pytest
from header_folders import copy_folder
from planted_faults import VISION, change_tensors, widen_projector

sys.path.insert(0, str(header_folders.TESTS / "parity"))

import sources

from fastvlm_mlx.convert import verify
from fastvlm_mlx.errors import CheckpointError, CheckpointMismatch
from tests.cli.command import edit_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("verified")
    made = {run: header_folders.write_native(root / run, run) for run in ("bf16", "f32", "q4")}
    return made | {"app": header_folders.write_app(root / "app")}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the folders, to be damaged; holes stay holes."""

    return lambda name: copy_folder(folders[name], tmp_path / "copy")


def failed(folder: Path, name: str) -> list[verify.Finding]:
    return [finding for finding in verify.verify(folder, name) if finding.passed is False]


# Passing


@pytest.mark.parametrize("run", ["bf16", "f32", "q4"])
@pytest.mark.parametrize("name", ["native", "mlx-vlm", "mlx-swift-lm"])
def test_what_mlx_vlm_converts_does_for_all_once_its_metadata_is_whole(
    folders: dict[str, Path], run: str, name: str
) -> None:
    assert failed(folders[run], name) == []
    assert all(finding.passed for finding in verify.verify(folders[run], name))
    assert verify.require(folders[run], name)


def test_the_app_folder_does_for_the_app(folders: dict[str, Path]) -> None:
    assert all(finding.passed for finding in verify.verify(folders["app"], "app"))


def test_an_untied_model_does_too(copy: Callable[[str], Path]) -> None:
    folder = copy("bf16")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    change_tensors(folder, add={"language_model.lm_head.weight": ("BF16", [1024, 128])})
    for name in ("native", "mlx-vlm", "mlx-swift-lm"):
        assert failed(folder, name) == []


def test_mixed_bits_do_for_all_when_both_spellings_are_written(
    copy: Callable[[str], Path],
) -> None:
    folder = copy("q4")
    widen_projector(folder, "mm_projector.0", "mm_projector.layers.0")
    for name in ("native", "mlx-vlm", "mlx-swift-lm"):
        assert failed(folder, name) == []


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
)
def test_other_modes_have_scales_of_bytes_and_no_biases(
    copy: Callable[[str], Path], mode: str, group_size: int, bits: int
) -> None:
    folder = copy("q4")
    floats = header_folders.mlx_vlm_run("bf16")[1]
    tensors = header_folders.read_weights(folder)
    for path in [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]:
        rows, columns = floats[f"{path}.weight"][1]
        tensors[f"{path}.weight"] = ("U32", [rows, columns * bits // 32])
        tensors[f"{path}.scales"] = ("U8", [rows, columns // group_size])
        del tensors[f"{path}.biases"]
    header_folders.write_weights(folder, tensors)
    setting = {"bits": bits, "group_size": group_size, "mode": mode}
    edit_json(folder / "config.json", quantization=setting, quantization_config=setting)
    for name in ("native", "mlx-vlm", "mlx-swift-lm"):
        assert failed(folder, name) == []


@pytest.mark.parametrize("name", ["native", "mlx-vlm", "mlx-swift-lm"])
def test_the_tensors_asked_for_are_those_of_mlx_vlms_convert(name: str, tmp_path: Path) -> None:
    """Name for name and shape for shape, by rules from the config, not by our own tables."""
    folder = header_folders.write_native(tmp_path / "folder", "bf16")
    assert asked(folder, name) == {
        key: tuple(shape) for key, (_, shape) in header_folders.mlx_vlm_run("bf16")[1].items()
    }


def test_the_tower_asked_for_is_apples(folders: dict[str, Path]) -> None:
    """Against an inventory made by Apple's own code: 629 tensors, 44 counters dropped."""
    inventory = header_folders.TESTS / "parity" / "keys_apple_fused.json"
    theirs = {}
    for name, shape in json.loads(inventory.read_text()).items():
        key = sources.mlx_key(name)
        if key is not None:
            theirs[key] = sources.mlx_array(key, np.broadcast_to(np.int8(0), shape)).shape
    tower = {k: s for k, s in asked(folders["bf16"], "mlx-swift-lm").items() if VISION in k}
    assert len(tower) == 585
    assert tower == theirs


def asked(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    from fastvlm_mlx.convert import verify_folder, verify_tensors

    source = verify.consumer(name)
    sizes = verify_tensors.read_sizes(verify_folder.Folder(folder), source.sizes)
    return {
        key: shape
        for requirement in source.requirements
        if requirement["check"] == "tensors"
        for key, shape in verify_tensors.expected(requirement, sizes)
    }


def test_the_apps_rope_scaling_may_be_null_or_have_sections(copy: Callable[[str], Path]) -> None:
    folder = copy("app")
    config = json.loads((folder / "config.json").read_text())
    for value in (None, {"mrope_section": [16, 24, 24], "type": "mrope"}):
        header_folders.write_json(folder / "config.json", config | {"rope_scaling": value})
        assert failed(folder, "app") == []


def test_what_rests_on_a_missing_file_is_left_unchecked_and_says_so(
    copy: Callable[[str], Path],
) -> None:
    folder = copy("bf16")
    (folder / "preprocessor_config.json").write_text("[]")
    findings = {finding.requirement: finding for finding in verify.verify(folder, "native")}
    assert [f.requirement for f in failed(folder, "native")] == ["files.preprocessor"]
    assert findings["processor.class"].passed is None
    assert "preprocessor_config.json holds no JSON object" in findings["processor.class"].detail


def test_an_empty_folder_passes_nothing(tmp_path: Path) -> None:
    for name in verify.CONSUMERS:
        assert not any(
            finding.passed for finding in verify.verify(tmp_path, name) if not _vacuous(finding)
        )
        with pytest.raises(CheckpointMismatch):
            verify.require(tmp_path, name)


def _vacuous(finding: verify.Finding) -> bool:
    """What is only required of something that is there."""
    return finding.requirement == "generation.eos"


ODD: list[object] = [
    None,
    "text",
    "",
    -1,
    2.5,
    10**30,
    True,
    [],
    [None],
    ["a"],
    [[1]],
    {},
    {"a": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 5])
def test_no_value_of_a_config_is_a_traceback(copy: Callable[[str], Path], first: int) -> None:
    """Each field in turn gets an odd value: findings come of it, and no counting to 10**30."""
    folder = copy("q4")
    odd = itertools.islice(itertools.cycle(ODD), first, None)
    files = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
    for file in (*files, "tokenizer.json", "model.safetensors.index.json"):
        whole = json.loads((folder / file).read_text())
        for place in (whole, *(v for v in whole.values() if isinstance(v, dict) and len(v) < 30)):
            for key in list(place):
                kept = place[key]
                place[key] = next(odd)
                header_folders.write_json(folder / file, whole)
                for name in ("native", "app"):
                    assert verify.verify(folder, name)
                place[key] = kept
        header_folders.write_json(folder / file, whole)


# Small models


def test_a_small_tower_is_right_for_all_but_those_with_apples_sizes_in_their_code(
    tmp_path: Path,
) -> None:
    from fastvlm_mlx.convert.pipeline import convert

    folder = tmp_path / "demo"
    convert("demo", folder)
    assert verify.require(folder, "native")
    assert verify.require(folder, "mlx-swift-lm")
    assert verify.require(folder, "mlx-vlm") is False
    assert verify.only_sizes_differ("mlx-vlm", verify.verify(folder, "mlx-vlm"))
    template = (folder / "chat_template.jinja").read_bytes()
    (folder / "chat_template.jinja").write_bytes(b"\xff")  # what cannot be checked is not met
    with pytest.raises(CheckpointMismatch, match="for mlx-vlm"):
        verify.require(folder, "mlx-vlm")
    (folder / "chat_template.jinja").write_bytes(template)
    edit_json(folder / "config.json", image_token_index=611)
    with pytest.raises(CheckpointMismatch, match="for mlx-vlm") as raised:
        verify.require(folder, "mlx-vlm")
    # A converter asks before the folder has its name: no user ever sees the one it has then.
    assert str(folder) not in str(raised.value)


# Core ML


def test_a_package_of_coremltools_own_is_understood(copy: Callable[[str], Path]) -> None:
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder

    @Builder.program(
        input_specs=[Builder.TensorSpec((1, 3, 1024, 1024))], opset_version=ct.target.iOS16
    )
    def program(images: Any) -> Any:
        whole = Builder.reshape(x=images, shape=(1, 1024, 3072))
        part = Builder.slice_by_size(x=whole, begin=[0, 0, 0], size=[1, 256, 3072])
        return Builder.mul(
            x=part, y=np.random.rand(1, 256, 3072).astype(np.float32), name="image_features"
        )

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        outputs=[ct.TensorType("image_features", dtype=np.float32)],
        skip_model_load=True,
    )
    folder = copy("app")
    shutil.rmtree(folder / "fastvithd.mlpackage")
    model.save(str(folder / "fastvithd.mlpackage"))
    assert failed(folder, "app") == []


# The data


@pytest.mark.parametrize("name", verify.CONSUMERS)
def test_every_requirement_has_a_sentence_and_a_line(name: str) -> None:
    source = verify.consumer(name)
    ids = [requirement["id"] for requirement in source.requirements]
    assert len(ids) == len(set(ids)) > 40
    for requirement in source.requirements:
        assert requirement["says"] and not requirement["says"].endswith(".")
        cite = source.cite(requirement)
        assert re.fullmatch(
            r"(?:[\w./-]+@[0-9a-f]{12}|mlx-vlm 0\.7\.10|fastvlm-mlx) [\w./+-]+:\w+", cite
        ), cite
    assert set(source.built_in_sizes) <= set(ids)


def test_lines_of_our_own_are_functions_that_exist() -> None:
    root = Path(__file__).parents[2]
    source = verify.consumer("native")
    own = {c for r in source.requirements if (c := source.cite(r)).startswith("fastvlm-mlx ")}
    assert own
    for cite in own:
        path, _, function = cite.removeprefix("fastvlm-mlx ").partition(":")
        assert f"def {function}(" in (root / path).read_text(), cite


def test_a_name_that_is_no_consumer_and_a_file_that_is_no_folder_are_one_line(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match=r"'torch' is none of native, "):
        verify.verify(tmp_path, "torch")
    with pytest.raises(CheckpointError, match=r"is no folder"):
        verify.verify(tmp_path / "none", "native")


def test_a_folder_is_meant_for_those_that_its_tensor_names_fit(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    assert verify.consumers_of(folders["q4"]) == ("native", "mlx-vlm", "mlx-swift-lm")
    assert verify.consumers_of(folders["app"]) == ("app",)
    with pytest.raises(CheckpointError, match=r"there is no \*\.safetensors"):
        verify.consumers_of(tmp_path)
    with pytest.raises(CheckpointMismatch, match="convert it first"):
        verify.consumers_of(header_folders.DEMO)
    header_folders.write_header(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match="the weight files hold no tensors"):
        verify.consumers_of(tmp_path)
