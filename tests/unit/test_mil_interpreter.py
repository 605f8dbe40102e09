"""The MIL interpreter of tests/parity: each operation alone, and the reader of packages.

Against torch's values (`make_mil_reference.py`) and against loops written out here, on unequal
sizes, strides, padding and groups.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))

import mil_ops  # noqa: E402
from mil_interpreter import evaluate, run  # noqa: E402
from mil_package import Blobs, Operation, Package, Tensor  # noqa: E402

REFERENCE: Any = np.load(PARITY / "mil_reference.npz")
CASES: dict[str, Any] = json.loads(str(REFERENCE["cases"]))["cases"]
CONVOLUTIONS = [name for name, case in CASES.items() if case["op"] == "conv"]


def inputs_of(name: str) -> dict[str, Any]:
    """Tensors and parameters as a package holds them: arrays all."""
    case = CASES[name]
    kinds = {int: np.int32, float: np.float32, list: np.int32, str: np.str_, bool: np.bool_}
    parameters = {key: np.array(v, kinds[type(v)]) for key, v in case["parameters"].items()}
    return {key: REFERENCE[f"{name}.{key}"] for key in case["tensors"]} | parameters


@pytest.mark.parametrize("name", CASES)
def test_each_operation_equals_torch(name: str) -> None:
    case = CASES[name]
    results = mil_ops.OPS[case["op"]](**inputs_of(name))
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == case["outputs"]
    for i, result in enumerate(results):
        expected = REFERENCE[f"{name}.out.{i}"]
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)


def test_every_operation_has_a_case() -> None:
    """`cast` computes nothing; it is tested below."""
    assert {case["op"] for case in CASES.values()} == set(mil_ops.OPS) - {"cast"}


def convolved(x: Any, weight: Any, bias: Any, p: dict[str, Any]) -> Any:
    """The definition, one number at a time. MIL's `pad` is [top, bottom, left, right]."""
    _, channels, height, width = x.shape
    outputs, inputs, taps_y, taps_x = weight.shape
    (top, bottom, left, right), (step_y, step_x) = p["pad"], p["strides"]
    gap_y, gap_x = p["dilations"]
    rows = (height + top + bottom - gap_y * (taps_y - 1) - 1) // step_y + 1
    columns = (width + left + right - gap_x * (taps_x - 1) - 1) // step_x + 1
    y = np.zeros((1, outputs, rows, columns))
    for o, row, column in np.ndindex(outputs, rows, columns):
        first = o // (outputs // p["groups"]) * inputs
        total = 0.0 if bias is None else float(bias[o])
        for c, i, j in np.ndindex(inputs, taps_y, taps_x):
            at_y, at_x = row * step_y + i * gap_y - top, column * step_x + j * gap_x - left
            if 0 <= at_y < height and 0 <= at_x < width:
                total += float(x[0, first + c, at_y, at_x]) * float(weight[o, c, i, j])
        y[0, o, row, column] = total
    assert channels == inputs * p["groups"]
    return y


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_its_definition(name: str) -> None:
    given = inputs_of(name)
    result = mil_ops.conv(**given)
    expected = convolved(given["x"], given["weight"], given.get("bias"), CASES[name]["parameters"])
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("swap", [[1, 0, 2, 3], [0, 1, 3, 2], [2, 3, 0, 1]])
def test_the_order_of_padding_matters_to_the_reference(swap: list[int]) -> None:
    """A reference with equal sides would let any order pass."""
    name = "conv, dense"
    given = inputs_of(name)
    given["pad"] = given["pad"][swap]
    result = mil_ops.conv(**given)
    expected = REFERENCE[f"{name}.out.0"]
    assert result.shape != expected.shape or np.abs(result - expected).max() > 0.1


def test_many_channels_convolve_as_few_do() -> None:
    """Depthwise channels are taken a few at a time; the last lot is smaller."""
    stream = np.random.RandomState(3)
    x = stream.random_sample((1, 7, 150, 130)).astype(np.float32)
    weight = stream.random_sample((14, 1, 3, 3)).astype(np.float32)
    settings: dict[str, Any] = {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [1, 1]}
    settings["dilations"] = [1, 1]
    whole = mil_ops.conv(x, weight, groups=np.array(7), **settings)
    for c in range(7):
        part = weight[2 * c : 2 * c + 2]
        alone = mil_ops.conv(x[:, c : c + 1], part, groups=np.array(1), **settings)
        np.testing.assert_array_equal(whole[:, 2 * c : 2 * c + 2], alone)


def test_erf_is_that_of_the_c_library() -> None:
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, 6.0, -6.0, 5.99999, 40.0, 1e-9]])
    np.testing.assert_allclose(mil_ops.erf(x), [math.erf(v) for v in x], rtol=0, atol=1e-9)


def test_exact_gelu_is_not_the_tanh_one() -> None:
    x = np.linspace(-3, 3, 2**16 + 7, dtype=np.float32)  # more than one lot
    exact = mil_ops.gelu(x, np.array("EXACT"))
    expected = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x[::997].tolist()]
    np.testing.assert_allclose(exact[::997], expected, atol=3e-7)
    assert np.abs(exact - mil_ops.gelu(x, np.array("TANH_APPROXIMATION"))).max() > 1e-4


