"""Where a source comes from and under which licence, as far as its folder says.

Knows a model card's front matter, and the licence and notice files, which must travel with the
weights. What a card says is a stranger's text: three keys of it are read, and only plain values are
passed on. Writes nothing.

Source: the card of https://huggingface.co/apple/FastVLM-0.5B (`license: apple-amlr`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.checkpoint.hub import is_license_file

APPLE_LICENSE = "apple-amlr"
_OWN_LICENSE = "same-as-fastvlm-mlx"

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@.+)?")
# What may go from a stranger's card into ours.
_LICENSE_ID = re.compile(r"[\w.+-]{1,64}")
_LICENSE_NAME = re.compile(r"[\w.+() -]{1,64}")
_README_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a source says of itself. `license` is the hub's id, `license_files` are to be copied."""

    base_model: str | None
    license: str | None
    license_name: str | None
    license_files: tuple[Path, ...]

    @property
    def is_own(self) -> bool:
        """Whether it is this project's demo model or was made from it."""
        return self.license_name == _OWN_LICENSE

    @property
    def is_apple(self) -> bool:
        """Whether the weights are Apple's; a folder that says nothing is taken for its zips."""
        from_apple = (self.base_model or "").startswith("apple/")
        return from_apple or self.license in (None, APPLE_LICENSE)


def find_provenance(source_folder: Path, source_name: str) -> Provenance:
    """Read what the source is. `source_name` is what was asked for: "demo", a hub name, a folder.

    A hub name is the base model; otherwise the README's front matter may name one.
    """
    matter = _front_matter(source_folder / "README.md")
    base = _first(matter.get("base_model", ()), _HUB_NAME)
    match = _HUB_NAME.fullmatch(source_name)
    # As `hub.resolve` has it: a folder that exists is no hub name.
    if match and not Path(source_name).is_dir():
        base = match["repo"]
    license_id = _first(matter.get("license", ()), _LICENSE_ID)
    license_name = _first(matter.get("license_name", ()), _LICENSE_NAME)
    if source_name == "demo":
        base, license_id, license_name = None, "other", _OWN_LICENSE
    return Provenance(
        base_model=base,
        license=license_id,
        license_name=license_name,
        license_files=find_license_files(source_folder),
    )


def find_license_files(folder: Path) -> tuple[Path, ...]:
    """Return the source's licence and notice files, by name; they must travel with the weights."""
    return tuple(
        path for path in sorted(folder.iterdir()) if is_license_file(path.name) and path.is_file()
    )


def _front_matter(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the plain values and lists at the top of a card's YAML; {} for anything else.

    No YAML parser: a card is a stranger's text, and three plain keys of it are wanted.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        lines = file.read(_README_BYTES).decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    values: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return {name: tuple(found) for name, found in values.items()}
        named = re.match(r"([a-z_]+):(.*)", line)
        item = re.match(r"\s*- (.*)", line)
        if named:
            key = named[1]
            values[key] = _scalars(named[2])
        elif item and key:
            values[key] += _scalars(item[1])
    return {}


def _scalars(text: str) -> list[str]:
    inner = text.strip().removeprefix("[").removesuffix("]")
    return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]


def _first(values: Iterable[str], pattern: re.Pattern[str]) -> str | None:
    return next((value for value in values if pattern.fullmatch(value)), None)
