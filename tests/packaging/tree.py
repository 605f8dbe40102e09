"""A scratch copy of the repository as git has it, for tests that build or change it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_GENERATED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache"
)


def copy_repository(target: Path) -> Path:
    """Copy the files git knows or would add, links as links; the whole folder where git is absent.

    Returns `target`.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        shutil.copytree(REPOSITORY, target, symlinks=True, ignore=_GENERATED)
        return target
    for name in filter(None, listed.stdout.split("\0")):
        source = REPOSITORY / name
        if not source.exists():  # deleted, not yet committed
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / name, follow_symlinks=False)
    return target
