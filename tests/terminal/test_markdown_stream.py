from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.terminal.markdown_stream import MarkdownStream
from tests.terminal.pyte_terminal import SGR, Terminal

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

PROSE = """# A heading of an answer

The first paragraph is long enough to be wrapped a few times on a screen of forty columns, and more.
It goes on in a second line.

The second has **bold words over
two lines**, *emphasis*, `code with * and [`, a lone * star, an_intra_word and ~~struck~~ text,
a [link](https://example.org/path?a=1) and <https://example.org/auto>, 2 < 3 | 4 and ![alt](p.png).

---
## Another [name]

> A quotation that is long enough to be wrapped at least once or twice,
> and then *ends*.

[name]: https://example.org "defined long after its use"

<div>HTML is <b>text</b></div>
"""
LISTS = """Before:
- one
- two is an item that does not fit on one line of a narrow screen at all
  1. nested first
  2. nested **second**

     with a paragraph of its own

     ```sh
     make check

     make test
     ```
- three

8. eight
9. nine
10. ten has a wider number, and is long enough to be wrapped
11. eleven
* another list
- and another
"""
CODE = """Code:

```python
def area(width: int) -> int:
    \"\"\"Return an area.

    With a blank line in it.\"\"\"

    numbers = {number: number ** 2 for number in range(width) if number % 2 == 0}
\tif numbers: return max(numbers)


    return 0
```
After it.

    indented code

    more of it

```
never closed | with a pipe

- and no list
"""
TABLE = """| Name | Width | Note |
|:-----|------:|:----:|
| one | 1 | a cell that is longer than most |
| two | 22 | `code | x` |
| 漢字 | 333 | *emphasis* |
| four | 4 | |
| five | 5 | the last one |

Text | with a pipe
and no table below it.
a | b
-|-
c | d
"""
WIDE = """漢字仮名交じり文は空白なしで続くので、どこでも折り返すことができます。そして**太字**も。

Emoji: 😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ☺️ 1️⃣ and e\u0301 o\u0308 n\u0303 with accents: cafe\u0301 नमस्ते กำลัง.
- 한국어 목록 항목은 좁은 화면에서 줄바꿈됩니다
- 👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀👩‍🚀

Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft ends.
"""
DOCUMENTS = {"prose": PROSE, "lists": LISTS, "code": CODE, "table": TABLE, "wide": WIDE}


def play(
    chunks: Iterable[str], columns: int, rows: int, *, color: bool = True
) -> tuple[Terminal, MarkdownStream]:
    terminal = Terminal(columns, rows)
    with stream_to(terminal, color=color) as stream:
        for chunk in chunks:
            stream.feed(chunk)
    return terminal, stream


def stream_to(terminal: Terminal, *, color: bool = True) -> MarkdownStream:
    return MarkdownStream(
        terminal, columns=lambda: terminal.columns, rows=lambda: terminal.rows, color=color
    )


def pieces(text: str, seed: int, sizes: tuple[int, ...] = (1, 2, 3, 4, 7, 20)) -> list[str]:
    generator, found, start = random.Random(seed), [], 0
    while start < len(text):
        end = start + generator.choice(sizes)
        found.append(text[start:end])
        start = end
    return found


