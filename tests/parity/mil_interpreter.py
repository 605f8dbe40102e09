"""Evaluates a saved Core ML package with numpy, operation by operation.

Proves a package's graph and weights, not Core ML's runtime, which is on Apple's systems only.
`mil_package.py` reads the package, `mil_ops.py` knows the operations. Arithmetic is float32; a
result is rounded to the dtype that the program declares for it, so a float16 program overflows and
rounds here where it would there. Knows nothing of fastvlm_mlx.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mil_ops import OPS
from mil_package import Array, Operation, Package, Tensor


def run(package: Package, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the program's outputs by name. Raises ValueError for what does not fit."""
    if set(inputs) != {tensor.name for tensor in package.inputs}:
        raise ValueError(f"inputs are {[tensor.name for tensor in package.inputs]}")
    values = {tensor.name: _checked(inputs[tensor.name], tensor) for tensor in package.inputs}
    wanted = {tensor.name for tensor in package.outputs}
    last_use = {name: i for i, op in enumerate(package.operations) for name in _names(op)}
    for i, op in enumerate(package.operations):
        values |= evaluate(op, values)
        for name in _names(op):
            if last_use[name] == i and name not in wanted:
                values.pop(name, None)
    return {name: values[name] for name in wanted}


def evaluate(op: Operation, values: Mapping[str, Array]) -> dict[str, Array]:
    """Return an operation's outputs by name, each as declared. Raises ValueError if unknown."""
    if op.value is not None:
        return {op.outputs[0].name: op.value}
    if op.kind not in OPS:
        raise ValueError(f"operation {op.kind} is not known")
    arguments = {}
    for parameter, names in op.inputs.items():
        if len(names) != 1:
            raise ValueError(f"{op.kind}: {parameter} has {len(names)} values")
        value = values[names[0]]
        arguments[parameter] = value.astype(np.float32) if value.dtype == np.float16 else value
    results = OPS[op.kind](**arguments)
    if not isinstance(results, tuple):
        results = (results,)
    return {
        tensor.name: _declared(result, tensor, op)
        for result, tensor in zip(results, op.outputs, strict=True)
    }


def _declared(result: Array, tensor: Tensor, op: Operation) -> Array:
    if result.shape != tensor.shape:
        raise ValueError(f"{op.kind} gives {result.shape}, declared {tensor}")
    with np.errstate(over="ignore"):  # infinity is the answer
        return result.astype(tensor.dtype, copy=False)


def _checked(value: Array, tensor: Tensor) -> Array:
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(f"{value.dtype} {value.shape} given for {tensor}")
    return value


def _names(op: Operation) -> set[str]:
    return {name for names in op.inputs.values() for name in names}
