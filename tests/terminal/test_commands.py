"""Which lines are commands, what is said of those that are nearly, and /set's values."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.sampling import Sampling
from fastvlm_mlx.terminal.commands import COMMANDS, Typed, help_lines, parse, set_lines
from fastvlm_mlx.terminal.screen import folded
from fastvlm_mlx.terminal.settings import SETTING_NAMES, Settings, find_setting, typed_values


def named(line: str) -> tuple[str, str]:
    typed = parse(line)
    assert typed.command is not None, line
    return typed.command.name, typed.argument


def test_every_command_is_read_by_its_name_in_any_case() -> None:
    names = "image images drop retry undo edit system set stats save load clear help quit"
    assert [command.name for command in COMMANDS] == names.split()
    for command in COMMANDS:
        needed = "7" if command.arguments and command.arguments[0] != "[" else ""
        assert named(f"/{command.name} {needed}") == (command.name, needed)
        assert named(f"/{command.name.upper()}\t{needed}") == (command.name, needed)


def test_arguments_keep_their_inner_lines() -> None:
    assert named("/system  You are\n  terse. \n") == ("system", "You are\n  terse.")
    assert named("/edit\nWhat?") == ("edit", "What?")
    assert named("/image 'a b.png' /c.png") == ("image", "'a b.png' /c.png")
    assert named("/retry temperature=0.7 seed=1") == ("retry", "temperature=0.7 seed=1")


def test_a_name_may_be_cut_short_while_it_is_one_command() -> None:
    assert named("/q") == ("quit", "")
    assert named("/sy Be brief") == ("system", "Be brief")
    assert named("/image") == ("image", "")  # not "image or images"
    with pytest.raises(PromptError, match="/s may be /system or /set or /stats or /save"):
        parse("/s")
    assert named("/exit") == ("quit", "")
    assert named("/?") == ("help", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/qiut", "did you mean /quit?"),
        ("/immage x", "did you mean /image?"),
        ("/xyzzy", "/help lists them"),
        ("/", "/help lists them"),
        ("/" + "x" * 5000, "/help lists them"),
        ("/drop", "/drop needs its N"),
        ("/load", "/load needs its FILE"),
        ("/quit now", "/quit takes nothing after it"),
    ],
)
def test_a_wrong_command_is_answered_with_what_to_do(line: str, said: str) -> None:
    with pytest.raises(PromptError) as raised:
        parse(line)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_two_slashes_ask_a_question_that_starts_with_one() -> None:
    assert parse("//help is what?") == Typed(None, "/help is what?")
    assert parse("//") == Typed(None, "/")


def test_a_path_is_no_command(tmp_path: Path) -> None:
    (tmp_path / "photo").touch()
    for line in (
        f"{tmp_path}/photo",
        f"{tmp_path}/photo what is it?",
        "/no/such.png what is it?",
        "/photo.png",
        r"/My\ Photos/cat.png",
        "/etc/hosts is what?",
        f"/{tmp_path.parts[1]}",
        "What is /help?",
        " /help",
        "",
    ):
        assert parse(line) == Typed(None, line)


def test_a_command_wins_over_a_folder_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a folder /images once had no command /images."""
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert named("/images") == ("images", "")


@given(st.text(max_size=40))
def test_any_line_is_a_question_a_command_or_one_line_of_advice(text: str) -> None:
    for line in (text, f"/{text}", f"/set {text}"):
        try:
            typed = parse(line)
        except FastVLMError as error:
            assert line.startswith("/")
            assert str(error)
        else:
            assert typed.command is not None or typed.argument in (line, line[1:])


def test_numbers_of_drop_and_undo() -> None:
    assert parse("/drop 3").number() == 3
    assert parse("/undo").number(default=1) == 1
    for line in ("/drop 0", "/drop -1", "/drop two", "/undo 1.5", "/drop ²", "/drop 1 2"):
        with pytest.raises(PromptError, match=r"takes a number from 1, as in /(drop|undo) 2, not"):
            parse(line).number(default=1)


