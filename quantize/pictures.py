"""What a model is asked for the quality report: pictures, questions, right answers if any.

The bundled set is forty held-out pictures of the demo model's examination with their questions and
answers; any FastVLM can be asked them. `examples/demo_model/make_picture_set.py` wrote it:

    cd examples/demo_model && python make_picture_set.py ../../quantize/picture_set

Knows no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fastvlm_mlx.prompt.image import ImageSource
from fastvlm_mlx.prompt.sources import source_name

DESCRIBE = "Describe the image."


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture; `answer` is the one exact text that is right, if there is one."""

    text: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """A picture (anything `Engine.encode` takes), the name it is reported by, its questions."""

    name: str
    source: ImageSource
    questions: tuple[Question, ...]


def bundled_pictures() -> tuple[Examined, ...]:
    """Return the set that comes with the package: 40 pictures, 173 questions, all with answers."""
    folder = resources.files("fastvlm_mlx.quantize") / "picture_set"
    listed = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return tuple(
        Examined(
            entry["file"],
            (folder / entry["file"]).read_bytes(),
            tuple(Question(asked["question"], asked["answer"]) for asked in entry["questions"]),
        )
        for entry in listed["pictures"]
    )


def own_pictures(
    sources: Sequence[str | os.PathLike[str]], *, questions: Sequence[str] = (DESCRIBE,)
) -> tuple[Examined, ...]:
    """Return a user's pictures (paths or URLs), each to be asked the same questions.

    A file goes by its name without its folders, as reports are published.
    """
    asked = tuple(Question(text) for text in questions)
    return tuple(Examined(_name(source), source, asked) for source in sources)


def _name(source: str | os.PathLike[str]) -> str:
    path = Path(os.fspath(source))
    return path.name if path.is_file() else source_name(source)
