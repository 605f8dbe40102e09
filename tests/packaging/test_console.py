"""The README's runner tells a true block from a false one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.console import blocks, commands, matches, run


def holds(markdown: str, folder: Path) -> list[bool]:
    """For each command of the console blocks: does it do what is shown?"""
    results = []
    for block in blocks(markdown, "console"):
        for command in commands(block):
            output, code = run(command, folder, {})
            results.append(code == command.exit_code and matches(command.shown, output))
    return results


def block(*lines: str) -> str:
    return "\n".join(["text", "```console", *lines, "```", "text", ""])


def test_true_output_passes_and_false_output_fails(tmp_path: Path) -> None:
    assert holds(block("$ echo red", "red"), tmp_path) == [True]
    assert holds(block("$ echo red", "blue"), tmp_path) == [False]
    assert holds(block("$ echo red"), tmp_path) == [False]
    assert holds(block("$ echo red", "red", "blue"), tmp_path) == [False]


def test_each_command_is_judged_by_its_own_lines(tmp_path: Path) -> None:
    markdown = block("$ echo 1 > f; echo done", "done", "$ cat f", "2")
    assert holds(markdown, tmp_path) == [True, False]


def test_only_console_blocks_are_run(tmp_path: Path) -> None:
    markdown = "```sh\n$ touch run\n```\n" + block("$ true") + "```\n$ touch run\n```\n"
    assert holds(markdown, tmp_path) == [True]
    assert not (tmp_path / "run").exists()


def test_a_failing_command_fails_unless_its_exit_code_is_named(tmp_path: Path) -> None:
    assert holds(block("$ echo no; exit 2", "no"), tmp_path) == [False]
    assert holds(block("$ (echo no; exit 2)  # exits 2", "no"), tmp_path) == [True]
    assert holds(block("$ echo no  # exits 2", "no"), tmp_path) == [False]


def test_error_output_is_shown_where_a_terminal_shows_it(tmp_path: Path) -> None:
    assert holds(block("$ echo a; echo b >&2; echo c", "a", "b", "c"), tmp_path) == [True]


def test_a_command_may_go_on_after_a_backslash(tmp_path: Path) -> None:
    assert holds(block("$ echo one \\", "    two", "one two"), tmp_path) == [True]


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        (["a", "...", "d"], "a\nb\nc\nd\n", True),
        (["a", "...", "d"], "a\nd\n", True),
        (["a", "...", "d"], "a\nb\nc\n", False),
        (["..."], "", True),
        (["took 12.5 ms"], "took 7 ms\n", True),
        (["took 12.5ms, 1,024 MiB"], "took 7ms, 3 MiB\n", True),
        (["vision   12.5 ms"], "vision  112.5 ms\n", True),
        (["took 12.5 ms"], "took 7 s\n", False),
        (["3 squares"], "4 squares\n", False),
        (["12 msgs"], "13 msgs\n", False),
        (['{"ttft_ms": 12.5, "n": 3}'], '{"ttft_ms": 9, "n": 3}\n', True),
        (['{"ttft_ms": 12.5, "n": 3}'], '{"ttft_ms": 9, "n": 4}\n', False),
        (["a.c"], "abc\n", False),
    ],
)
def test_only_elisions_and_measurements_are_forgiven(
    shown: list[str], output: str, same: bool
) -> None:
    assert matches(tuple(shown), output) is same


def test_a_block_without_a_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="begins with"):
        commands("output only\n")
