"""Checks of what lies beside the weights: files, JSON fields, the tokenizer.

Each check gets a folder and a requirement's arguments from a data file, and returns what is wrong
in one line, None if nothing is. Knows the words of the data files and no consumer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

from fastvlm_mlx.convert.verify_folder import Folder, Json, Unchecked


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_integral(value: object) -> bool:
    """Swift decodes 4.0 as an Int."""
    return _is_int(value) or (isinstance(value, float) and value.is_integer())


def _list_of(item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_shape_or_null(value: object) -> bool:
    return value is None or _list_of(_is_int)(value)


# What a data file calls a JSON value. Whole numbers are written without a point, if not said.
_TYPES: dict[str, Callable[[object], bool]] = {
    "whole number": _is_int,
    "number": _is_number,
    "text": _is_text,
    "true or false": _is_bool,
    "list of whole numbers": _list_of(_is_int),
    "whole number or list of them": lambda value: _is_int(value) or _list_of(_is_int)(value),
    "list of whole numbers, 4.0 too": _list_of(_is_integral),
    "list of numbers": _list_of(_is_number),
    "list of text": _list_of(_is_text),
    "list of true or false": _list_of(_is_bool),
    "list of sizes or null": _list_of(_is_shape_or_null),
    "object": lambda value: isinstance(value, dict),
}


def check_file(folder: Folder, requirement: Json) -> str | None:
    """The file is there and not empty."""
    path = folder.path / requirement["file"]
    if not path.is_file():
        return f"there is no {requirement['file']}"
    return None if path.stat().st_size else f"{requirement['file']} is empty"


def _file(folder: Folder, requirement: Json) -> str:
    """Return the file a requirement is about: of a list, the first that is there, or the first."""
    named = requirement["file"]
    if isinstance(named, str):
        return named
    return next((name for name in named if (folder.path / name).exists()), str(named[0]))


def check_json(folder: Folder, requirement: Json) -> str | None:
    """The file is there and holds a JSON object."""
    try:
        folder.json(_file(folder, requirement))
    except Unchecked as error:
        return str(error)
    return None


def check_weights(folder: Folder, _requirement: Json) -> str | None:
    """There are weight files, whole, and no tensor is in two of them."""
    try:
        return None if folder.tensors else "the weight files hold no tensors"
    except Unchecked as error:
        return str(error)


def check_no_strays(folder: Folder, _requirement: Json) -> str | None:
    """No *.safetensors lies in the folder, or below it, that is not one of the weight files."""
    known = set(folder.weight_files)
    strays = [path for path in sorted(folder.path.rglob("*.safetensors")) if path not in known]
    return f"{strays[0].relative_to(folder.path)} lies beside the weights" if strays else None


def check_field(folder: Folder, requirement: Json) -> str | None:
    """A JSON field has a type and, where the requirement says so, a value.

    `at` is a dotted path; null counts as absent. `optional` lets it be absent, `absent` forbids
    it. `equals`, `one_of`, `least`, `length` and `below` (another field) say more of a value.
    """
    file, at = _file(folder, requirement), requirement["at"]
    value = folder.value(file, at)
    where, shown = f"{file}: {at}", reprlib.repr(value)
    if requirement.get("absent"):
        return None if value is None else f"{where} is {shown}; it must be absent"
    if value is None:
        return None if requirement.get("optional") else f"{where} is missing"
    kind = requirement.get("type")
    if kind is not None and not _TYPES[kind](value):
        return f"{where} is {shown}, not a {kind}"
    return _value_problem(folder, requirement, value, f"{where} is {shown}")


def _value_problem(folder: Folder, requirement: Json, value: Any, said: str) -> str | None:
    if "equals" in requirement and value != requirement["equals"]:
        return f"{said}, not {requirement['equals']!r}"
    if "one_of" in requirement and value not in requirement["one_of"]:
        return f"{said}, not {' or '.join(map(str, requirement['one_of']))}"
    if "least" in requirement and value < requirement["least"]:
        return f"{said}, less than {requirement['least']}"
    if "length" in requirement and len(value) != requirement["length"]:
        return f"{said}, not {requirement['length']} of them"
    if "below" in requirement:
        limit = folder.value(_file(folder, requirement), requirement["below"])
        if _is_int(limit) and value >= limit:
            return f"{said}, not below {requirement['below']}, {limit}"
    return None


def check_same_field(folder: Folder, requirement: Json) -> str | None:
    """Two fields of a JSON file have one value, or are both absent."""
    file, at, other = (requirement[key] for key in ("file", "at", "other"))
    if folder.value(file, at) != folder.value(file, other):
        return f"{file}: {other} is not the same as {at}"
    return None


def check_sections(folder: Folder, requirement: Json) -> str | None:
    """An object is absent, or has a list of whole numbers under `key` and nothing unreadable."""
    value = folder.value(requirement["file"], requirement["at"])
    where = f"{requirement['file']}: {requirement['at']}"
    if value is None:
        return None
    if not isinstance(value, dict):
        return f"{where} is {reprlib.repr(value)}, not an object"
    if not _TYPES["list of whole numbers"](value.get(requirement["key"])):
        return f"{where} has no list of whole numbers {requirement['key']}"
    return None


def check_token_name(folder: Folder, requirement: Json) -> str | None:
    """A token's field names it, as text or as an object with `content`."""
    value = folder.value(requirement["file"], requirement["at"])
    name = value.get("content") if isinstance(value, dict) else value
    if name != requirement["equals"]:
        where = f"{requirement['file']}: {requirement['at']}"
        return f"{where} is {reprlib.repr(name)}, not {requirement['equals']}"
    return None


