"""Prints pip requirements for one end of pyproject.toml's range of mlx and mlx-lm.

usage: mlx_range.py lowest | newest | beyond

lowest: the lower bounds, as pins. newest: the range itself. beyond: without the upper bounds, to
hear of a release that breaks us before users do.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
RANGED = re.compile(r"(?P<name>mlx|mlx-lm)>=(?P<low>[\d.]+),<(?P<high>[\d.]+)")


def requirements(end: str) -> list[str]:
    """The two requirements for `end`; on Linux mlx's CPU backend comes in the same version."""
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    found = [match for text in dependencies if (match := RANGED.fullmatch(text))]
    if {match["name"] for match in found} != {"mlx", "mlx-lm"}:
        raise SystemExit("pyproject.toml: mlx and mlx-lm need a range of the form >=LOW,<HIGH")
    backend = "[cpu]" if sys.platform == "linux" else ""
    made = []
    for match in found:
        name = match["name"] + (backend if match["name"] == "mlx" else "")
        form = {
            "lowest": f"{name}=={match['low']}",
            "newest": f"{name}>={match['low']},<{match['high']}",
            "beyond": f"{name}>={match['low']}",
        }
        made.append(form[end])
    return made if end == "lowest" else ["--upgrade", *made]


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"], ["beyond"]):
        raise SystemExit("usage: mlx_range.py lowest | newest | beyond")
    print(" ".join(requirements(sys.argv[1])))
