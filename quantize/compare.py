"""Two models along the same answers, one after the other: what each next token would have been.

The first model answers and leaves its distributions behind; the second is led along the same
tokens. Knows engines and arrays of probabilities. Knows no files, no sizes and no table.

Memory. Of each distribution the first model's `KEPT` likeliest tokens are kept, and the mass of the
rest as one outcome: 16 kB a position, whatever the vocabulary. The KL divergence of such a coarser
distribution is never above the whole one's (log-sum inequality), and equal to it for a vocabulary
of up to `KEPT`. One answer's distributions are alive at a time: 48 x 152k x float32 is 29 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.events import Generation
from fastvlm_mlx.model.fastvlm import EncodedImage
from fastvlm_mlx.quantize.pictures import Examined, Question

KEPT = 2048
MAX_TOKENS = 48
"""Longest answer that is compared, in tokens."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One next-token distribution, coarsened: log-probabilities of some ids, and of all others."""

    ids: np.ndarray
    logprobs: np.ndarray
    rest: float

    @property
    def likeliest(self) -> int:
        """The id that greedy decoding takes."""
        return int(self.ids[self.logprobs.argmax()])


@dataclass(frozen=True, slots=True)
class Answered:
    """What the first model said to a question, and the distribution before each of its tokens."""

    answer: Generation
    outcomes: tuple[Outcomes, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """What the second model says to it: KL(first ‖ second) in nats, and whether the likeliest
    token is the same, at each position of the first's answer; and its own answer."""

    answer: Generation
    kl: np.ndarray
    agrees: np.ndarray


def answer_all(
    engine: Engine,
    pictures: Sequence[Examined],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> list[Answered]:
    """Answer every question greedily and keep the distributions along each answer."""
    answered = []
    for question, image in _asked(engine, pictures, "Unquantized model", progress):
        answer = _answer(engine, question, image, max_tokens)
        rows = _rows(engine, question, image, answer.token_ids)
        answered.append(Answered(answer, tuple(coarsen(row) for row in rows)))
    return answered


def compare_all(
    engine: Engine,
    pictures: Sequence[Examined],
    answered: Sequence[Answered],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> list[Compared]:
    """Lead a model along another's answers to the same questions, and let it answer itself.

    Raises FastVLMError if it gives no numbers (inf or NaN), or has another vocabulary.
    """
    compared = []
    asked = _asked(engine, pictures, "Quantized model", progress)
    for (question, image), first in zip(asked, answered, strict=True):
        rows = _rows(engine, question, image, first.answer.token_ids)
        kl, agrees = [], []
        for row, outcomes in zip(rows, first.outcomes, strict=True):
            kl.append(divergence(outcomes, row))
            agrees.append(int(row.argmax()) == outcomes.likeliest)
        answer = _answer(engine, question, image, max_tokens)
        compared.append(Compared(answer, np.array(kl), np.array(agrees)))
    return compared


def coarsen(row: np.ndarray, kept: int = KEPT) -> Outcomes:
    """Keep the `kept` likeliest of a distribution's float64 log-probabilities [V]."""
    if len(row) <= kept:
        return Outcomes(np.arange(len(row), dtype=np.uint32), row.astype(np.float32), 0.0)
    order = np.argpartition(row, len(row) - kept)
    ids = np.sort(order[-kept:])
    rest = float(np.exp(row[order[:-kept]]).sum())
    return Outcomes(ids.astype(np.uint32), row[ids].astype(np.float32), rest)


def divergence(first: Outcomes, row: np.ndarray) -> float:
    """Return KL(first ‖ second) in nats, the second given as float64 log-probabilities [V]."""
    second = row[first.ids].astype(np.float32).astype(np.float64)
    logprobs = first.logprobs.astype(np.float64)
    probabilities = np.exp(logprobs)
    kl = float((probabilities * (logprobs - second)).sum())
    if first.rest > 0:
        others = np.ones(len(row), dtype=bool)
        others[first.ids] = False
        second_rest = max(float(np.exp(row[others]).sum()), np.finfo(np.float64).tiny)
        kl += first.rest * float(np.log(first.rest / second_rest))
    return max(kl, 0.0)


def _asked(
    engine: Engine, pictures: Sequence[Examined], what: str, progress: Progress | None
) -> Iterator[tuple[Question, EncodedImage]]:
    """Yield every question with its picture, which is encoded once."""
    total = sum(len(picture.questions) for picture in pictures)
    done = 0
    for picture in pictures:
        image = engine.encode(picture.source)
        for question in picture.questions:
            yield question, image
            done += 1
            if progress is not None:
                progress(done, total, what)


def _answer(engine: Engine, question: Question, image: EncodedImage, max_tokens: int) -> Generation:
    return engine.generate(question.text, images=[image], max_tokens=max_tokens, profile=True)


def _rows(
    engine: Engine, question: Question, image: EncodedImage, token_ids: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yield the log-probabilities [V] before each token, normalised in float64."""
    for block in engine.distributions(question.text, [image], token_ids):
        for row in np.array(block):
            if not np.isfinite(row).all():
                raise FastVLMError(f"{engine.source} gives no numbers: its weights are damaged")
            wide = row.astype(np.float64)
            yield wide - np.log(np.exp(wide).sum())