@pytest.mark.parametrize("columns", [*range(20, 101), 200])
def test_the_help_stays_off_the_windows_edge_and_names_every_command(columns: int) -> None:
    """A line as wide as the window was wrapped once more when it was printed."""
    lines = help_lines(columns)
    assert max(map(len, lines)) < columns
    assert sorted(" ".join(lines).split()) == sorted(" ".join(help_lines(1000)).split())
    assert [part for line in lines for part in folded(line, columns)] == lines
    for command in COMMANDS:
        assert any(line.startswith(f"/{command.name}") for line in lines)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temperature", "0.7", Settings(sampling=Sampling(temperature=0.7))),
        ("temp", " 1 ", Settings(sampling=Sampling(temperature=1.0))),
        ("top-p", ".9", Settings(sampling=Sampling(top_p=0.9))),
        ("top_k", "40", Settings(sampling=Sampling(top_k=40))),
        ("MIN_P", "0.05", Settings(sampling=Sampling(min_p=0.05))),
        ("repetition_penalty", "1.1", Settings(sampling=Sampling(repetition_penalty=1.1))),
        ("seed", "7", Settings(sampling=Sampling(seed=7))),
        ("max_tokens", "32", Settings(max_tokens=32)),
        ("overflow", "drop", Settings(overflow="drop")),
        ("preview", "off", Settings(preview=False)),
    ],
)
def test_each_setting_is_changed_shown_and_put_back(
    name: str, text: str, expected: Settings
) -> None:
    changed = Settings().changed(name, text)
    assert changed == expected
    full = find_setting(name).name
    shown = {row[0]: row[1] for row in changed.rows()}
    again = Settings()
    for row_name, row_value in shown.items():
        again = again.changed(row_name, row_value)
    assert again == changed  # what /set shows can be typed
    assert changed.changed(full, "default") == Settings()


@pytest.mark.parametrize("columns", range(20, 101))
def test_settings_stay_off_the_windows_edge(columns: int) -> None:
    rows = Settings(max_tokens=999_999_999).rows()
    lines = set_lines(rows, columns)
    assert max(map(len, lines)) < columns
    assert sorted(" ".join(lines).split()) == sorted(" ".join(set_lines(rows, 1000)).split())


def test_a_setting_by_itself_says_what_it_takes() -> None:
    settings = Settings().changed("temperature", "0.5")
    name, value, meaning = settings.row("temp")
    assert (name, value) == ("temperature", "0.5")
    assert meaning.endswith("higher is more varied (takes a number from 0, or off)")
    with pytest.raises(PromptError, match="did you mean temperature"):
        settings.row("temprature")


def test_off_means_off_where_that_makes_sense() -> None:
    wild = Settings().changed_all("temperature=1 top_p=0.5 top_k=3 min_p=0.1 seed=4 rep=2")
    assert wild.sampling == Sampling(
        temperature=1, top_p=0.5, top_k=3, min_p=0.1, seed=4, repetition_penalty=2
    )
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        wild = wild.changed(name, "OFF")
    assert wild == Settings()
    with pytest.raises(PromptError, match="max_tokens takes a whole number from 1, not 'off'"):
        wild.changed("max_tokens", "off")


def test_rows_say_what_each_setting_means() -> None:
    rows = Settings().rows()
    assert tuple(row[0] for row in rows) == SETTING_NAMES
    assert [row[1] for row in rows] == ["0", *["off"] * 5, "256", "refuse", "on"]
    assert all(row[2] and "\n" not in row[2] for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("temprature", "1", "did you mean temperature?"),
        ("top", "1", "top may be top_p or top_k"),
        ("xyz", "1", "there are temperature, top_p"),
        ("", "1", "there is no setting ''"),
        ("temperature", "0,7", "temperature takes a number from 0, or off, not '0,7'"),
        ("temperature", "-1", "temperature must be >= 0"),
        ("temperature", "nan", "temperature must be >= 0"),
        ("temperature", "", "/set temperature VALUE"),
        ("top_p", "2", "top_p must be in (0, 1]"),
        ("top_k", "1.5", "top_k takes a whole number, or off, not '1.5'"),
        ("seed", "9" * 5000, "seed takes a whole number"),
        ("max_tokens", "0", "max_tokens must be >= 1"),
        ("overflow", "7", "overflow takes refuse or drop, not '7'"),
        ("preview", "maybe", "preview takes on or off"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(name: str, text: str, said: str) -> None:
    settings = Settings()
    with pytest.raises(FastVLMError) as raised:
        settings.changed(name, text)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 200
    assert settings == Settings()


def test_retrys_assignments_need_an_equals_sign() -> None:
    assert Settings().changed_all("") == Settings()
    with pytest.raises(PromptError, match="write name=value"):
        Settings().changed_all("temperature 0.7")


def test_completion_offers_words_a_setting_takes() -> None:
    for name in SETTING_NAMES:
        for word in typed_values(name):
            Settings().changed(name, word)
    assert typed_values("preview") == ("on", "off", "default")
    assert typed_values("no such") == ()
