"""What is said after an answer: how long it took, why it ended, what was dropped for it."""

from __future__ import annotations

from fastvlm_mlx.events import TurnsDropped
from fastvlm_mlx.terminal.answers import Answer


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
        return f"the answer was cut at {most} tokens (max_tokens)"
    return "the answer was cut: the model's context is full"


def dropped_line(dropped: TurnsDropped) -> str:
    """Return one line that says which turns the model no longer sees."""
    turns = f"the oldest {_count(dropped.turns, 'turn')}"
    if dropped.images:
        turns += f" with {_count(dropped.images, 'picture')}"
    return f"the context is full: {turns} {'was' if dropped.turns == 1 else 'were'} dropped"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number != 1 else noun