def test_softmax_and_layer_norm_equal_their_definitions() -> None:
    x = inputs_of("softmax, middle axis, large")["x"]
    result = mil_ops.softmax(x, np.array(1))
    for i, k in np.ndindex(x.shape[0], x.shape[2]):
        raised = [math.exp(float(v) - float(x[i, :, k].max())) for v in x[i, :, k]]
        np.testing.assert_allclose(result[i, :, k], np.array(raised) / sum(raised), atol=1e-6)
    given = inputs_of("layer_norm, epsilon counts")
    normed = mil_ops.layer_norm(**given)
    for i, j in np.ndindex(2, 3):
        row = [float(v) for v in given["x"][i, j]]
        mean = sum(row) / len(row)
        spread = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + 1e-3)
        for k, v in enumerate(row):
            expected = (v - mean) / spread * given["gamma"][k] + given["beta"][k]
            assert abs(normed[i, j, k] - expected) < 1e-5


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("conv, dense", {"pad_type": np.array("same")}),
        ("conv, dense", {"groups": np.array(2)}),
        ("gelu, exact", {"mode": np.array("SIGMOID_APPROXIMATION")}),
        ("layer_norm, last axis", {"axes": np.array([1])}),
        ("reshape, merged", {"shape": np.array([0, 60])}),
    ],
)
def test_what_is_not_covered_raises(op: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        mil_ops.OPS[CASES[op]["op"]](**{**inputs_of(op), **changed})


def tensor(name: str, *shape: int, dtype: type[np.generic] = np.float32) -> Tensor:
    return Tensor(name, shape, dtype)


def constant(name: str, value: Any) -> Operation:
    array = np.array(value)
    return Operation("const", {}, (Tensor(name, array.shape, array.dtype.type),), array)


def test_an_unknown_operation_raises() -> None:
    with pytest.raises(ValueError, match="einsum is not known"):
        evaluate(Operation("einsum", {"x": ("a",)}, (tensor("b", 1),)), {"a": np.zeros(1)})


def test_a_parameter_without_meaning_raises() -> None:
    """Nothing that the program says may be passed over."""
    op = Operation("relu", {"x": ("a",), "alpha": ("a",)}, (tensor("b", 1),))
    with pytest.raises(TypeError, match="alpha"):
        evaluate(op, {"a": np.zeros(1, np.float32)})


def test_a_result_of_another_shape_than_declared_raises() -> None:
    op = Operation("relu", {"x": ("a",)}, (tensor("b", 2, 1),))
    with pytest.raises(ValueError, match="declared"):
        evaluate(op, {"a": np.zeros((1, 2), np.float32)})


def test_half_precision_rounds_and_overflows_at_each_result() -> None:
    op = Operation("add", {"x": ("a",), "y": ("b",)}, (tensor("c", 3, dtype=np.float16),))
    a, b = np.array([2048, 65504, 1], np.float16), np.array([1, 60000, 2**-12], np.float16)
    result = evaluate(op, {"a": a, "b": b})["c"]
    assert result.dtype == np.float16
    assert result.tolist() == [2048.0, math.inf, 1.0]


def test_cast_rounds_to_the_declared_dtype() -> None:
    names = {"x": ("a",), "dtype": ("to",)}
    op = Operation("cast", names, (tensor("b", 2, dtype=np.float16),))
    result = evaluate(op, {"a": np.array([0.1, 1e6], np.float32), "to": np.array("fp16")})["b"]
    assert result.dtype == np.float16
    assert result.tolist() == [float(np.float16(0.1)), math.inf]


def test_a_program_runs_in_order_and_checks_its_inputs() -> None:
    """y = (x + x) * x; x is used again behind its first uses, and an output is kept."""
    operations = (
        Operation("add", {"x": ("x",), "y": ("x",)}, (tensor("twice", 2),)),
        constant("half", np.float32(0.5)),
        Operation("mul", {"x": ("twice",), "y": ("half",)}, (tensor("same", 2),)),
        Operation("mul", {"x": ("twice",), "y": ("x",)}, (tensor("y", 2),)),
        Operation("relu", {"x": ("same",)}, (tensor("last", 2),)),
    )
    outputs = (tensor("y", 2), tensor("last", 2))
    package = Package(7, "CoreML6", (tensor("x", 2),), outputs, operations, None)
    x = np.array([3, -2], np.float32)
    results = run(package, {"x": x})
    assert results["y"].tolist() == [18, 8]
    assert results["last"].tolist() == [3, 0]
    assert package.counts() == {"add": 1, "mul": 2, "relu": 1}
    for odd in ({"x": x[None]}, {"x": x.astype(np.float64)}, {"z": x}, {}):
        with pytest.raises(ValueError):
            run(package, odd)


def weight_file(folder: Path, *, sentinel: int = 0xDEADBEEF, size: int = 12) -> Path:
    """One float32 blob of three numbers whose record is at 64, as StorageFormat.hpp has it."""
    (folder / "weights").mkdir(parents=True)
    header = struct.pack("<II", 1, 2).ljust(64, b"\0")
    record = struct.pack("<IIQQ", sentinel, 2, size, 128).ljust(64, b"\0")
    data = struct.pack("<3f", 1.5, -2, 3)
    (folder / "weights/weight.bin").write_bytes(header + record + data)
    return folder


NAME = "@model_path/weights/weight.bin"


def test_a_blob_is_read_through_its_record(tmp_path: Path) -> None:
    blob = Blobs(weight_file(tmp_path / "good")).read(NAME, 64)
    assert blob.dtype == np.float32
    assert blob.tolist() == [1.5, -2, 3]


def test_a_blob_with_a_bad_record_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no blob record"):
        Blobs(weight_file(tmp_path / "a", sentinel=1)).read(NAME, 64)
    with pytest.raises(ValueError, match="ends behind the file"):
        Blobs(weight_file(tmp_path / "b", size=16)).read(NAME, 64)
    with pytest.raises(ValueError, match="no blob record"):
        Blobs(weight_file(tmp_path / "c")).read(NAME, 0)
