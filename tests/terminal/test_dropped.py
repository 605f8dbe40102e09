"""What a terminal writes when files are dropped on it, and what is only a question."""

from __future__ import annotations

import shlex
import unicodedata
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastvlm_mlx.terminal import dropped
from fastvlm_mlx.terminal.dropped import (
    PICTURE_SUFFIXES,
    Dropped,
    split_dropped,
    starts_with_path,
    typed_path,
    typed_sources,
)


def sources(text: str) -> list[str]:
    dropped = split_dropped(text)
    assert dropped.text == "", text
    return list(dropped.sources)


def escaped(name: str) -> str:
    """Write a name as Terminal.app does: a backslash before what a shell would take for itself."""
    return "".join(c if c.isalnum() or c in "/._-" or ord(c) > 127 else f"\\{c}" for c in name)


def single_quoted(name: str) -> str:
    r"""Write a name as GNOME's terminal, Konsole and foot do: quoted, `'\''` for an apostrophe."""
    return "'" + name.replace("'", r"'\''") + "'"


def double_quoted(name: str) -> str:
    return '"' + "".join(f"\\{c}" if c in '$`"\\' else c for c in name) + '"'


def file_uri(name: str) -> str:
    return "file://" + urllib.parse.quote(name)


PRINTABLE = st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Cn"))
NAMES = st.builds("/no such/{}.png".format, st.text(PRINTABLE, max_size=12))
WAYS = (shlex.quote, escaped, single_quoted, double_quoted, file_uri)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(WAYS)), min_size=1, max_size=5), st.data())
@example([('/no such/it\'s "so".png', way) for way in WAYS], None)
@example([("/no such/Screenshot 3.04.05\u202fPM.png", way) for way in WAYS], None)
@example([("/no such/a?.png", way) for way in WAYS], None)
def test_names_written_any_way_come_back(
    written: list[tuple[str, object]], data: st.DataObject | None
) -> None:
    gaps = st.sampled_from([" ", "\n", "\r\n", "  "])
    text = ""
    for name, way in written:
        text += way(name) + (data.draw(gaps) if data else " ")
    assert sources(text) == [name for name, _ in written]


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=60))
@example("either/or, and/or. On 12/05/2024 1/2 of them/all?")
@example("What's in Ann's picture?")
@example("""a lone ' and " and \\ here""")
@example("say 'hello' to \"him\", don't you?\n\n  indented\ttext \n")
@example("'unclosed and 'another")
@example("trailing backslash \\")
def test_prose_is_returned_byte_for_byte(text: str) -> None:
    assume(not any(suffix in text.lower() for suffix in PICTURE_SUFFIXES))
    assert split_dropped(text) == Dropped((), text)


@pytest.mark.parametrize(
    "prose",
    [
        "What's in /etc and '/tmp'?",
        "and/or 1/2 km/h",
        "/",
        "~ about 5",
        "'/not a picture'",
        "is stop.png a good name? or 'my cat.png'?",
        "see https://example.com/page for more",
        "http://[bad/cat.png",
        "file://server/share/cat.png",
        "ends in .png",
        ".png",
        ".jpg/.png, which?",
        "is it dog.png?",
        "dog.png?",
        "dog.png cat.png which?",
        "(a/b.png)",
        "![cat](pics/cat.png)",
        "s3://bucket/cat.png",
        "ftp://example.com/cat.png, please",
        '"What is in pics/cat.png"',
        "'/no/such.png",
        'an open "/no/such.png',
        "\"What is this?\" she said, 'a cat'",
    ],
)
def test_words_that_only_look_a_little_like_paths_stay(prose: str) -> None:
    assert split_dropped(prose) == Dropped((), prose)


