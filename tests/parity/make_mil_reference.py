"""Reference values for `mil_ops.py`: each MIL operation by torch's own, alone.

    pip install torch==2.15.0 numpy            # CPU
    python tests/parity/make_mil_reference.py  # a second

Sizes, strides, padding and groups are all unequal, so that a swapped axis or side shows. torch
computes in float64 from float32 inputs. Writes `mil_reference.npz`: `<case>.<parameter>` each
tensor, `<case>.out.<n>` each result; `cases` is the JSON text of each case's operation and its
other parameters, as MIL names them. Imports none of our modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
Compute = Callable[..., Tensor | tuple[Tensor, ...]]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **p: Any) -> Tensor:
    """MIL pads [top, bottom, left, right]; torch's pad takes the last axis first."""
    top, bottom, left, right = p["pad"]
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(
        padded, weight, bias, stride=p["strides"], dilation=p["dilations"], groups=p["groups"]
    )


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, **p: Any) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], gamma, beta, p["epsilon"])


def matmul(x: Tensor, y: Tensor, **p: Any) -> Tensor:
    x = x.mT if p["transpose_x"] else x
    return torch.matmul(x, y.mT if p["transpose_y"] else y)


OPS: dict[str, Compute] = {
    "add": lambda x, y: x + y,
    "conv": conv,
    "gelu": lambda x, mode: functional.gelu(
        x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]
    ),
    "layer_norm": layer_norm,
    "linear": functional.linear,
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "relu": torch.relu,
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x, axis: torch.softmax(x, axis),
    "split": lambda x, num_splits, axis: tuple(torch.chunk(x, num_splits, axis)),
    "transpose": lambda x, perm: x.permute(perm),
}

# case: (operation, tensors by shape, other parameters, spread of the values)
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any], float]] = {}


def case(
    op: str, name: str, shapes: dict[str, tuple[int, ...]], spread: float = 1, **p: Any
) -> None:
    CASES[f"{op}, {name}"] = (op, shapes, p, spread)


def conv_case(
    name: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    pad: tuple[int, ...],
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    *,
    groups: int = 1,
    bias: bool = True,
) -> None:
    shapes = {"x": x, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    settings = {"pad_type": "custom", "pad": pad, "strides": strides, "dilations": dilations}
    case("conv", name, shapes, **settings, groups=groups)


conv_case("dense", (1, 3, 7, 10), (4, 3, 3, 5), (1, 2, 0, 3), (2, 1))
conv_case("dense, dilated, no bias", (1, 2, 11, 8), (3, 2, 3, 2), (0, 3, 1, 0), (1, 2), (2, 3), bias=False)  # fmt: skip  # noqa: E501
conv_case("one by one", (1, 5, 3, 4), (7, 5, 1, 1), (0, 0, 0, 0))
conv_case("one by one, stride", (1, 5, 6, 5), (4, 5, 1, 1), (0, 0, 0, 0), (2, 3))
conv_case("groups", (1, 6, 8, 5), (9, 2, 3, 2), (2, 0, 1, 1), (1, 2), groups=3)
conv_case("depthwise", (1, 5, 9, 6), (5, 1, 7, 3), (4, 2, 0, 1), (2, 1), groups=5)
conv_case("depthwise, no bias", (1, 3, 6, 9), (3, 1, 3, 5), (1, 1, 2, 2), groups=3, bias=False)
conv_case("depthwise, doubled", (1, 4, 6, 8), (8, 1, 5, 3), (2, 1, 0, 1), (1, 2), groups=4)
conv_case("depthwise, tripled and dilated", (1, 2, 9, 7), (6, 1, 2, 3), (0, 1, 2, 0), (2, 1), (3, 2), groups=2)  # fmt: skip  # noqa: E501
case("gelu", "exact", {"x": (3, 41)}, 9, mode="EXACT")
case("gelu", "exact, small", {"x": (2, 17)}, 0.01, mode="EXACT")
case("gelu", "tanh", {"x": (3, 41)}, 5, mode="TANH_APPROXIMATION")
norm = {"x": (2, 3, 7), "gamma": (7,), "beta": (7,)}
case("layer_norm", "last axis", norm, 4, axes=[-1], epsilon=1e-5)
case("layer_norm", "epsilon counts", norm, 0.01, axes=[2], epsilon=1e-3)
case("linear", "bias", {"x": (1, 3, 5), "weight": (4, 5), "bias": (4,)})
case("linear", "no bias", {"x": (2, 3, 5), "weight": (7, 5)})
case(
    "matmul", "plain", {"x": (1, 2, 3, 5), "y": (1, 2, 5, 4)}, transpose_x=False, transpose_y=False
)
case(
    "matmul", "second", {"x": (1, 2, 3, 5), "y": (1, 2, 4, 5)}, transpose_x=False, transpose_y=True
)
case("matmul", "first", {"x": (2, 5, 3), "y": (2, 5, 4)}, transpose_x=True, transpose_y=False)
case("matmul", "both", {"x": (2, 5, 3), "y": (2, 4, 5)}, transpose_x=True, transpose_y=True)
case("softmax", "last axis", {"x": (2, 3, 5)}, 4, axis=-1)
case("softmax", "middle axis, large", {"x": (2, 3, 5)}, 200, axis=1)
case("split", "middle axis", {"x": (2, 6, 5)}, num_splits=3, axis=1)
case("split", "last axis", {"x": (3, 2, 8)}, num_splits=2, axis=-1)
case("reshape", "merged", {"x": (2, 3, 4, 5)}, shape=[6, 20])
case("reshape", "left over", {"x": (2, 3, 4, 5)}, shape=[4, -1, 3])
case("transpose", "of four", {"x": (2, 3, 4, 5)}, perm=[0, 2, 3, 1])
case("transpose", "of three", {"x": (2, 3, 4)}, perm=[2, 0, 1])
case("reduce_mean", "kept", {"x": (1, 3, 4, 5)}, axes=[2, 3], keep_dims=True)
case("reduce_mean", "dropped", {"x": (2, 3, 4, 5)}, axes=[1, -1], keep_dims=False)
case("add", "same", {"x": (2, 3, 4), "y": (2, 3, 4)})
case("add", "broadcast", {"x": (2, 3, 4), "y": (3, 1)})
case("mul", "gates", {"x": (1, 3, 4, 5), "y": (1, 3, 1, 1)})
case("relu", "both signs", {"x": (3, 7)})
case("sigmoid", "wide", {"x": (3, 7)}, 30)


def main() -> None:
    stream = np.random.RandomState(20)
    arrays: dict[str, Any] = {}
    described = {}
    for name, (op, shapes, parameters, spread) in CASES.items():
        inputs = {
            key: ((stream.random_sample(shape) * 2 - 1) * spread).astype(np.float32)
            for key, shape in shapes.items()
        }
        wide = {key: torch.from_numpy(value).double() for key, value in inputs.items()}
        results = OPS[op](**wide, **parameters)
        outputs = results if isinstance(results, tuple) else (results,)
        arrays |= {f"{name}.{key}": value for key, value in inputs.items()}
        arrays |= {f"{name}.out.{i}": out.numpy() for i, out in enumerate(outputs)}
        described[name] = {
            "op": op,
            "tensors": list(inputs),
            "parameters": parameters,
            "outputs": len(outputs),
        }
    info = {"torch": torch.__version__.split("+")[0], "cases": described}
    arrays["cases"] = np.array(json.dumps(info))
    np.savez_compressed(HERE / "mil_reference.npz", **arrays)
    print(f"{len(described)} cases, {(HERE / 'mil_reference.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
