"""A folder as a verifier sees it: its JSON files, tensor headers and chat template; no weights.

Knows safetensors' header and which files are a model's weights. Knows no consumer, no layout and
no MLX. What cannot be read raises `Unchecked`: a requirement that needs it can be neither met nor
failed, and the requirement that the file be readable says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastvlm_mlx.errors import one_line

Json = Mapping[str, Any]

INDEX = "model.safetensors.index.json"


class Unchecked(Exception):
    """A requirement cannot be checked, because something it rests on is missing or broken."""


@dataclass(frozen=True, slots=True)
class Header:
    """A stored tensor: shape, dtype as safetensors spells it (BF16, U32), the file it is in."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class Folder:
    """One model folder. Each file is read once, when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._json: dict[str, Json] = {}

    def json(self, name: str) -> Json:
        """Return a JSON object in the folder. Raises Unchecked saying what is wrong with it."""
        if name not in self._json:
            self._json[name] = self._read_json(name)
        return self._json[name]

    def _read_json(self, name: str) -> Json:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise Unchecked(f"there is no {name}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise Unchecked(f"{name} cannot be read as JSON: {one_line(str(error))}") from error
        if not isinstance(values, dict):
            raise Unchecked(f"{name} holds no JSON object")
        return values

    def value(self, name: str, at: str) -> Any:
        """Return the value at a dotted path of a JSON file, None where it is absent or null."""
        value: Any = self.json(name)
        for key in at.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files of the weights: those the index names, or model*.safetensors, or all.

        Raises Unchecked where there are none, or one that the index names is missing.
        """
        if (self.path / INDEX).exists():
            mapped = self.json(INDEX).get("weight_map")
            if not isinstance(mapped, dict) or not mapped:
                raise Unchecked(f"{INDEX} has no weight_map that names a file")
            names = sorted(set(map(str, mapped.values())))
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise Unchecked(f"{INDEX} names {missing[0]}, which is missing")
            return tuple(self.path / name for name in names)
        for pattern in ("model*.safetensors", "*.safetensors"):
            files = tuple(sorted(self.path.glob(pattern)))
            if files:
                return files
        raise Unchecked("there is no *.safetensors")

    @cached_property
    def tensors(self) -> Mapping[str, Header]:
        """Every tensor by name, file by file, in the order of its bytes there.

        Raises Unchecked for a file that is truncated or corrupt, and a tensor stored twice.
        """
        found: dict[str, Header] = {}
        for file, header in self._headers.items():
            named = ((name, entry) for name, entry in header.items() if name != "__metadata__")
            for name, entry in sorted(named, key=lambda item: item[1]["data_offsets"]):
                if name in found:
                    raise Unchecked(f"{name} is in both {found[name].file} and {file}")
                found[name] = Header(tuple(entry["shape"]), entry["dtype"], file)
        return found

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """The text metadata of each weight file's header, by the file's name."""
        return {file: head.get("__metadata__", {}) for file, head in self._headers.items()}

    @cached_property
    def _headers(self) -> Mapping[str, dict[str, Any]]:
        headers = {}
        for file in self.weight_files:
            try:
                with safe_open(file, framework="np"):  # checks the header against the file's size
                    pass
                with file.open("rb") as opened:
                    length = int.from_bytes(opened.read(8), "little")
                    headers[file.name] = json.loads(opened.read(length))
            except (SafetensorError, OSError) as error:
                raise Unchecked(
                    f"{file.name} is truncated or corrupt: {one_line(str(error))}"
                ) from error
        return headers

    def template(self, sources: tuple[str, ...]) -> str:
        """Return the chat template of the first of these files that has one. Raises Unchecked."""
        for name in sources:
            if not (self.path / name).exists():
                continue
            if name.endswith(".jinja"):
                try:
                    return (self.path / name).read_text(encoding="utf-8")
                except (OSError, ValueError) as error:
                    raise Unchecked(f"{name} cannot be read: {one_line(str(error))}") from error
            template = self.json(name).get("chat_template")
            if isinstance(template, str):
                return template
        raise Unchecked(f"none of {', '.join(sources)} has a chat template")
