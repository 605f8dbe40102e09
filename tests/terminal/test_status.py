from __future__ import annotations

import dataclasses

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_mlx.events import Stats
from fastvlm_mlx.terminal.status import (
    SessionFacts,
    StatusFacts,
    stats_lines,
    stats_rows,
    status_line,
)

FACTS = StatusFacts(
    model="demo",
    precision="float32",
    positions=312,
    max_positions=1024,
    ttft_ms=41.3,
    decode_tps=620.4,
    memory_bytes=96_000_000,
    reused=280,
)
WHOLE = "demo · float32 · 312 of 1024 positions · TTFT 41 ms · 620 tok/s · 96 MB · 280 reused"
SESSION = SessionFacts(
    turns=3,
    images=2,
    positions=312,
    max_positions=1024,
    kv_bytes=1_500_000,
    features_bytes=600_000,
    max_features_bytes=268_000_000,
    active_bytes=96_000_000,
    peak_bytes=120_000_000,
    load_ms=310.2,
    warm_up_ms=12_340.0,
)


def answer(**values: object) -> Stats:
    given: dict[str, object] = {
        field.name: 0 if field.type == "int" else None for field in dataclasses.fields(Stats)
    }
    given |= {"ttft_ms": 41.3, "decode_tps": 620.4, "prompt_tokens": 312, "reused_tokens": 280}
    return Stats(**(given | {"generated_tokens": 1} | values))  # type: ignore[arg-type]


def test_the_whole_line_in_order_of_worth() -> None:
    assert status_line(FACTS, 200) == WHOLE


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (len(WHOLE), WHOLE),
        (len(WHOLE) - 1, WHOLE.removesuffix(" · 280 reused")),
        (40, "demo · float32 · 312 of 1024 positions"),
        (20, "demo · float32"),
        (4, "demo"),
        (3, "de…"),
        (0, ""),
    ],
)
def test_what_does_not_fit_is_left_out_from_the_end(columns: int, line: str) -> None:
    assert status_line(FACTS, columns) == line


def test_a_field_is_left_out_with_all_that_are_worth_less() -> None:
    """The next one might have fitted, but then the line's parts would jump about."""
    narrow = dataclasses.replace(FACTS, positions=100_000, max_positions=1_000_000)
    assert status_line(narrow, 40) == "demo · float32"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"loading": "45%"}, "loading demo 45%"),
        ({"loading": ""}, "loading demo"),
        ({"loading": "45%", "pending_images": 2}, "loading demo 45% · 2 pictures to send"),
    ],
)
def test_while_loading_it_says_how_far(changes: dict[str, object], line: str) -> None:
    assert status_line(dataclasses.replace(FACTS, **changes), 80) == line  # type: ignore[arg-type]


def test_pictures_to_send_come_before_what_has_been() -> None:
    line = status_line(dataclasses.replace(FACTS, pending_images=1), 40)
    assert line == "demo · 1 picture to send · float32"


def test_before_the_first_answer_there_is_nothing_about_one() -> None:
    assert status_line(StatusFacts(model="demo", precision="4 bit"), 80) == "demo · 4 bit"


@pytest.mark.parametrize(("tps", "said"), [(3.14, "3.1 tok/s"), (10, "10 tok/s"), (620.4, "620")])
def test_a_slow_model_has_a_decimal(tps: float, said: str) -> None:
    assert said in status_line(dataclasses.replace(FACTS, decode_tps=tps), 200)


@given(
    model=st.text("ab漢字한😀e\u0301 \x1b\n", min_size=1, max_size=60),
    columns=st.integers(0, 120),
)
def test_it_is_never_wider_than_the_screen(model: str, columns: int) -> None:
    line = status_line(dataclasses.replace(FACTS, model=model), columns)
    assert 0 <= wcwidth.wcswidth(line) <= columns


def test_stats_are_of_the_answer_the_session_and_the_process() -> None:
    assert stats_rows(SESSION, answer(encoded_images=1)) == [
        ("time to first token", "41 ms"),
        ("last prompt", "312 positions, 280 of them computed before"),
        ("pictures encoded since Enter", "1"),
        ("last answer", "1 token at 620 tok/s"),
        ("turns", "3"),
        ("pictures", "2"),
        ("positions used", "312 of 1024"),
        ("KV cache", "1.5 MB"),
        ("pictures kept for reuse", "600 kB of 268 MB"),
        ("memory in use", "96 MB"),
        ("memory at most", "120 MB"),
        ("loading", "310 ms"),
        ("warming up", "12.3 s"),
    ]


def test_before_an_answer_and_without_times_their_rows_are_not_there() -> None:
    rows = stats_rows(dataclasses.replace(SESSION, load_ms=None, warm_up_ms=None))
    assert rows[0] == ("turns", "3") and rows[-1] == ("memory at most", "120 MB")


def test_an_answer_cancelled_before_its_first_token_has_no_times() -> None:
    """ttft_ms is None then, and a format of None raises TypeError."""
    rows = stats_rows(SESSION, answer(ttft_ms=None, decode_tps=None, generated_tokens=0))
    assert ("last answer", "0 tokens") in rows and "time to first token" not in dict(rows)


def test_stats_are_two_columns_where_there_is_room() -> None:
    lines = stats_lines(stats_rows(SESSION, answer()), 80)
    assert {line[28:30] for line in lines} == {"  "}
    assert f"{'KV cache':<28}  1.5 MB" in lines


@pytest.mark.parametrize("columns", range(20, 101))
def test_stats_stay_off_the_windows_edge_and_keep_every_word(columns: int) -> None:
    """A value was cut at 40 columns, and a line as wide as the window was wrapped once more."""
    rows = stats_rows(SESSION, answer())
    lines = stats_lines(rows, columns)
    assert max(map(len, lines)) < columns
    assert " ".join(lines).split() == " ".join(f"{name} {value}" for name, value in rows).split()
