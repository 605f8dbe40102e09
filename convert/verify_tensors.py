"""Which tensors a consumer builds from a config, and whether a folder stores just these.

A data file says, by tables of key patterns and shapes, what each part of the network is called;
the sizes come from the folder's config.json (or are the consumer's own constants). Knows how
FastViTHD's `network` list is laid out. Knows no names of tensors, and nothing of what is packed
but that it is: `verify_packing.py` does.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
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
_MOST_LAYERS = 1000
LEAVES = (".weight", ".scales", ".biases")


def read_sizes(folder: Folder, table: Json) -> Sizes:
    """Return a lookup of the sizes a data file names: constants, or values of config.json.

    The lookup raises Unchecked where config.json lacks one. Five follow from others: `head_dim`,
    `out` (channels of the features), `squeeze` (the squeeze-and-excite block's), and `first` and
    `last` (the widths of these stages).
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
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise Unchecked("config.json's sizes do not fit together") from error


def _places(each: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the numbers that a repeated part of the network has at each of its places."""
    if each == "once":
        yield {}
    elif each == "layer":
        yield from ({"layer": layer} for layer in range(_count(sizes("layers"))))
    else:
        yield from (place for kind, place in _network(sizes) if kind == each)


def _count(number: int) -> int:
    """Return a number of layers, unless it is one that nobody could count up to."""
    if number > _MOST_LAYERS:
        raise ValueError(number)
    return number


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
        for j in range(_count(blocks)):
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

    return side if isinstance(side, int) else value(_parsed(side))


@cache
def _parsed(side: str) -> ast.expr:
    return ast.parse(side, mode="eval").body


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


def check_index(folder: Folder, _requirement: Json) -> str | None:
    """The index names exactly the stored tensors, each in its file."""
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
