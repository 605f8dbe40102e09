"""Does a folder hold what a consumer requires? Replayed line by line, with the line it comes from.

The requirements are data: `consumers/NAME.json` lists them, each with one plain sentence and the
consumer's source file and line. This module runs them; `verify_files`, `verify_template`,
`verify_tensors`, `verify_packing` and `verify_mlpackage` know the kinds of check. Of weights only
headers are read, without MLX. Knows nothing of how a folder was made, nor of the tables that made
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from fastvlm_mlx.convert import (
    verify_files,
    verify_mlpackage,
    verify_packing,
    verify_template,
    verify_tensors,
)
from fastvlm_mlx.convert.verify_folder import Folder, Json, Unchecked
from fastvlm_mlx.errors import CheckpointError, CheckpointMismatch

CONSUMERS = ("native", "mlx-vlm", "mlx-swift-lm", "app")

_FILE_CHECKS: dict[str, Callable[[Folder, Json], str | None]] = {
    "file": verify_files.check_file,
    "json": verify_files.check_json,
    "field": verify_files.check_field,
    "same-field": verify_files.check_same_field,
    "sections": verify_files.check_sections,
    "token": verify_files.check_token,
    "token-name": verify_files.check_token_name,
    "no-token": verify_files.check_no_token,
    "generation-eos": verify_files.check_generation_eos,
    "template": verify_template.check_template,
    "same-template": verify_template.check_same_template,
    "weights": verify_files.check_weights,
    "no-stray-weights": verify_files.check_no_strays,
    "index": verify_tensors.check_index,
    "sorted": verify_tensors.check_sorted,
    "metadata": verify_tensors.check_metadata,
    "setting": verify_packing.check_setting,
    "setting-keys": verify_packing.check_setting_keys,
    "uniform": verify_packing.check_uniform,
    "package": verify_mlpackage.check_package,
    "array": verify_mlpackage.check_array,
}
_INVENTORY_CHECKS: dict[
    str, Callable[[Folder, Json, Mapping[str, verify_tensors.Shape]], str | None]
] = {
    "no-other-tensors": verify_tensors.check_no_others,
    "dtypes": verify_tensors.check_dtypes,
    "packed": verify_packing.check_packed,
    "overrides-used": verify_packing.check_overrides_used,
    "both-spellings": verify_packing.check_both_spellings,
    "float-modules": verify_packing.check_float_modules,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One requirement and how it stands. `cite` is the consumer's source: repository, file, line.

    `passed` is None where it could not be checked because another requirement fails; `detail` says
    what is wrong, in one line.
    """

    requirement: str
    says: str
    cite: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads folders: the version that was read, and its requirements as data.

    `built_in_sizes` names the requirements that only a tower of Apple's size can meet, because the
    program's code has its sizes; the first of them tells such a tower from others.
    """

    name: str
    version: str
    sizes: Json
    requirements: tuple[Json, ...]
    sources: Mapping[str, str]
    built_in_sizes: tuple[str, ...] = ()

    def cite(self, requirement: Json) -> str:
        """Return where a requirement comes from: repository@commit, or version, and path:line."""
        source, _, line = requirement["cite"].rpartition(":")
        return f"{self.sources[source]}:{line}"


@cache
def consumer(name: str) -> Consumer:
    """Return the requirements of one of CONSUMERS. Raises CheckpointError for another name."""
    if name not in CONSUMERS:
        raise CheckpointError(f"{name!r} is none of {', '.join(CONSUMERS)}")
    file = resources.files("fastvlm_mlx.convert") / "consumers" / f"{name}.json"
    data: dict[str, Any] = json.loads(file.read_text("utf-8"))
    requirements = tuple(data["requirements"])
    return Consumer(
        name,
        data["version"],
        data["sizes"],
        requirements,
        data["sources"],
        tuple(data.get("built_in_sizes", ())),
    )


def verify(folder: Path, name: str) -> tuple[Finding, ...]:
    """Return a finding for each requirement of a consumer, in the order of its data file.

    Raises CheckpointError if `folder` is no folder, or for a name that is none of CONSUMERS.
    """
    source = consumer(name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    opened = Folder(folder)
    asked = _Asked(source, verify_tensors.read_sizes(opened, source.sizes))
    findings = [_finding(opened, asked, needed) for needed in source.requirements]
    if not any(finding.passed is False for finding in findings):
        # Something could not be checked though nothing that it rests on fails: no pass either.
        findings = [
            Finding(f.requirement, f.says, f.cite, bool(f.passed), f.detail) for f in findings
        ]
    return tuple(findings)


def require(folder: Path, name: str) -> bool:
    """Raise CheckpointMismatch, naming the first requirements that a folder fails, if it does.

    For a folder that is not yet where the user wants it, so its own name is not said.
    Returns True if it meets them all, False if it is right but for the sizes of its tower, which
    the consumer's code fixes: a small model then, which that program cannot run.
    """
    findings = verify(folder, name)
    failed = [finding for finding in findings if finding.passed is False]
    if failed and not only_sizes_differ(name, findings):
        said = "; ".join(f"{f.requirement}: {f.detail} [{f.cite}]" for f in failed[:2])
        more = f"; and {len(failed) - 2} more" if len(failed) > 2 else ""
        raise CheckpointMismatch(f"what was written does not do for {name}: {said}{more}")
    return not failed


def only_sizes_differ(name: str, findings: Iterable[Finding]) -> bool:
    """Whether all is met but that the tower has other sizes than the consumer's code."""
    sizes = consumer(name).built_in_sizes
    unmet = {finding.requirement for finding in findings if not finding.passed}
    return bool(sizes) and sizes[0] in unmet and unmet <= set(sizes)


