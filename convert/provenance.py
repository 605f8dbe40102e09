"""Where a source comes from and under which licence, as far as its folder says.

Knows a model card's front matter, and the licence and notice files, which must travel with the
weights. What a card says is a stranger's text: three keys of it are read, and only plain values are
passed on. A vision tower from elsewhere has terms of its own. Writes nothing.

Source: the card of https://huggingface.co/apple/FastVLM-0.5B (`license: apple-amlr`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_mlx.checkpoint.hub import is_license_file

APPLE_LICENSE = "apple-amlr"
_OWN_LICENSE = "same-as-fastvlm-mlx"

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@.+)?")
# What may go from a stranger's card into ours.
_LICENSE_ID = re.compile(r"[\w.+-]{1,64}")
_LICENSE_NAME = re.compile(r"[\w.+() -]{1,64}")
# A card is read, and a licence copied, up to this size; what is larger is none.
_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a source says of itself. `license` is the hub's id.

    `base_models` are what it was made from. `is_apple`: its weights derive from Apple's; a folder
    that says nothing is taken for Apple's zips. `license_files` are to be copied, each under the
    name it is given here. `tower` is where the vision tower is from, if that is elsewhere;
    `is_apple` and `license_files` are then those of both.
    """

    base_models: tuple[str, ...]
    license: str | None
    license_name: str | None
    is_apple: bool
    license_files: Mapping[str, Path]
    tower: Provenance | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is this project's demo model or was made from it, and from nothing else."""
        mine = self.license_name == _OWN_LICENSE and not self.is_apple
        return mine and (self.tower is None or self.tower.is_own)


def find_provenance(
    source_folder: Path,
    source_name: str,
    *,
    tower_folder: Path | None = None,
    tower_name: str | None = None,
) -> Provenance:
    """Read what the source is. `source_name` is what was asked for: "demo", a hub name, a folder.

    A hub name is the base model; otherwise the README's front matter may name some. `tower_folder`
    and `tower_name` are the same of the vision tower's source; no name: it is not another.
    """
    found = _find(source_folder, source_name)
    if tower_folder is None or tower_name is None:
        return found
    tower = _find(tower_folder, tower_name)
    return replace(
        found,
        is_apple=found.is_apple or tower.is_apple,
        license_files=_joined(found.license_files, tower.license_files),
        tower=tower,
    )


def _find(folder: Path, name: str) -> Provenance:
    matter = _front_matter(folder / "README.md")
    listed = tuple(base for base in matter.get("base_model", ()) if _HUB_NAME.fullmatch(base))
    bases = tuple(dict.fromkeys(listed))
    match = _HUB_NAME.fullmatch(name)
    # As `hub.resolve` has it: a folder that exists is no hub name.
    if match and not Path(name).is_dir():
        bases = (match["repo"],)
    license_id = _first(matter.get("license", ()), _LICENSE_ID)
    license_name = _first(matter.get("license_name", ()), _LICENSE_NAME)
    if name == "demo":
        listed, bases, license_id, license_name = (), (), "other", _OWN_LICENSE
    from_apple = any(base.lower().startswith("apple/") for base in (*bases, *listed))
    files = {path.name: path for path in find_license_files(folder)}
    # Apple's zips say nothing; a folder with a licence of its own is not taken for one.
    from_apple |= license_id == APPLE_LICENSE or (license_id is None and not files)
    return Provenance(
        base_models=bases,
        license=license_id,
        license_name=license_name,
        is_apple=from_apple,
        license_files=files,
    )


def find_license_files(folder: Path) -> tuple[Path, ...]:
    """Return the source's licence and notice files, by name; they must travel with the weights."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if is_license_file(path.name) and path.is_file() and path.stat().st_size <= _TEXT_BYTES
    )


def _joined(files: Mapping[str, Path], towers: Mapping[str, Path]) -> dict[str, Path]:
    """Return both sources' licence files: the same text once, another of a taken name renamed."""
    joined = dict(files)
    texts = {path.read_bytes() for path in files.values()}
    for name, path in towers.items():
        if path.read_bytes() not in texts:
            joined[_free_name(name, joined)] = path
    return joined


def _free_name(name: str, taken: Iterable[str]) -> str:
    lower = {each.lower() for each in taken}  # a Mac's disks know no case
    while name.lower() in lower:
        name = f"{Path(name).stem}-vision-tower{Path(name).suffix}"
    return name


def _front_matter(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the plain values and lists at the top of a card's YAML; {} for anything else.

    No YAML parser: a card is a stranger's text, and three plain keys of it are wanted.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        lines = file.read(_TEXT_BYTES).decode("utf-8", "replace").splitlines()
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
    inner = re.sub(r"(^|\s)#.*", "", text).strip().removeprefix("[").removesuffix("]")
    return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]


def _first(values: Iterable[str], pattern: re.Pattern[str]) -> str | None:
    return next((value for value in values if pattern.fullmatch(value)), None)