def _added_tokens(folder: Folder) -> list[Json]:
    added = folder.json("tokenizer.json").get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise Unchecked("tokenizer.json has no list of added_tokens")
    return added


def check_token(folder: Folder, requirement: Json) -> str | None:
    """tokenizer.json has an added token, special, alone with its id, which `id_at` names, if given.

    Raises Unchecked where config.json names no id there: another requirement's matter.
    """
    content, at = requirement["token"], requirement.get("id_at")
    added = _added_tokens(folder)
    found = [token for token in added if token.get("content") == content]
    if not found:
        return f"tokenizer.json has no added token {content}"
    number = found[0].get("id")
    others = [t.get("content") for t in added if t.get("id") == number and t not in found]
    if others:
        return f"tokenizer.json gives id {number} to {content} and to {others[0]}"
    if found[0].get("special") is not True:
        return f"tokenizer.json: {content} is not special"
    if at is None:
        return None
    named = folder.value("config.json", at)
    if not _is_int(named) or named < 0:
        raise Unchecked(f"config.json: {at} is no token's id")
    if named != number:
        return f"config.json: {at} is {named}, but {content} is {number} in tokenizer.json"
    return None


def check_no_token(folder: Folder, requirement: Json) -> str | None:
    """No tokenizer file has the token."""
    content = requirement["token"]
    where = []
    if any(token.get("content") == content for token in _added_tokens(folder)):
        where.append("tokenizer.json")
    for file, at in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", "")):
        if (folder.path / file).exists():
            entries = folder.value(file, at) if at else folder.json(file)
            if isinstance(entries, dict) and content in (
                *entries,
                *(entry.get("content") for entry in entries.values() if isinstance(entry, dict)),
            ):
                where.append(file)
    return f"{content} is a token in {' and '.join(where)}" if where else None


def check_generation_eos(folder: Folder, _requirement: Json) -> str | None:
    """generation_config.json, which consumers put above config.json, ends where that one ends."""
    if not (folder.path / "generation_config.json").exists():
        return None
    stated = folder.value("generation_config.json", "eos_token_id")
    if stated is None:
        return None
    eos = folder.value("config.json", "eos_token_id")
    if eos not in (stated if isinstance(stated, list) else [stated]):
        return f"generation_config.json: eos_token_id is {stated}, without config.json's {eos}"
    return None
