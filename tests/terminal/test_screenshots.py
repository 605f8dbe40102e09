"""The README's screenshots are real: the script that drew them draws the same again."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_mlx as fv
from tests.terminal.chat_models import PICTURES

pytestmark = pytest.mark.slow

SCREENSHOTS = PICTURES.parent / "screenshots"
NAMES = ("chat.svg", "commands.svg")
# What a machine's speed decides: times, memory, and what was read while the user typed.
MEASURED = re.compile(
    r"[\d.]+(?= (?:ms|s|tok/s|kB|MB)\b)|\d+(?= of \d+ positions reused)|\d+(?= reused)"
    r"|, 16 positions$"
)
RUN = re.compile(r'<text class="\w+-r\d+" [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>')


def rows(file: Path) -> list[str]:
    """The lines of a screenshot from top to bottom, blanks made one."""
    lines: dict[float, str] = {}
    for y, run in RUN.findall(file.read_text(encoding="utf-8")):
        lines[float(y)] = lines.get(float(y), "") + html.unescape(run)
    return [" ".join(lines[y].split()) for y in sorted(lines)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screenshots")
    script = str(SCREENSHOTS / "make_screenshots.py")
    subprocess.run([sys.executable, script, str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_screenshot_shows_what_happens(drawn: Path, name: str) -> None:
    committed, fresh = (
        [MEASURED.sub("#", row) for row in rows(folder / name)] for folder in (SCREENSHOTS, drawn)
    )
    assert len(committed) > 20
    assert committed == fresh
    assert (SCREENSHOTS / name).stat().st_size < 150_000


def test_the_answers_are_the_demo_models(drawn: Path) -> None:
    chat = fv.load("demo").chat()
    pictures = [PICTURES / "three_shapes_landscape.png"]
    shown = rows(drawn / "chat.svg")
    for question in ("Describe the image.", "What shape is yellow?", "Where is the green square?"):
        asked = next(i for i, row in enumerate(shown) if row.endswith(f"> {question}"))
        answer = chat.ask(question, pictures).text
        pictures = []
        assert shown[asked + 1] == answer