@pytest.mark.parametrize(
    "line",
    [
        r"/Users/ann/My\ Photos/caf\é\ \(1\)\ \&\ \$2.png",
        "'/Users/ann/My Photos/café (1) & $2.png'",
        '"/Users/ann/My Photos/café (1) & \\$2.png"',
        "file:///Users/ann/My%20Photos/caf%C3%A9%20(1)%20&%20$2.png",
        "FILE://localhost/Users/ann/My%20Photos/caf%c3%a9%20%281%29%20&%20%242.png",
        "file:/Users/ann/My%20Photos/caf%C3%A9%20(1)%20&%20$2.png",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_one_photo_as_each_terminal_writes_it(line: str, form: str) -> None:
    name = "/Users/ann/My Photos/café (1) & $2.png"
    if "%" not in line:
        line, name = unicodedata.normalize(form, line), unicodedata.normalize(form, name)
    assert sources(line) == sources(line + " ") == sources(f"\n{line}\n") == [name]


def test_a_spaces_only_escape_keeps_an_apostrophe() -> None:
    """WezTerm escapes spaces alone: read as a shell would, the apostrophe swallowed the rest."""
    assert sources(r"/home/ann/it's\ me.png /home/ann/that's\ you.png") == [
        "/home/ann/it's me.png",
        "/home/ann/that's you.png",
    ]


def test_the_question_is_what_is_left() -> None:
    photo = "'/home/a b/it'\\''s.png'"
    name = "/home/a b/it's.png"
    for text, question in (
        (f"{photo} What is this?", "What is this?"),
        (f"What is this? {photo} ", "What is this?"),
        (f"Compare {photo} with\t/x/b.PNG now", "Compare with\tnow"),
        (f"{photo}\nWhat's\n  this?\n", "What's\n  this?\n"),
        (f"one\n{photo}\ntwo", "one\ntwo"),
        (f"  Ann's {photo}", "  Ann's"),
    ):
        dropped = split_dropped(text)
        assert dropped.sources[0] == name
        assert dropped.text == question


def test_a_path_that_exists_needs_no_ending_if_it_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("download", "README", "cat.png", "a b.JPG"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert sources(f"{tmp_path}/download") == [f"{tmp_path}/download"]
    assert sources("~/download ./README cat.png 'a b.JPG'") == [
        "~/download",
        "./README",
        "cat.png",
        "a b.JPG",
    ]
    for prose in ("What does README say", "is dog.png there", "in folder.png", f"in {tmp_path}"):
        assert split_dropped(prose) == Dropped((), prose)


def test_an_existing_file_may_have_bare_spaces_and_the_sentence_its_question_mark(
    tmp_path: Path,
) -> None:
    """Alacritty writes a dropped path as it is; cut at the space, it was asked as a question."""
    photo = tmp_path / "my big cat.png"
    photo.touch()
    assert sources(f"{photo} ") == [str(photo)]
    both = split_dropped(f"{photo} {photo} Which is older?")
    assert both == Dropped((str(photo), str(photo)), "Which is older?")
    plain = tmp_path / "cat.png"
    plain.touch()
    assert split_dropped(f"What is in {plain}?") == Dropped((str(plain),), "What is in?")
    assert split_dropped(f"What is in '{photo}', and") == Dropped((str(photo),), "What is in, and")


def test_a_name_with_a_backslash_is_found_as_it_is_written(tmp_path: Path) -> None:
    odd = tmp_path / "a\\b.png"
    odd.touch()
    assert sources(str(odd)) == [str(odd)]
    assert sources(escaped(str(odd))) == [str(odd)]


def test_a_missing_file_that_looks_dropped_is_a_source() -> None:
    for line in ("/no/such.png", "~/no-such.jpeg", "./no.webp", "../no.heic", "'/no such.png'"):
        assert sources(line) == [line.strip("'")]


def test_a_mistyped_path_is_a_source_wherever_it_stands() -> None:
    """`pics/nope.png` was sent to the model, which answered as if it had seen a picture."""
    for path in ("pics/nope.png", "pics/*.png", "a/b/c.JPG", "$HOME/cat.png"):
        assert sources(path) == [path]
        for line in (f"{path} What is it?", f"What is in {path}?", f"See {path}, and {path}."):
            assert set(split_dropped(line).sources) == {path}
    assert sources("'pics/my cat.png' my\\ pics/cat.png") == ["pics/my cat.png", "my pics/cat.png"]
    assert split_dropped("pics/a.png, nope.png?") == Dropped(("pics/a.png",), ", nope.png?")


def test_names_alone_are_sources_be_they_there_or_not() -> None:
    """A line that was only `nope.png` was asked as a question."""
    assert sources("nope.png") == sources("nope.png\n") == ["nope.png"]
    assert sources("a.png, B.JPEG\n'my c.png' *.webp /x/d.png, https://example.com/5") == [
        "a.png",
        "B.JPEG",
        "my c.png",
        "*.webp",
        "/x/d.png",
        "https://example.com/5",
    ]


def test_urls() -> None:
    photo = "https://example.com/a/cat.jpg?w=100&h=2"
    assert sources(photo) == [photo]
    asked = split_dropped(f"What is {photo}, please?")
    assert asked == Dropped((photo,), "What is, please?")
    assert split_dropped("is it https://example.com/cat.jpg?").text == "is it?"
    assert sources("https://example.com/cat.jpg\\?w\\=1") == ["https://example.com/cat.jpg?w=1"]
    page = "https://example.com/photo?id=3"
    assert sources(f"{page}\n/x/cat.png {page}") == [page, "/x/cat.png", page]
    assert split_dropped(f"see {page}") == Dropped((), f"see {page}")


def test_a_data_uri_of_a_picture_is_no_question() -> None:
    uri = "data:image/png;base64,iVBORw0KGgo="
    assert split_dropped(f"{uri} What?") == Dropped((uri,), "What?")


def test_a_line_starts_with_a_path_only_if_its_first_word_is_one(tmp_path: Path) -> None:
    (tmp_path / "download").touch()
    assert starts_with_path("/no/such.png what is it?")
    assert starts_with_path(f"{tmp_path}/download what is it?")
    for line in ("", " /no/such.png", "/help /no/such.png", "/image", "What /no/such.png"):
        assert not starts_with_path(line)


def test_a_commands_path_may_be_written_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "/no such/Ann's chat.session"
    for written in (name, *(way(name) for way in WAYS)):
        assert typed_path(f" {written} ") == Path(name), written
    assert typed_path("~/a.session") == tmp_path / "a.session"
    assert typed_path("two words") == Path("two words")
    odd = tmp_path / "a\\b"
    odd.touch()
    assert typed_path(str(odd)) == odd


def test_each_word_of_image_is_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cat.png").touch()
    assert typed_sources("my cat.png") == ("my cat.png",)
    assert typed_sources("https://example.com/photo?id=3 no-such 'no such' Ann's my\\ cat.png") == (
        "https://example.com/photo?id=3",
        "no-such",
        "no such",
        "Ann's",
        "my cat.png",
    )
    assert typed_sources("-") == ("./-",)  # not standard input: that would wait for ever
    assert typed_sources("x" * 10_000) == ("x" * 10_000,)
    assert typed_sources("~no-such-user/cat.png") == ("~no-such-user/cat.png",)


def test_a_long_text_of_quotes_takes_one_pass() -> None:
    """Each open quote once read on to the text's end: a pasted book took minutes."""
    text = "'tis \"so " * 100_000
    assert split_dropped(text) == Dropped((), text)


def test_a_pasted_text_full_of_paths_asks_the_file_system_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten kilobytes of paths took twelve seconds: each word asked for all that might follow."""
    asked: list[str] = []
    real = dropped._is_file
    monkeypatch.setattr(dropped, "_is_file", lambda word: asked.append(word) or real(word))
    count = 500
    assert len(split_dropped("What of /x/nonexist.png " * count).sources) == count
    assert len(asked) <= 16 * count
    asked.clear()
    assert split_dropped("/x/nonexist.png " * 5000) == Dropped((), "/x/nonexist.png " * 5000)
    assert not asked
