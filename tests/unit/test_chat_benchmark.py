"""The second turn computes new positions only; the benchmark counts it, here on the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastvlm_mlx as fv
from benchmarks import chat

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "red_circle.png"


@pytest.fixture(scope="module")
def turns() -> dict[str, chat.Turn]:
    return chat.ours(fv.load("demo"), PICTURE)


def test_a_second_turn_prefills_new_positions_only(turns: dict[str, chat.Turn]) -> None:
    """Counted in the decoder and the tower; mlx-vlm's chat runs both over all of it again."""
    second, cold = turns["turn 2"], turns["turn 2 cold"]
    assert second.tower_runs == 0
    assert cold.prefilled == second.prompt == second.prefilled + second.reused
    assert second.prefilled < 16 < cold.prefilled
    assert second.ids == cold.ids


def test_a_picture_of_another_conversation_is_not_encoded_again(
    turns: dict[str, chat.Turn],
) -> None:
    again = turns["turn 1, picture of an earlier conversation"]
    assert again.tower_runs == 0
    assert again.prefilled == turns["turn 1"].prefilled
    assert again.ids == turns["turn 1"].ids


def test_the_benchmark_does_not_pass_a_chat_that_computes_more(
    turns: dict[str, chat.Turn],
) -> None:
    chat.check(turns)
    forgetful = turns | {"turn 2": turns["turn 2 cold"]}
    with pytest.raises(AssertionError):
        chat.check(forgetful)


def test_the_table_has_every_turn(turns: dict[str, chat.Turn]) -> None:
    table = chat.table(chat.summary([turns, turns]))
    assert all(f"| {name} | {turn.prefilled} |" in table for name, turn in turns.items())
    assert "| turn 2 cold | " in table and "| 1.000 |" in table
