"""The Core ML package, evaluated by the interpreter, against timm in float64 and our own tower.

Saved packages are read back from disk. The tolerances are the project's: relative RMS 1e-5 in
float32; 5e-3 in float16, whose 11 bits of mantissa round every stored activation (measured
1.3e-3, at 256 and at 1024 px).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen
import mlx.core as mx
import numpy as np
import pytest
import source_folders
import sources
from asking import DEMO, HERE, relative_rms
from mil_interpreter import run
from mil_package import Package, read_package

from fastvlm_mlx.checkpoint.load import load_model, module_tensors
from fastvlm_mlx.checkpoint.store import Checkpoint, open_checkpoint
from fastvlm_mlx.convert import coreml, mil_tower
from fastvlm_mlx.convert.coreml import Precision, write_tower_package

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("coremltools has no release for this Python here", allow_module_level=True)

FLOAT32, FLOAT16 = 1e-5, 5e-3


def features(package: Package, pixels: Any) -> Any:
    """Return the interpreter's features [tokens, channels] of uint8 `pixels` [H,W,3]."""
    images = np.ascontiguousarray((pixels.astype(np.float32) / 255).transpose(2, 0, 1)[None])
    return run(package, {"images": images})["image_features"][0]


def ours(checkpoint: Checkpoint, pixels: Any) -> Any:
    """Return the features that the engine's own float32 tower gives."""
    tower = load_model(checkpoint, mx.float32, dequantize=False).vision
    return np.array(tower(mx.array(pixels)[None])[0])


def write(path: Path, checkpoint: Checkpoint, precision: Precision = "float32") -> Package:
    write_tower_package(path, checkpoint, precision=precision)
    return read_package(path)


def at_size(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    """The same checkpoint for pictures of another size."""
    vision = dataclasses.replace(checkpoint.config.vision, image_size=image_size)
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, vision=vision)
    )


def reference(archive: str, case: str) -> tuple[Any, Any, Any]:
    """Return timm's float64 features, the tokens they are of, and the picture."""
    with np.load(HERE / archive) as arrays:
        info = json.loads(str(arrays["cases"]))["cases"][case]
        pixels = frozen.picture(info["height"], info["width"], info["seed"])
        return arrays[case], arrays[f"{case}.tokens"], pixels


def small_folder(folder: Path, form: str) -> Path:
    """A tower whose widths grow by 2, 1, 2 and 3, in "fused" or "training" form."""
    shapes = json.loads((HERE / f"keys_timm_small_{form}.json").read_text())
    with np.load(HERE / "tower_small.npz") as arrays:
        args = json.loads(str(arrays["cases"]))["model_args"]
    source = sources.frozen_source(shapes, DEMO)
    vision = source.config["vision_config"]
    vision = {**vision, "model_args": {**vision["model_args"], **args}}
    config = {**source.config, "vision_config": vision, "image_seq_length": 4}
    return source_folders.write_fast_vlm(folder, dataclasses.replace(source, config=config), "BF16")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


