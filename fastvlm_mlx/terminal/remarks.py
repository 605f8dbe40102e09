"""What is said after an answer: how long it took, why it ended, what was dropped for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import one_line
from fastvlm_mlx.events import TurnsDropped
from fastvlm_mlx.terminal.answers import Answer, NamedDrop
from fastvlm_mlx.terminal.status import cells, counted

if TYPE_CHECKING:
    from fastvlm_mlx.terminal.live_session import Facts

_NAMES_SHOWN = 4


def resumed_line(name: str, facts: Facts, columns: int) -> str:
    """Return what a session file that is gone on with holds; "" if that is no turn.

    It has at most `columns` cells: the question is shortened.
    """
    if not facts.session.turns:
        return ""
    line = f"{one_line(name)}: {counted(facts.session.turns, 'turn')}"
    if facts.pictures:
        line += f", {counted(len(facts.pictures), 'picture')}"
    line += f"; last question: {one_line(facts.last_question or '')}"
    if cells(line) <= columns:
        return line
    while line and cells(line) >= columns:
        line = line[:-1]
    return f"{line}…"


def after_answer(answer: Answer) -> list[str]:
    """Return the lines after an answer that was read to its end: its numbers, and how it ended."""
    if answer.finished is None:
        return []
    if not answer.kept:
        return ["stopped"]
    stats = answer.finished.stats
    numbers = []
    if stats.ttft_ms is not None:
        numbers.append(f"{stats.ttft_ms:.0f} ms to first token")
    if stats.decode_tps is not None:
        numbers.append(f"{stats.decode_tps:.0f} tok/s")
    numbers.append(f"{stats.reused_tokens} of {stats.prompt_tokens} positions reused")
    lines = [" · ".join(numbers)]
    if answer.finished.finish_reason == "cancelled":
        return [*lines, "stopped; /undo takes it back, /retry asks again"]
    why = cut_line(answer)
    return [*lines, why] if why else lines


def cut_line(answer: Answer) -> str:
    """Return why an answer is not whole; "" if it is, or was stopped by its reader."""
    if answer.finished is None or answer.finished.finish_reason != "length":
        return ""
    most = answer.request.settings.max_tokens
    if answer.finished.stats.generated_tokens >= most:
        return f"the answer was cut at {counted(most, 'token')} (max_tokens)"
    return "the answer was cut: the model's context is full"


def dropped_line(dropped: TurnsDropped) -> str:
    """Return one line that says which turns the model no longer sees."""
    many = dropped.turns != 1
    turns = f"the oldest {counted(dropped.turns, 'turn') if many else 'turn'}"
    line = f"the context is full: {turns} {'were' if many else 'was'} dropped"
    if not dropped.images:
        return line
    names = dropped.names if isinstance(dropped, NamedDrop) else ()
    pictures = listed(names) if names else counted(dropped.images, "picture")
    it = "it" if dropped.images == 1 else "them"
    return f"{line}, with {pictures}: give {it} again to ask about {it}"


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c", each fit for a line; of many names the first."""
    shown = [one_line(name) for name in names[:_NAMES_SHOWN]]
    if len(names) > _NAMES_SHOWN:
        shown.append(f"{len(names) - _NAMES_SHOWN} more")
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
