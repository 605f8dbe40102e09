"""The status line under the prompt, and /stats: numbers as people read them.

Knows how each number is written and which is worth most when there is little room. Knows nothing
of where the numbers come from.
"""

from __future__ import annotations

import textwrap
import unicodedata
from dataclasses import dataclass

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.errors import one_line
from fastvlm_mlx.events import Stats

_BETWEEN = " · "


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusFacts:
    """What the status line may say; None or 0 where there is nothing to say yet.

    `precision` is the quantization or dtype ("4 bit", "float32"); `loading` is how far loading is
    ("45%", "" when unknown) or None once the model is there; positions are of the context;
    `reused` is how many of the last answer's positions were not computed again; `stopping` that an
    answer nobody waits for is still ending.
    """

    model: str
    precision: str = ""
    loading: str | None = None
    positions: int = 0
    max_positions: int = 0
    ttft_ms: float | None = None
    decode_tps: float | None = None
    memory_bytes: int | None = None
    reused: int | None = None
    pending_images: int = 0
    stopping: bool = False


def status_line(facts: StatusFacts, columns: int) -> str:
    """Return one line of at most `columns` cells: fields in order of worth, the last left out."""
    fields = [one_line(field) for field in _fields(facts) if field]
    line = _cut(fields[0], columns)
    for field in fields[1:]:
        longer = line + _BETWEEN + field
        if cells(longer) > columns:
            break
        line = longer
    return line


def _fields(facts: StatusFacts) -> list[str]:
    waiting = f"{counted(facts.pending_images, 'picture')} to send" if facts.pending_images else ""
    if facts.loading is not None:
        return [f"loading {facts.model} {facts.loading}".rstrip(), waiting]
    context = f"{facts.positions} of {facts.max_positions} positions"
    return [
        facts.model,
        "stopping…" if facts.stopping else "",
        waiting,
        facts.precision,
        context if facts.max_positions else "",
        "" if facts.ttft_ms is None else f"TTFT {_readable_ms(facts.ttft_ms)}",
        "" if facts.decode_tps is None else _readable_tps(facts.decode_tps),
        "" if facts.memory_bytes is None else readable_bytes(facts.memory_bytes),
        f"{facts.reused} reused" if facts.reused else "",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """A session and the process it runs in, for /stats. Sizes in bytes, times in milliseconds.

    `features_bytes` is what encoded pictures kept for reuse take, of `max_features_bytes`.
    """

    turns: int
    images: int
    positions: int
    max_positions: int
    kv_bytes: int
    features_bytes: int
    max_features_bytes: int
    active_bytes: int
    peak_bytes: int
    load_ms: float | None = None
    warm_up_ms: float | None = None


def stats_rows(session: SessionFacts, last: Stats | None = None) -> list[tuple[str, str]]:
    """Return (name, value) rows: the last answer if there was one, the session, the process."""
    context = f"{session.positions} of {session.max_positions}"
    kept = (
        f"{readable_bytes(session.features_bytes)} of {readable_bytes(session.max_features_bytes)}"
    )
    rows = [
        *(_answer_rows(last) if last else ()),
        ("turns", str(session.turns)),
        ("pictures", str(session.images)),
        ("positions used", context),
        ("KV cache", readable_bytes(session.kv_bytes)),
        ("pictures kept for reuse", kept),
        ("memory in use", readable_bytes(session.active_bytes)),
        ("memory at most", readable_bytes(session.peak_bytes)),
    ]
    if session.load_ms is not None:
        rows.append(("loading", _readable_ms(session.load_ms)))
    if session.warm_up_ms is not None:
        rows.append(("warming up", _readable_ms(session.warm_up_ms)))
    return rows


def stats_lines(rows: list[tuple[str, str]], columns: int) -> list[str]:
    """Return the rows as two columns; no line reaches the last of the window's `columns`.

    A value that there is no room for beside its name stands below it.
    """
    width = max((cells(name) for name, _ in rows), default=0)
    lines: list[str] = []
    for name, value in rows:
        line = f"{name:<{width}}  {value}"
        if cells(line) < columns:
            lines.append(line)
        else:
            room = max(columns - 1, 1)
            lines += textwrap.wrap(name, room)
            lines += textwrap.wrap(value, room, initial_indent="  ", subsequent_indent="  ")
    return lines


def _answer_rows(last: Stats) -> list[tuple[str, str]]:
    prompt = counted(last.prompt_tokens, "position")
    rows = [
        ("last prompt", f"{prompt}, {last.reused_tokens} of them computed before"),
        # A picture added in time was encoded while its question was typed: it is not counted.
        ("pictures encoded since Enter", str(last.encoded_images)),
    ]
    if last.ttft_ms is not None:
        rows.insert(0, ("time to first token", _readable_ms(last.ttft_ms)))
    answer = counted(last.generated_tokens, "token")
    if last.decode_tps is not None:
        answer += f" at {_readable_tps(last.decode_tps)}"
    return [*rows, ("last answer", answer)]


def _readable_ms(milliseconds: float) -> str:
    """Return "41 ms" below ten seconds, "12.3 s" from there."""
    return f"{milliseconds:.0f} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"


def _readable_tps(tokens: float) -> str:
    return f"{tokens:.0f} tok/s" if tokens >= 10 else f"{tokens:.1f} tok/s"


def counted(number: int, noun: str) -> str:
    """Return "1 turn", "2 turns"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def cells(text: str) -> int:
    """Return how many cells of a terminal text takes."""
    return sum(_width(char) for char in text)


def _width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cut(text: str, columns: int) -> str:
    """Return text, its end replaced by an ellipsis if it is wider than `columns` cells."""
    if cells(text) <= columns:
        return text
    if columns < 1:
        return ""
    kept, used = "", 0
    for char in text:
        used += _width(char)
        if used > columns - 1:
            break
        kept += char
    return kept + "…"