def colours(terminal: Terminal) -> list[list[object]]:
    rows = [
        [(cell.data, cell.fg, cell.bold, cell.italics, cell.underscore) for cell in row]
        for row in terminal.cells()
    ]
    return rows[: len(terminal.lines())]


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("columns", "rows"), [(80, 60), (40, 6), (20, 6), (40, 2)])
def test_however_it_is_cut_the_end_looks_like_the_whole_drawn_at_once(
    name: str, columns: int, rows: int
) -> None:
    text = DOCUMENTS[name]
    whole, _ = play([text], columns, 500)
    for seed in range(2):
        terminal, _ = play(pieces(text, seed), columns, rows)
        assert terminal.lines() == whole.lines()
        assert colours(terminal) == colours(whole)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    text=st.lists(
        st.sampled_from(
            [
                *(
                    "word ",
                    "漢字",
                    "👩‍🚀",
                    "e\u0301",
                    "\t",
                    "  ",
                    "\n",
                    "\n\n",
                    "- ",
                    "1. ",
                    "# ",
                    "> ",
                ),
                *("**", "*", "_", "~~", "`", "```\n", "---\n", "[a](b) ", "|", "|-|-|\n", "<b>"),
                *("\\", "&amp;"),
            ]
        ),
        max_size=60,
    ).map("".join),
    seed=st.integers(0, 1000),
    columns=st.sampled_from([12, 20, 40]),
    rows=st.sampled_from([2, 6, 24]),
)
def test_any_text_in_any_pieces_ends_like_the_whole(
    text: str, seed: int, columns: int, rows: int
) -> None:
    whole, _ = play([text], columns, 500)
    assert play(pieces(text, seed), columns, rows)[0].lines() == whole.lines()


def test_nothing_finished_is_ever_away_or_blank() -> None:
    """Whoever clears a line and then writes it flickers where 2026 is not known: so the screen is
    looked at after every single character sent to it."""
    terminal = Terminal(40, 60)
    stream = stream_to(terminal)
    for chunk in pieces(LISTS[:300] + "\n" + CODE[:200], 1):
        before, written = terminal.lines(), len(terminal.writes)
        stream.feed(chunk)
        if len(terminal.writes) == written:
            continue
        assert len(terminal.writes) == written + 1
        update, after = terminal.writes[-1], terminal.lines()
        assert update.startswith("\x1b[?2026h") and update.endswith("\x1b[?2026l")
        assert after[: len(before) - 1] == before[:-1]
        slow = Terminal(40, 60)
        slow.write("".join(terminal.writes[:-1]))
        for char in update:
            slow.stream.feed(char)
            now = slow.lines()
            assert now[: len(before) - 1] == before[:-1]
            assert (
                now[len(before) - 1 :][:1] != [""] or not before[-1:] or not after[len(before) - 1]
            )


def test_the_cursor_never_goes_above_the_unfinished_block() -> None:
    text = "A **paragraph of two lines, the first of which is drawn again,** once.\n\n" * 20
    terminal, _ = play(pieces(text, 2), 40, 24, color=False)
    assert {int(rows) for rows in re.findall(r"\x1b\[(\d+)A", terminal.written)} == {1}


def test_a_line_that_only_grew_gets_only_its_new_part() -> None:
    terminal = Terminal(80, 24)
    stream = stream_to(terminal)
    stream.feed("A quick brown ")
    stream.feed("fox")
    assert terminal.writes[-1] == "\x1b[?2026h fox\x1b[?2026l"
    stream.feed("e\u0301")
    stream.feed("\u0302")
    assert terminal.writes[-1].startswith("\x1b[?2026h\rA quick")


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("rows", [6, 24])
def test_few_more_bytes_are_written_than_for_the_whole(name: str, rows: int) -> None:
    text = DOCUMENTS[name]
    whole, _ = play([text], 40, rows)
    streamed, _ = play(pieces(text, 3, sizes=(4,)), 40, rows)
    marks = len("\x1b[?2026h\x1b[?2026l") * len(streamed.writes)
    assert len(streamed.written) - marks <= 3 * len(whole.written)


@pytest.mark.parametrize(
    "text",
    [
        "word and *some* more text to read, " * 180,
        "```python\n" + "value = function(argument) + 1\n" * 200,
        "- an item of a long list\n" * 240,
        "| a | b |\n|---|---|\n" + "| cell | another |\n" * 300,
    ],
    ids=["paragraph", "fence", "list", "table"],
)
@pytest.mark.parametrize("rows", [6, 50])
@pytest.mark.slow
def test_the_work_grows_no_faster_than_the_text(text: str, rows: int) -> None:
    """An answer drawn anew from its beginning at each token takes minutes when it is long."""
    terminal, stream = play([text[i : i + 4] for i in range(0, len(text), 4)], 60, rows)
    assert stream.rendered_characters <= 300 * len(text)
    assert terminal.lines() == play([text], 60, 800)[0].lines()


