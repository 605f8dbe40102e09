"""Which tensors a consumer builds from a config, and whether a folder stores just these.

A data file says, by tables of key patterns and shapes, what each part of the network is called;
the sizes come from the folder's config.json (or are the consumer's own constants). Knows how
FastViTHD's `network` list is laid out and how MLX packs a matrix. Knows no names of tensors.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastvlm_mlx.checkpoint.layouts import first_few
from fastvlm_mlx.convert.verify_folder import INDEX, Folder, Header, Json, Unchecked

Sizes = Callable[[str], Any]
Shape = tuple[int, ...]

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
LEAVES = (".weight", ".scales", ".biases")
# What `mx.quantize` writes: mode → dtype of the scales (None: any float), whether biases exist.
_MODES: dict[str, tuple[str | None, bool]] = {
    "affine": (None, True),
    "mxfp4": ("U8", False),
    "mxfp8": ("U8", False),
    "nvfp4": ("U8", False),
}
_FLOATS = ("BF16", "F16", "F32")


def read_sizes(folder: Folder, table: Json) -> Sizes:
    """Return a lookup of the sizes a data file names: constants, or values of config.json.

    The lookup raises Unchecked where config.json lacks one. Three follow from others: `head_dim`,
    `out` (channels of the features) and `squeeze` (the squeeze-and-excite block's).
    """

    def size(name: str) -> Any:
        if name == "head_dim":
            return size("hidden") // max(1, size("heads"))
        if name == "out":
            return int(size("widths")[-1] * size("out_ratio"))
        if name == "squeeze":
            return size("out") // 16
        if name in ("first", "last"):
            return size("widths")[0 if name == "first" else -1]
        source = table[name]
        if "is" in source:
            return source["is"]
        value = folder.value("config.json", source["at"])
        value = source.get("or") if value is None else value
        if not isinstance(value, (int, float, str, list)):
            raise Unchecked(f"config.json has no {source['at']} to count by")
        return value

    return size


def expected(requirement: Json, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """Yield (key, shape) of every tensor that a `tensors` requirement names."""
    if any(sizes(name) != value for name, value in requirement.get("when", {}).items()):
        return
    try:
        places = list(_places(requirement.get("each", "once"), sizes))
        for place in places:
            for pattern, shape in requirement["tensors"].items():
                yield (
                    pattern.format_map(place),
                    tuple(_evaluate(side, place, sizes) for side in shape),
                )
    except (TypeError, ValueError, IndexError) as error:
        raise Unchecked("config.json's sizes do not fit together") from error


def _places(each: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the numbers that a repeated part of the network has at each of its places."""
    if each == "once":
        yield {}
    elif each == "layer":
        yield from ({"layer": layer} for layer in range(sizes("layers")))
    else:
        yield from (place for kind, place in _network(sizes) if kind == each)


def _network(sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Walk FastViTHD's `network`, where encodings, stages and downsamplings are entries alike.

    A stage's encoding, where it has one, comes before its blocks, a downsampling after them
    (apple/ml-fastvlm mci.py, mlx-vlm models/fastvlm/vision.py `build_fast_vit_network`).
    """
    widths, ratios = sizes("widths"), sizes("ratios")
    encodings, downsamples = sizes("encodings"), sizes("downsamples")
    n = 0
    for stage, blocks in enumerate(sizes("blocks")):
        width = widths[stage]
        if encodings[stage] is not None:
            yield "encoding", {"n": n, "width": width, "side": encodings[stage][0]}
            n += 1
        for j in range(blocks):
            inner = int(width * ratios[stage])
            yield sizes("mixers")[stage], {"n": n, "j": j, "width": width, "inner": inner}
        n += 1
        if stage + 1 < len(widths) and (downsamples[stage] or width != widths[stage + 1]):
            yield "downsampling", {"n": n, "width": width, "wider": widths[stage + 1]}
            n += 1


def _evaluate(side: int | str, place: Mapping[str, int], sizes: Sizes) -> int:
    """Evaluate a side like "3*width": whole numbers, names, + - * //."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return int(place[node.id] if node.id in place else sizes(node.id))
        assert isinstance(node, ast.BinOp), side  # our own data files hold nothing else
        return _OPERATORS[type(node.op)](value(node.left), value(node.right))

    return side if isinstance(side, int) else value(ast.parse(side, mode="eval").body)


def is_packed(tensors: Mapping[str, Header], key: str, shape: Shape) -> bool:
    """Whether the matrix at this key is stored packed: only Linear and Embedding can be."""
    path = key.removesuffix(".weight")
    return len(shape) == 2 and key.endswith(".weight") and f"{path}.scales" in tensors


def check_tensors(folder: Folder, requirement: Json, sizes: Sizes) -> str | None:
    """Each tensor is stored, in its shape. Packed ones are `check_packed`'s."""
    missing, odd = [], []
    for key, shape in expected(requirement, sizes):
        stored = folder.tensors.get(key)
        if stored is None:
            missing.append(key)
        elif not is_packed(folder.tensors, key, shape) and stored.shape != shape:
            odd.append(f"{key} is {list(stored.shape)}, not {list(shape)}")
    if missing:
        return f"missing: {first_few(missing)}"
    return first_few(odd, 2) if odd else None


def check_no_others(
    folder: Folder, requirement: Json, inventory: Mapping[str, Shape]
) -> str | None:
    """No tensor is stored that the consumer has no place for; `ignore` lists what it drops."""
    known = set(inventory)
    for key, shape in inventory.items():
        if is_packed(folder.tensors, key, shape):
            known |= {key.removesuffix(".weight") + leaf for leaf in LEAVES}
    ignored = [re.compile(pattern) for pattern in requirement.get("ignore", ())]
    others = [
        key
        for key in folder.tensors
        if key not in known and not any(pattern.fullmatch(key) for pattern in ignored)
    ]
    return f"no place for {first_few(others)}" if others else None


def check_dtypes(folder: Folder, requirement: Json, inventory: Mapping[str, Shape]) -> str | None:
    """Every tensor that is not packed has one of these dtypes."""
    odd = [
        f"{key} is {folder.tensors[key].dtype}"
        for key, shape in inventory.items()
        if key in folder.tensors
        and not is_packed(folder.tensors, key, shape)
        and folder.tensors[key].dtype not in requirement["dtypes"]
    ]
    return first_few(odd) if odd else None


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
    if not isinstance(bits, int) or not isinstance(group, int) or mode not in _MODES:
        raise Unchecked("config.json's quantization is not understood")
    rows, columns = shape
    said = f"{bits} bits in groups of {group}, {mode}"
    if group < 1 or columns % group:
        return f"{path}: {columns} columns do not divide into {said}"
    scales_dtype, has_biases = _MODES[mode]
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


def check_index(folder: Folder, requirement: Json) -> str | None:
    """The index names exactly the stored tensors, each in its file."""
    if requirement.get("optional") and not (folder.path / INDEX).exists():
        return None
    mapped = folder.json(INDEX).get("weight_map")
    if not isinstance(mapped, dict):
        return f"{INDEX} has no weight_map"
    odd = [
        key
        for key in mapped.keys() | folder.tensors.keys()
        if key not in folder.tensors or mapped.get(key) != folder.tensors[key].file
    ]
    return f"the index and the files disagree on {first_few(odd)}" if odd else None


def check_sorted(folder: Folder, _requirement: Json) -> str | None:
    """Tensors lie in the files in the order of their names."""
    names = list(folder.tensors)
    for before, after in zip(names, sorted(names), strict=True):
        if before != after:
            return f"{before} stands where {after} belongs"
    return None


def check_metadata(folder: Folder, requirement: Json) -> str | None:
    """Every weight file's header carries this metadata."""
    for file, found in folder.metadata.items():
        if any(found.get(key) != value for key, value in requirement["equals"].items()):
            return f"{file} has metadata {dict(found)}"
    return None