@pytest.fixture(scope="module")
def demo_package(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return write(tmp_path_factory.mktemp("demo") / "fastvithd.mlpackage", demo)


@pytest.mark.parametrize("seed", [1, 2])
def test_demo_tower_equals_ours(demo: Checkpoint, demo_package: Package, seed: int) -> None:
    pixels = frozen.picture(256, 256, seed)
    package, engine = features(demo_package, pixels), ours(demo, pixels)
    assert relative_rms(package, engine) <= FLOAT32
    assert np.abs(package - engine).max() <= FLOAT32 * np.abs(engine).max()


def test_another_picture_gives_other_features(demo_package: Package) -> None:
    one, other = (features(demo_package, frozen.picture(256, 256, seed)) for seed in (1, 2))
    assert relative_rms(one, other) >= 1e-2


@pytest.mark.parametrize("form", ["fused", "training"])
def test_odd_widths_and_training_form_equal_timm(form: str, tmp_path: Path) -> None:
    """timm ran all branches; the package holds what they fold into."""
    expected, tokens, pixels = reference("tower_small.npz", f"{form}_128")
    package = write(tmp_path / "t.mlpackage", open_checkpoint(small_folder(tmp_path / "m", form)))
    assert relative_rms(features(package, pixels)[tokens], expected) <= FLOAT32


def check_interface(package: Package, size: int, tokens: int, channels: int) -> None:
    """What the app has preconditions on (FORMATS.md B3)."""
    assert package.specification_version == 7
    assert package.opset == "CoreML6"
    (given,), (made,) = package.inputs, package.outputs
    assert (given.name, given.shape, given.dtype) == ("images", (1, 3, size, size), np.float32)
    assert (made.name, made.shape) == ("image_features", (1, tokens, channels))
    assert made.dtype == np.float32


def test_interface_is_the_apps(demo_package: Package) -> None:
    check_interface(demo_package, 256, 16, 512)
    metadata = demo_package.spec.description.metadata
    assert metadata.author == "" and "FastViTHD" in metadata.shortDescription
    assert set(metadata.userDefined) == {"source"}, "a date would change with each run"


def test_float16_keeps_its_last_stage_and_its_interface_in_float32(
    demo: Checkpoint, tmp_path: Path
) -> None:
    """A float16 tower was measured to reach 60,928 and then NaN behind the second encoding."""
    package = write(tmp_path / "t.mlpackage", demo, "float16")
    check_interface(package, 256, 16, 512)
    weights = {
        op.outputs[0].name: op.outputs[0].dtype
        for op in package.operations
        if op.kind == "const" and op.value is not None and op.value.size > 9
    }
    tail = ("stages_4_pos_emb", "stages_4_blocks", "expansion")
    assert {dtype for name, dtype in weights.items() if name.startswith(tail)} == {np.float32}
    assert {dtype for name, dtype in weights.items() if not name.startswith(tail)} == {np.float16}
    assert package.counts()["cast"] == 2
    pixels = frozen.picture(256, 256, 1)
    error = relative_rms(features(package, pixels), ours(demo, pixels))
    assert 1e-5 < error <= FLOAT16


Network = mil_tower._Network


def _tanh(self: Any, name: str, x: Any) -> Any:
    return self.mb.gelu(x=x, mode="TANH_APPROXIMATION", name=name)


def _no_layer_scale(self: Any, name: str, weights: Any, x: Any, scale: Any) -> Any:
    return _ffn(self, name, weights, x, np.ones_like(scale))


def _swapped_blocks(checkpoint: Checkpoint, path: str) -> Any:
    swapped = {"stages.2.blocks.0": "stages.2.blocks.1", "stages.2.blocks.1": "stages.2.blocks.0"}
    return module_tensors(checkpoint, swapped.get(path, path))


def _shifted(
    self: Any, name: str, x: Any, weight: Any, bias: Any, *, stride: int = 1, groups: int = 1
) -> Any:
    """MIL's `pad` is [top, bottom, left, right]; one row moved over keeps the size."""
    side = weight.shape[-1] // 2
    return self.mb.conv(
        x=x,
        weight=mil_tower._single(weight),
        bias=mil_tower._single(bias),
        strides=[stride, stride],
        pad_type="custom",
        pad=[side + 1, side - 1, side, side] if side > 1 else [side] * 4,
        groups=groups,
        name=name,
    )


def _mirrored(weight: Any) -> Any:
    return _oihw(weight).swapaxes(2, 3)


def _column_by_column(self: Any, name: str, x: Any) -> Any:
    return _tokens(self, name, self.mb.transpose(x=x, perm=[0, 1, 3, 2]))


_ffn, _tokens, _oihw = Network.ffn, Network.tokens, mil_tower._oihw
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "tanh GELU": (Network, "gelu", _tanh),
    "a layer scale left out": (Network, "ffn", _no_layer_scale),
    "two blocks swapped": (coreml, "module_tensors", _swapped_blocks),
    "padding one row off": (Network, "conv", _shifted),
    "kernels mirrored": (mil_tower, "_oihw", _mirrored),
    "tokens column by column": (Network, "tokens", _column_by_column),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    package = write(tmp_path / "t.mlpackage", demo)
    pixels = frozen.picture(256, 256, 1)
    assert relative_rms(features(package, pixels), ours(demo, pixels)) > 10 * FLOAT32


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The real tower with the frozen weights of `tower.npz`."""
    shapes = json.loads((HERE / "keys_timm_fused.json").read_text())
    folder = tmp_path_factory.mktemp("real") / "model"
    source = sources.frozen_source(shapes, DEMO)
    return open_checkpoint(source_folders.write_fast_vlm(folder, source, "BF16"))


# FORMATS.md C has 13 mul: the scale of q and layer_scale_1 are folded here, 6 of each.
REAL_COUNTS = {
    "conv": 186, "gelu": 56, "add": 50, "linear": 12, "matmul": 12, "layer_norm": 6, "softmax": 6,
    "split": 6, "reshape": 25, "transpose": 25, "reduce_mean": 1, "relu": 1, "sigmoid": 1, "mul": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 1024])
def test_real_size_equals_timm_and_ours(real: Checkpoint, tmp_path: Path, size: int) -> None:
    """1024 px: 15 s of interpreting on two cores. timm's reference has every 17th token there."""
    checkpoint = at_size(real, size)
    package = write(tmp_path / "fastvithd.mlpackage", checkpoint)
    check_interface(package, size, (size // 64) ** 2, 3072)
    assert package.counts() == REAL_COUNTS
    weights = tmp_path / "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert weights.stat().st_size == 490_742_976
    expected, tokens, pixels = reference("tower.npz", f"fused_{size}")
    every = features(package, pixels)
    assert relative_rms(every[tokens], expected) <= FLOAT32
    engine = ours(checkpoint, pixels)
    assert relative_rms(every, engine) <= FLOAT32
    assert np.abs(every - engine).max() <= FLOAT32 * np.abs(engine).max()


@pytest.mark.slow
def test_real_size_in_float16_stays_close(real: Checkpoint, tmp_path: Path) -> None:
    package = write(tmp_path / "fastvithd.mlpackage", real, "float16")
    weights = tmp_path / "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert weights.stat().st_size == 361_577_088
    expected, tokens, pixels = reference("tower.npz", "fused_1024")
    assert relative_rms(features(package, pixels)[tokens], expected) <= FLOAT16
