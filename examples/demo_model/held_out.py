"""The examination: held-out pictures, their questions, and how answers are scored.

Knows what is asked and what counts as right (the exact text). Refuses to know who answers:
evaluate.py asks this project's engine, check_reference.py asks transformers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from questions import KINDS, Question, questions_about
from scenes import held_out_scenes


@dataclass(frozen=True, slots=True)
class Examined:
    """A held-out picture and what is asked about it."""

    seed: int
    image: Image.Image
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of exactly right answers to one kind of question."""

    kind: str
    asked: int
    right: float
    chance: float
    blank: float


def examination(pictures: int) -> list[Examined]:
    """`pictures` held-out pictures with one question of every kind that makes sense for each."""
    papers = []
    for seed, scene in held_out_scenes(pictures):
        questions = questions_about(scene, np.random.default_rng([seed, 31]))
        papers.append(Examined(seed, scene.image, tuple(questions)))
    return papers


def score(papers: list[Examined], seen: list[str], blind: list[str]) -> list[Score]:
    """One row a kind and a last row for all; `chance` always gives the kind's commonest answer."""
    questions = [question for paper in papers for question in paper.questions]
    rows = []
    for kind in (*KINDS, "all"):
        indexes = [i for i, q in enumerate(questions) if kind in (q.kind, "all")]
        answers = [questions[i].answer for i in indexes]
        common = Counter(answers).most_common(1)[0][1]
        if kind == "all":
            common = sum(round(row.chance * row.asked) for row in rows)
        rows.append(Score(
            kind,
            len(indexes),
            float(np.mean([seen[i] == questions[i].answer for i in indexes])),
            common / len(indexes),
            float(np.mean([blind[i] == questions[i].answer for i in indexes])),
        ))  # fmt: skip
    return rows


def table(rows: list[Score], title: str) -> str:
    lines = [f"{title:<16}{'asked':>7}{'right':>9}{'chance':>9}{'blank':>9}"]
    lines += [
        f"{r.kind:<16}{r.asked:>7}{r.right:>9.1%}{r.chance:>9.1%}{r.blank:>9.1%}" for r in rows
    ]
    return "\n".join(lines)