def test_blocks_already_settled_are_not_rendered_again() -> None:
    text = "A paragraph of a few words.\n\n" * 100
    _, stream = play(pieces(text, 4, sizes=(4,)), 60, 24)
    assert stream.rendered_characters <= 30 * len(text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_color_writes_no_colour(name: str) -> None:
    terminal, _ = play(pieces(DOCUMENTS[name], 5), 40, 24, color=False)
    assert not SGR.search(terminal.written)
    assert terminal.lines() == play([DOCUMENTS[name]], 40, 24)[0].lines()


def test_markdown_is_drawn_not_shown_as_typed() -> None:
    lines = play(["\n".join((PROSE, TABLE, LISTS, CODE))], 80, 300)[0].lines()
    assert lines[0] == "A heading of an answer"
    assert (
        "• one" in lines and "10. ten has a wider number, and is long enough to be wrapped" in lines
    )
    assert "  1. nested first" in lines
    assert "  def area(width: int) -> int:" in lines
    assert not any("```" in line or "|--" in line for line in lines)
    assert any("link (https://example.org/path?a=1)" in line for line in lines)
    assert any("alt (p.png)" in line for line in lines)
    assert "<div>HTML is <b>text</b></div>" in lines


def test_bold_italic_and_code_have_their_colours() -> None:
    terminal, _ = play(["**bold** *slanted* `code`\n\n```python\nreturn 1\n```"], 80, 24)
    (bold, slanted, code, keyword) = (
        next(
            row[line.index(word)]
            for row, line in zip(terminal.cells(), lines_of(terminal), strict=True)
            if word in line
        )
        for word in ("bold", "slanted", "code", "return")
    )
    assert bold.bold and slanted.italics and code.fg == "cyan" and keyword.fg != "default"


def lines_of(terminal: Terminal) -> list[str]:
    return ["".join(cell.data for cell in row) for row in terminal.cells()]


@pytest.mark.parametrize("columns", [12, 13, 20, 21, 40])
def test_no_grapheme_is_cut_and_the_last_column_stays_free(columns: int) -> None:
    """A family of four is seven characters; cut between two of them it is two families."""
    clusters = ["👩‍👩‍👧‍👦", "👍🏽", "e\u0301", "☺️", "👩‍🚀"]
    terminal, _ = play(pieces(WIDE, 6), columns, 200, color=False)
    parts = re.split(r"\r\n|\r|\x1b\[[^a-zA-Z]*[a-zA-Z]", terminal.written)
    assert not any(part[:1] in ("\u200d", "\ufe0f", "\u0301", "🏽") for part in parts)
    final = play([WIDE], columns, 200, color=False)[0].written
    for cluster in clusters:
        assert final.count(cluster) == WIDE.count(cluster)
    for row in terminal.cells():
        assert row[columns - 1].data == " "


@pytest.mark.parametrize("columns", [12, 20])
def test_a_table_that_is_too_wide_loses_no_letters(columns: int) -> None:
    """rich ends a cell that is too narrow with an ellipsis: the rest could not be read."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    table = f"| x | y | z |\n|---|---|---|\n| {letters} | 漢字漢字漢字 | {letters.upper()} |\n"
    text = "".join(play([table], columns, 100)[0].lines())
    assert set(letters + letters.upper() + "漢字") <= set(text) and "…" not in text


def test_controls_in_an_answer_never_reach_the_terminal() -> None:
    """Markdown spells characters too: markdown-it makes &#13; and &#x202E; what they say."""
    hostile = (
        "a\x1b[2Jb \x9b31m \u202eabc &#27;[2J &#13; &#x202e; &#8238; &#x9b;\n\n    \x1b]0;t\x07\n"
    )
    terminal, _ = play(pieces(hostile, 7, sizes=(1,)), 80, 24, color=False)
    rest = re.sub(r"\x1b\[(\?2026[hl]|\d*[ABKJ])|\r\n|\r", "", terminal.written)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", rest)
    assert "8;;" not in terminal.written


def test_a_link_is_text_and_never_an_osc_8() -> None:
    terminal, _ = play(["[here](https://example.org)"], 80, 24)
    assert "\x1b]" not in terminal.written
    assert terminal.lines() == ["here (https://example.org)"]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def in_order(wanted: list[str], found: list[str]) -> bool:
    rest = iter(found)
    return all(word in rest for word in wanted)


TALL = "A paragraph " + " ".join(f"word{number}" for number in range(200)) + "."
NUMBERED = "\n".join(f"- item{number} of a list with a few more words" for number in range(30))


@pytest.mark.parametrize(
    "text",
    [
        f"**{TALL}** and more",
        f"{TALL}\n===\n",
        f"{TALL}\n| cell\n|---\n| x\n",
        f"- [{TALL}](address)",
        f"> `{TALL}`\n",
    ],
)
def test_what_may_yet_change_does_not_scroll_away(text: str) -> None:
    """A star far above the screen that turns out to begin bold text can no longer be taken back."""
    whole, _ = play([text], 30, 500)
    terminal, _ = play(pieces(text, 15), 30, 6)
    assert terminal.lines() == whole.lines() and colours(terminal) == colours(whole)


def test_a_line_that_looks_like_a_fence_until_its_end_is_none() -> None:
    text = "Some text\n```a b` and more\n\nEnd"
    assert play(text, 40, 24)[0].lines() == ["Some text ```a b` and more", "", "End"]


def test_a_line_that_is_no_more_is_erased() -> None:
    assert play("**aaaa bbbb cccc ddd**", 20, 24)[0].lines() == ["aaaa bbbb cccc ddd"]


def test_after_a_resize_the_unfinished_block_is_drawn_in_its_old_place() -> None:
    text = TALL[:200]
    terminal = Terminal(30, 24)
    with stream_to(terminal) as stream:
        stream.feed(f"Before.\n\n{text}")
        terminal.screen.resize(columns=60)
        stream.feed(" end.")
    assert terminal.lines() == play([f"Before.\n\n{text} end."], 60, 24)[0].lines()


@pytest.mark.parametrize("text", [f"{TALL}\n\n{NUMBERED}\n", f"{NUMBERED}\n\n{TALL}"])
@pytest.mark.parametrize("rows", [6, 24])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_wider_screen_in_the_middle_loses_nothing(text: str, rows: int, share: float) -> None:
    terminal = Terminal(30, rows)
    with stream_to(terminal) as stream:
        for chunk in pieces(text[: int(len(text) * share)], 8):
            stream.feed(chunk)
        terminal.screen.resize(columns=60)
        for chunk in pieces(text[int(len(text) * share) :], 9):
            stream.feed(chunk)
    assert in_order(words(text), words("\n".join(terminal.lines())))


@pytest.mark.parametrize("rows", [6, 24])
def test_a_narrower_screen_in_the_middle_loses_nothing_that_comes_after(rows: int) -> None:
    """pyte cuts the lines there are at the new width, so only later ones can be compared."""
    terminal = Terminal(60, rows)
    text = f"Before.\n\n{TALL}\n\n{NUMBERED}\n"
    with stream_to(terminal) as stream:
        for chunk in pieces(text[:200], 10):
            stream.feed(chunk)
        terminal.screen.resize(columns=24)
        for chunk in pieces(text[200:], 11):
            stream.feed(chunk)
    assert in_order(words(text[220:]), words("\n".join(terminal.lines())))
    assert max(map(len, terminal.lines())) <= 24


def test_waiting_is_one_line_that_the_answer_replaces() -> None:
    terminal = Terminal(40, 24)
    stream = stream_to(terminal)
    stream.wait("reading the picture, which may take more than a line has room for")
    assert len(terminal.lines()) == 1 and "\x1b[2m" in terminal.written
    stream.wait("thinking")
    assert terminal.lines() == ["thinking"]
    stream.feed("Hi")
    assert terminal.lines() == ["Hi"]
    stream.wait("too late")
    assert terminal.lines() == ["Hi"]


def test_an_answer_without_text_leaves_nothing() -> None:
    terminal = Terminal(40, 24)
    stream = stream_to(terminal)
    stream.wait("thinking")
    stream.feed("\n")
    stream.finish()
    assert terminal.lines() == [] and (terminal.screen.cursor.y, terminal.screen.cursor.x) == (0, 0)


@pytest.mark.parametrize("text", ["one", "one\n\n", "- one\n", "```\none\n", "# one\n\n\n"])
def test_an_answer_ends_with_one_newline(text: str) -> None:
    terminal, stream = play(pieces(text, 12), 40, 24)
    stream.finish()
    assert (terminal.screen.cursor.y, terminal.screen.cursor.x) == (1, 0)
    assert terminal.written.endswith("\r\n") and not terminal.written.endswith("\n\r\n")


def test_an_answer_cut_off_in_the_middle_stays_as_far_as_it_came() -> None:
    terminal, _ = play(pieces("A list:\n- one\n- **tw", 13), 40, 24)
    assert terminal.lines() == ["A list:", "", "• one", "• **tw"]


def test_an_error_while_answering_leaves_what_was_shown() -> None:
    terminal = Terminal(40, 24)
    with pytest.raises(KeyboardInterrupt), stream_to(terminal) as stream:
        stream.feed("So far")
        raise KeyboardInterrupt
    assert terminal.lines() == ["So far"] and terminal.screen.cursor.y == 1


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_hardly_any_columns_are_no_error(columns: int) -> None:
    play(pieces("".join(DOCUMENTS.values()), 14, sizes=(20,)), columns, 3)


@pytest.mark.parametrize("text", ["000 001 002", "3.14", "12:30", "2,500", "0123456789"])
def test_numbers_are_shown_before_their_line_ends(text: str) -> None:
    """Once each line without a letter was held back as what might become a list or a rule."""
    terminal = Terminal(40, 24)
    with stream_to(terminal) as stream:
        stream.feed(text)
        assert terminal.lines() == [text]


@pytest.mark.parametrize("text", ["42.", "7)\n"])
def test_a_number_alone_is_text(text: str) -> None:
    """Markdown has a list without items in it: "42." once had a list's colour."""
    terminal = Terminal(40, 24)
    with stream_to(terminal, color=True) as stream:
        stream.feed(text)
    assert terminal.lines() == [text.strip()]
    assert not SGR.search(terminal.written)


def test_lines_that_a_narrower_screen_wraps_anew_are_left_and_nothing_is_lost() -> None:
    """Once the lines above the cursor were reckoned as they had been: text was written over."""
    words = [f"w{number:03d}" for number in range(60)]
    terminal = Terminal(60, 24)
    with stream_to(terminal) as stream:
        stream.feed(" ".join(words[:40]))
        upper = terminal.lines()[:3]
        terminal.screen.resize(columns=30)
        terminal.writes.clear()
        stream.feed(" " + " ".join(words[40:]))
        assert not re.search(r"\x1b\[\d*A", terminal.writes[0])
    assert [line[:30].rstrip() for line in upper] == terminal.lines()[:3]
    written = re.findall(r"w\d{3}", terminal.written)
    assert written[-20:] == words[40:] and len(written) <= 20 + 2 * 12