def consumers_of(folder: Path) -> tuple[str, ...]:
    """Return the consumers that a folder's tensor names are meant for.

    Raises CheckpointError for a folder without weights, CheckpointMismatch for other weights.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    try:
        names = Folder(folder).tensors
    except Unchecked as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not names:
        raise CheckpointError(f"{folder}: the weight files hold no tensors")
    if any(name.startswith("multi_modal_projector.linear_0.") for name in names):
        return ("app",)
    if any(name.startswith("language_model.model.") for name in names):
        return tuple(name for name in CONSUMERS if name != "app")
    raise CheckpointMismatch(
        f"{folder} holds no MLX artifact of FastVLM (its first tensor is {next(iter(names))}): "
        "convert it first"
    )


class _Asked:
    """The tensors a consumer asks for of one folder, worked out once."""

    def __init__(self, source: Consumer, sizes: verify_tensors.Sizes) -> None:
        self.source = source
        self.sizes = sizes

    @cached_property
    def inventory(self) -> Mapping[str, verify_tensors.Shape]:
        """Every tensor's key and shape. Raises Unchecked where the config lacks a size."""
        return {
            key: shape
            for needed in self.source.requirements
            if needed["check"] == "tensors"
            for key, shape in verify_tensors.expected(needed, self.sizes)
        }


def _finding(folder: Folder, asked: _Asked, requirement: Json) -> Finding:
    """Run one check. What it cannot read leaves it unchecked."""
    passed: bool | None
    try:
        problem = _problem(folder, asked, requirement)
        passed = problem is None
    except Unchecked as error:
        problem, passed = f"not checked: {error}", None
    cite = asked.source.cite(requirement)
    return Finding(requirement["id"], requirement["says"], cite, passed, problem or "")


def _problem(folder: Folder, asked: _Asked, requirement: Json) -> str | None:
    kind = requirement["check"]
    if kind == "tensors":
        return verify_tensors.check_tensors(folder, requirement, asked.sizes)
    if kind in _INVENTORY_CHECKS:
        return _INVENTORY_CHECKS[kind](folder, requirement, asked.inventory)
    return _FILE_CHECKS[kind](folder, requirement)
