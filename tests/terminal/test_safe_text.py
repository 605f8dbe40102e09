from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_mlx.terminal.safe_text import SafeText, safe

CONTROLS = [chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"]
BIDI = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]


@pytest.mark.parametrize("control", [*CONTROLS, *BIDI], ids=ascii)
def test_a_control_character_is_shown_as_unknown(control: str) -> None:
    assert safe(f"a{control}b") == "a�b"
    assert safe(f"ä{control}b") == "ä�b"


def test_what_is_no_control_stays_as_it_is() -> None:
    text = "lines\n\ttabs ÄÖ 漢字 👩‍👩‍👧‍👦 e\u0301 \u200f\u200e\ufeff \u00a0 עברית"
    assert safe(text) == text
    assert SafeText().feed(text) == text


def test_an_escape_sequence_loses_what_makes_it_one() -> None:
    assert safe("\x1b[2J\x9b1A\x1b]0;title\x07") == "�[2J�1A�]0;title�"


def test_a_surrogate_alone_is_unknown_and_a_pair_is_its_character() -> None:
    """A lone surrogate cannot be encoded: writing it raises UnicodeEncodeError in mid-answer."""
    assert safe("a\ud83db\ude00") == "a�b�"
    assert safe("\ud83d\ude00") == "😀"


def test_a_pair_cut_in_two_pieces_is_one_character() -> None:
    text = SafeText()
    assert [text.feed("a\ud83d"), text.feed("\ude00b"), text.finish()] == ["a", "😀b", ""]


def test_half_a_pair_at_the_end_is_said_at_the_end() -> None:
    text = SafeText()
    assert [text.feed("a\ud83d"), text.finish(), text.finish()] == ["a", "�", ""]


@given(st.lists(st.text(st.characters(codec=None, categories=None)), max_size=8))
def test_in_pieces_it_is_what_it_is_as_a_whole_and_can_be_written(pieces: list[str]) -> None:
    text = SafeText()
    shown = "".join(map(text.feed, pieces)) + text.finish()
    assert shown == safe("".join(pieces))
    shown.encode()
    assert not [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\n\t"]
