"""What a quantized folder lost against its source, and what it saved: the quality report.

Knows both folders' sizes, and sums up what `compare.py` measures. Refuses to hold two models at
once, and to give times that are not the quantized kernels'.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.quantize.compare import (
    KEPT,
    MAX_TOKENS,
    Answered,
    Compared,
    Progress,
    answer_all,
    compare_all,
)
from fastvlm_mlx.quantize.pictures import Examined, bundled_pictures
from fastvlm_mlx.quantize.side import Side, describe

_WORST = 5
_UNPACKED = "the quantized weights were unpacked for the CPU: times would be a float model's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(unquantized ‖ quantized) of next-token distributions, in nats, over all positions."""

    mean: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """One of the pictures that changed most: its mean KL, its worst question and both answers."""

    picture: str
    kl: float
    question: str
    unquantized: str
    quantized: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it. Shares are from 0 to 1. `notes` say what was not measured, and why."""

    device: str
    pictures: int
    questions: int
    positions: int
    unquantized: Side
    quantized: Side
    kl: Divergence
    top1_agreement: float
    same_answers: float
    worst: tuple[Worst, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; but for `device` and `speed` they repeat from run to run."""
        values = dataclasses.asdict(self)
        return {**values, "worst": list(values["worst"]), "notes": list(self.notes)}

    def rows(self) -> list[tuple[str, str, str]]:
        """Return a table's rows: what, unquantized, quantized."""
        before, after = self.unquantized, self.quantized
        both: list[tuple[str, Callable[[Side], str]]] = [
            ("weights", lambda side: readable_bytes(side.size.bytes)),
            ("  of the decoder", lambda side: readable_bytes(side.size.decoder_bytes)),
            ("bits a weight", lambda side: f"{side.size.bits_per_weight:.2f}"),
            ("  of the decoder", lambda side: f"{side.size.decoder_bits_per_weight:.2f}"),
            ("exactly right", lambda side: _shown(side.exact, "{:.1%}")),
        ]
        if after.speed is not None:
            both += [
                ("prefill", lambda side: _shown(_time(side, "prefill_ms"), "{:.1f} ms")),
                ("decode", lambda side: _shown(_time(side, "decode_tps"), "{:.1f} tokens/s")),
            ]
        rows = [(what, show(before), show(after)) for what, show in both]
        return rows[:4] + [
            ("KL, mean", "", f"{self.kl.mean:.2g} nats"),
            ("KL, median", "", f"{self.kl.median:.2g}"),
            ("KL, 99 %", "", f"{self.kl.p99:.2g}"),
            ("KL, largest", "", f"{self.kl.max:.2g}"),
            ("same likeliest token", "", f"{self.top1_agreement:.1%}"),
            ("same whole answer", "", f"{self.same_answers:.1%}"),
        ] + [row for row in rows[4:] if row[1:] != ("", "")]  # fmt: skip


def measure(
    unquantized: Callable[[], Engine],
    quantized: Callable[[], Engine],
    *,
    pictures: Sequence[Examined] | None = None,
    vision_from: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Report:
    """Load, ask and free one model, then the other; compare along the first one's greedy answers.

    Each callable loads its engine when called; load both in one dtype, or that is compared too.
    `pictures` are the bundled ones by default. `vision_from` is the folder that the source's tower
    is in, if it has none. `progress` gets (questions done, in all, which model). Raises what
    loading and encoding raise.
    """
    asked = bundled_pictures() if pictures is None else tuple(pictures)
    if not asked:
        raise PromptError("the report needs at least one picture")
    engine = unquantized()
    answered = answer_all(engine, asked, max_tokens=max_tokens, progress=progress)
    before = describe(engine, [item.answer for item in answered], vision_from=vision_from)
    del engine
    gc.collect()
    mx.clear_cache()
    engine = quantized()
    compared = compare_all(engine, asked, answered, max_tokens=max_tokens, progress=progress)
    after = describe(engine, [item.answer for item in compared])
    vocabulary = engine.config.decoder.vocab_size
    return summarise(asked, answered, compared, before, after, vocabulary=vocabulary)


def summarise(
    pictures: Sequence[Examined],
    answered: Sequence[Answered],
    compared: Sequence[Compared],
    before: Side,
    after: Side,
    *,
    vocabulary: int,
) -> Report:
    """Sum up: one `Answered` and one `Compared` for every question, in the pictures' order."""
    kl = np.concatenate([item.kl for item in compared])
    agrees = np.concatenate([item.agrees for item in compared])
    pairs = list(zip(answered, compared, strict=True))
    exact = [
        _exact(pictures, [item.answer.text for item in items]) for items in (answered, compared)
    ]
    notes = []
    if exact[0] is None:
        notes.append("accuracy: the set has no right answers")
    elif exact[0] < 0.5:
        notes.append(
            f"accuracy: the unquantized model itself answers only {exact[0]:.0%} of the set "
            "in the exact words, so it measures nothing"
        )
        exact = [None, None]
    if after.speed is None:
        notes.append(f"times: {_UNPACKED}")
    if vocabulary > KEPT:
        notes.append(f"KL: over the {KEPT} likeliest tokens and all others as one, a lower bound")
    return Report(
        device=device_name(),
        pictures=len(pictures),
        questions=len(pairs),
        positions=len(kl),
        unquantized=dataclasses.replace(before, exact=exact[0]),
        quantized=dataclasses.replace(after, exact=exact[1]),
        kl=Divergence(
            mean=float(kl.mean()),
            median=float(np.median(kl)),
            p99=float(np.percentile(kl, 99)),
            max=float(kl.max()),
        ),
        top1_agreement=float(agrees.mean()),
        same_answers=float(np.mean([a.answer.text == c.answer.text for a, c in pairs])),
        worst=_worst(pictures, pairs),
        notes=tuple(notes),
    )


def _exact(pictures: Sequence[Examined], texts: Sequence[str]) -> float | None:
    """Return the share of the questions with a right answer that got exactly that one."""
    right = [question.answer for picture in pictures for question in picture.questions]
    scored = [text == answer for text, answer in zip(texts, right, strict=True) if answer]
    return sum(scored) / len(scored) if scored else None


def _worst(
    pictures: Sequence[Examined], pairs: Sequence[tuple[Answered, Compared]]
) -> tuple[Worst, ...]:
    rest = iter(pairs)
    rows = []
    for picture in pictures:
        mine = [(question, *next(rest)) for question in picture.questions]
        question, answered, compared = max(mine, key=lambda item: float(item[2].kl.mean()))
        mean = float(np.concatenate([item[2].kl for item in mine]).mean())
        rows.append(
            Worst(
                picture=picture.name,
                kl=mean,
                question=question.text,
                unquantized=answered.answer.text,
                quantized=compared.answer.text,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.kl)[:_WORST])


def device_name() -> str:
    """Return what ran it: MLX's device type and the chip's own name."""
    kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    return f"{kind}: {mx.device_info().get('device_name', 'unknown')}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _time(side: Side, name: str) -> float | None:
    return None if side.speed is None else getattr(side.speed, name)
