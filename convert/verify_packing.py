"""How matrices are packed, against what config.json says of it, as a consumer looks it up.

Knows MLX's packed form: codes in uint32, scales a group, biases in affine mode; and that consumers
spell a module's path differently when they look for a setting of its own. Each check gets the
tensors a consumer asks for from `verify_tensors.py`, and returns what is wrong in one line.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence

from fastvlm_mlx.checkpoint.layouts import first_few
from fastvlm_mlx.convert.verify_folder import Folder, Header, Json, Unchecked
from fastvlm_mlx.convert.verify_tensors import Shape, is_packed

# What `mx.quantize` writes: mode → dtype of the scales (None: any float), whether biases exist.
_MODES: dict[str, tuple[str | None, bool]] = {
    "affine": (None, True),
    "mxfp4": ("U8", False),
    "mxfp8": ("U8", False),
    "nvfp4": ("U8", False),
}
_FLOATS = ("BF16", "F16", "F32")


def check_setting(folder: Folder, requirement: Json) -> str | None:
    """config.json says how tensors are packed, if any are, in a way the consumer understands."""
    found = folder.value("config.json", "quantization")
    if not any(key.endswith(".scales") for key in folder.tensors):
        return None
    if not isinstance(found, dict):
        return "tensors are packed, but config.json has no quantization"
    for path, own in {"": found, **_overrides(found)}.items():
        where = f"quantization.{path}." if path else "quantization."
        for key in ("bits", "group_size"):
            if type(own.get(key)) is not int:
                return f"{where}{key} is {own.get(key)!r}, not a whole number"
        mode = own.get("mode")
        if mode is None and path and requirement.get("override_states_mode"):
            return f"{where}mode is missing"
        if (mode or "affine") not in requirement["modes"]:
            return f"{where}mode is {mode!r}, not {' or '.join(requirement['modes'])}"
    return None


def check_uniform(folder: Folder, _requirement: Json) -> str | None:
    """One setting for all: nothing but bits and group_size in `quantization`."""
    found = folder.value("config.json", "quantization")
    if found is None:
        return None
    others = sorted(set(found) - {"bits", "group_size"}) if isinstance(found, dict) else ["*"]
    return f"quantization holds {first_few(others)} besides" if others else None


def check_setting_keys(folder: Folder, requirement: Json) -> str | None:
    """Beside bits, group_size and mode, `quantization` holds modules' settings, true or false."""
    found = folder.value("config.json", "quantization")
    if not isinstance(found, dict):
        return None
    known = {"bits", "group_size", "mode", *requirement["ignore"]}
    odd = [key for key, own in found.items() if not isinstance(own, (dict, bool))]
    odd = [key for key in odd if key not in known]
    return f"quantization.{odd[0]} is {reprlib.repr(found[odd[0]])}" if odd else None


def _overrides(quantization: Json) -> dict[str, Json]:
    return {path: own for path, own in quantization.items() if isinstance(own, dict)}


def respell(path: str, rules: Sequence[Sequence[str]]) -> str:
    """Return a module's path in another spelling: (pattern, replacement) applied in order."""
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def _setting_of(quantization: Json, names: Sequence[str]) -> Json | bool:
    """Return the first setting or False found under these names, the root's if there is none."""
    for name in names:
        own = quantization.get(name)
        if isinstance(own, dict) or own is False:
            return own
    return quantization


def _quantization(folder: Folder) -> Json:
    found = folder.value("config.json", "quantization")
    if not isinstance(found, dict):
        raise Unchecked("config.json has no quantization")
    return found


def check_packed(folder: Folder, requirement: Json, inventory: Mapping[str, Shape]) -> str | None:
    """Every packed matrix has the widths of the setting that the consumer looks up for it.

    `spellings` lists how the consumer spells a module's path when it looks for an override.
    """
    odd = []
    for key, shape in inventory.items():
        if not is_packed(folder.tensors, key, shape):
            continue
        path = key.removesuffix(".weight")
        names = [respell(path, rules) for rules in requirement["spellings"]]
        own = _setting_of(_quantization(folder), names)
        if not isinstance(own, dict):
            odd.append(f"{path} is packed, but config.json says false")
            continue
        problem = _misfit(folder.tensors, path, shape, own)
        if problem:
            odd.append(problem)
    return first_few(odd, 2) if odd else None


def _misfit(tensors: Mapping[str, Header], path: str, shape: Shape, setting: Json) -> str | None:
    """Say what of a packed matrix does not fit its setting: codes, scales or biases."""
    bits, group, mode = (setting.get(key) for key in ("bits", "group_size", "mode"))
    mode = mode or "affine"
    if type(bits) is not int or type(group) is not int or str(mode) not in _MODES:
        raise Unchecked("config.json's quantization is not understood")
    rows, columns = shape
    said = f"{bits} bits in groups of {group}, {mode}"
    if group < 1 or columns % group:
        return f"{path}: {columns} columns do not divide into {said}"
    scales_dtype, has_biases = _MODES[str(mode)]
    if (f"{path}.biases" in tensors) != has_biases:
        return f"{path} has {'no' if has_biases else 'needless'} biases for {said}"
    wanted: dict[str, tuple[tuple[str, ...], Shape]] = {
        "weight": (("U32",), (rows, columns * bits // 32)),
        "scales": ((scales_dtype,) if scales_dtype else _FLOATS, (rows, columns // group)),
        "biases": (_FLOATS, (rows, columns // group)),
    }
    for leaf, (dtypes, asked) in wanted.items():
        stored = tensors.get(f"{path}.{leaf}")
        if stored is None and leaf != "weight":
            continue
        if stored is None or stored.shape != asked or stored.dtype not in dtypes:
            found = f"{stored.dtype} {list(stored.shape)}" if stored else "missing"
            return f"{path}.{leaf} is {found}, {said} ask for {dtypes[0]} {list(asked)}"
    return None


def check_overrides_used(
    folder: Folder, requirement: Json, inventory: Mapping[str, Shape]
) -> str | None:
    """No module that config.json gives a setting of its own is stored unpacked."""
    found = folder.value("config.json", "quantization")
    if not isinstance(found, dict):
        return None
    idle = []
    for key, shape in inventory.items():
        path = key.removesuffix(".weight")
        names = [respell(path, rules) for rules in requirement["spellings"]]
        named = any(isinstance(found.get(name), dict) for name in names)
        if named and key.endswith(".weight") and not is_packed(folder.tensors, key, shape):
            idle.append(path)
    return f"not packed: {first_few(idle)}" if idle else None


def check_both_spellings(
    folder: Folder, requirement: Json, inventory: Mapping[str, Shape]
) -> str | None:
    """An override is written under both spellings of its module's path, with one value."""
    found = folder.value("config.json", "quantization")
    if not isinstance(found, dict):
        return None
    paths = [key.removesuffix(".weight") for key, shape in inventory.items() if len(shape) == 2]
    odd = []
    for path in paths:
        other = respell(path, requirement["spelling"])
        if found.get(path) != found.get(other):
            odd.append(f"{path} is {found.get(path)!r}, {other} is {found.get(other)!r}")
    return first_few(odd, 1) if odd else None


def check_float_modules(
    folder: Folder, requirement: Json, _inventory: Mapping[str, Shape]
) -> str | None:
    """No module under this prefix is packed."""
    packed = [
        key
        for key in folder.tensors
        if key.startswith(requirement["prefix"]) and key.endswith(".scales")
    ]
    return f"packed: {first_few(packed)}" if packed else None
