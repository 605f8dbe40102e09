"""What the demo model reads in training: dialogues about the pictures of one batch.

Knows which mixture of single questions, two-turn chats, two-picture prompts and plain talk the
model sees. Refuses to know about tokens: a dialogue is turns of text that name their pictures by
their place in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from questions import Question, description, questions_about, small_talk
from scenes import Scene

DIALOGUES_PER_PICTURE = 3
KIND_WEIGHTS = {"describe": 1.2, "colour": 4.0, "where": 2.0}
FIRST_OR_SECOND = (
    "What is in the {which} picture?", "What is in the {which} image?",
    "Describe the {which} picture.", "Describe the {which} image.",
    "What does the {which} picture show?", "What do you see in the {which} image?",
)  # fmt: skip
BOTH = (
    "Describe the pictures.",
    "Describe the images.",
    "What is in the pictures?",
    "What is in the images?",
    "What do you see?",
    "Describe both images.",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with the pictures it brings, by number, and its answer."""

    pictures: tuple[int, ...]
    text: str
    answer: str
    about: tuple[int, ...] = ()  # as in Question
    shown_by: tuple[int, ...] = ()


def batch_dialogues(scenes: list[Scene], rng: np.random.Generator) -> list[list[Turn]]:
    """DIALOGUES_PER_PICTURE for every picture of the batch, in the training mixture."""
    dialogues = []
    for index in range(len(scenes)):
        for _ in range(DIALOGUES_PER_PICTURE):
            other = int(rng.integers(len(scenes)))
            draw = rng.random()
            if draw < 0.70:
                dialogues.append([single_turn(rng, scenes, index)])
            elif draw < 0.86:
                dialogues.append(_chat(rng, scenes, index))
            elif draw < 0.93:
                dialogues.append([_pair(rng, scenes, index, other)])
            elif draw < 0.97:
                dialogues.append([single_turn(rng, scenes, index), single_turn(rng, scenes, other)])
            else:
                question = small_talk(rng)
                dialogues.append([Turn((), question.text, question.answer)])
    return dialogues


def single_turn(rng: np.random.Generator, scenes: list[Scene], index: int) -> Turn:
    question = _draw(rng, questions_about(scenes[index], rng))
    text = casual(rng, question.text)
    return Turn((index,), text, question.answer, question.about, question.shown_by)


def _chat(rng: np.random.Generator, scenes: list[Scene], index: int) -> list[Turn]:
    """Two or three questions about one picture that is shown once; sometimes thanks at the end."""
    turns = [single_turn(rng, scenes, index)]
    for _ in range(1 + int(rng.random() < 0.3)):
        question = _draw(rng, questions_about(scenes[index], rng))
        if rng.random() < 0.06:
            question = small_talk(rng)
        turns.append(Turn((), casual(rng, question.text), question.answer))
    return turns


def _pair(rng: np.random.Generator, scenes: list[Scene], first: int, second: int) -> Turn:
    """Two pictures before one question."""
    answers = description(scenes[first]), description(scenes[second])
    if rng.random() < 0.25:
        text = BOTH[rng.integers(len(BOTH))]
        return Turn((first, second), casual(rng, text), " ".join(answers))
    which = int(rng.integers(2))
    text = FIRST_OR_SECOND[rng.integers(len(FIRST_OR_SECOND))]
    text = text.format(which=("first", "second")[which])
    return Turn((first, second), casual(rng, text), answers[which])


def _draw(rng: np.random.Generator, questions: list[Question]) -> Question:
    weights = np.array([KIND_WEIGHTS.get(q.kind, 1.0) for q in questions])
    return questions[rng.choice(len(questions), p=weights / weights.sum())]


def casual(rng: np.random.Generator, text: str) -> str:
    """Now and then in lower case, without the last mark."""
    draw = rng.random()
    if draw < 0.06:
        return text.lower()
    if draw < 0.12:
        return text[:-1] if text[-1] in ".?!" else text
    return text.lower().rstrip(".?!") if draw < 0.15 else text
