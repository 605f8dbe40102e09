"""The command as a whole: help, exit codes, signals, pipes and terminals, in real processes."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.interrupt import Interrupt
from tests.cli.command import COMMAND, Ran, Run, spawn, wait

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

ESC = "\x1b"


def test_without_arguments_it_shows_its_help(run: Run) -> None:
    bare, asked = run(), run("--help")
    assert bare.code == asked.code == 0
    assert bare.out == asked.out
    for name in ("generate", "preview", "inspect"):
        assert f"\n  {name}" in bare.out


def test_help_lines_of_subcommands_are_not_cut_off(run: Run) -> None:
    assert "..." not in run("-h").out.replace("[ARGS]...", "")


@pytest.mark.parametrize("name", ["generate", "preview", "inspect"])
def test_every_subcommand_explains_itself(run: Run, name: str) -> None:
    ran = run(name, "-h")
    assert ran.code == 0
    assert "fastvlm " + name in ran.out
    assert all(len(line) <= 96 for line in ran.out.splitlines())


def test_version(run: Run) -> None:
    assert run("--version") == Ran(0, f"fastvlm {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], "no such command 'generat' (see fastvlm --help)"),
        (["--frob"], "no such option"),
        (["generate", "--max-token", "3"], "--max-tokens"),
        (["generate", "-p", "x", "--max-tokens", "0"], "'--max-tokens': 0"),
        (["generate", "-p", "x", "--seed", "x"], "'--seed': 'x' is not a valid integer"),
        (["generate", "-p"], "'-p' requires an argument (see fastvlm generate --help)"),
        (["preview", "x.png"], "'-o' / '--output'"),
        (["inspect"], "'MODEL'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_names_the_help(
    run: Run, arguments: list[str], words: str
) -> None:
    message = run(*arguments).refused()
    assert words in message
    assert message.endswith("--help)")


def test_a_bug_of_ours_is_one_line_unless_verbose(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.cli import generate

    monkeypatch.setattr(generate, "chosen_sampling", lambda _: 1 / 0)
    quiet, verbose = run("generate", "-p", "hi"), run("generate", "-p", "hi", "-v")
    assert quiet.code == verbose.code == 1
    assert quiet.err.count("\n") == 1 and "ZeroDivisionError" in quiet.err
    assert "Traceback" in verbose.err


def test_verbose_is_heard_before_and_after_the_subcommand_and_not_kept(run: Run) -> None:
    words = ("generate", "-p", "hi", "--model", "demo", "--max-tokens", "1")
    assert "fast_vlm layout, computing in" in run("-v", *words).err
    assert "fast_vlm layout, computing in" in run(*words, "-v").err
    assert "layout" not in run(*words).err


# ---- Ctrl-C


def read_until(stream: int, wanted: bytes) -> bytes:
    """Read a file descriptor until `wanted` has been seen."""
    seen = b""
    while wanted not in seen:
        try:
            chunk = os.read(stream, 4096)
        except OSError:  # a closed terminal
            chunk = b""
        assert chunk, f"ended before {wanted!r}: {seen!r}"
        seen += chunk
    return seen


def test_ctrl_c_ends_the_answer_cleanly(endless: Path) -> None:
    process = spawn("generate", "-p", "hi", "--model", endless, "--max-tokens", 8000)
    assert process.stdout is not None
    seen = read_until(process.stdout.fileno(), ESC.encode())
    process.send_signal(signal.SIGINT)
    ran = wait(process)
    answer = seen.decode() + ran.out
    assert ran.code == 130
    assert set(answer[:-1]) == {ESC} and answer.endswith("\n")
    assert 0 < len(answer) < 8000
    assert ran.err == ""


def test_ctrl_c_with_json_gives_what_there_is_as_cancelled(endless: Path) -> None:
    import json

    words = ("-p", "hi", "--model", endless, "--max-tokens", 8000, "--json", "-v")
    process = spawn("generate", *words)
    assert process.stderr is not None
    read_until(process.stderr.fileno(), b"first token")
    process.send_signal(signal.SIGINT)
    ran = wait(process)
    assert ran.code == 130
    answer = json.loads(ran.out)
    assert answer["finish_reason"] == "cancelled"
    assert 0 < answer["stats"]["generated_tokens"] == len(answer["token_ids"]) < 8000


def test_ctrl_c_before_the_answer_aborts_without_a_word() -> None:
    process = spawn("generate", "-", "-v")
    assert process.stderr is not None
    read_until(process.stderr.fileno(), b"reading standard input")
    process.send_signal(signal.SIGINT)
    ran = wait(process)
    assert ran.code == 130
    assert ran.out == "" and ran.err.strip() == ""


def test_the_second_ctrl_c_aborts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupt.answering = True
        signal.raise_signal(signal.SIGINT)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- pipes and terminals


def test_a_closed_pipe_ends_the_answer_quietly(endless: Path) -> None:
    process = spawn("generate", "-p", "hi", "--model", endless, "--max-tokens", 8000)
    assert process.stdout is not None
    read_until(process.stdout.fileno(), ESC.encode())
    process.stdout.close()
    process.stdout = None
    ran = wait(process)
    assert ran.code == 1  # an answer that had run on to its end would leave 0
    assert ran.err == ""


def test_what_a_model_writes_cannot_command_a_terminal(endless: Path) -> None:
    words = ("generate", "-p", "hi", "--model", endless, "--max-tokens", 3)
    ours, theirs = pty.openpty()
    process = spawn(*words, stdout=theirs)
    os.close(theirs)
    shown = read_until(ours, b"\n")
    assert wait(process).code == 0
    os.close(ours)
    assert shown.decode() == "���\r\n"
    assert wait(spawn(*words)).out == ESC * 3 + "\n"


def test_progress_shows_on_a_terminal_and_is_erased(red_circle: Path) -> None:
    """The picture comes late on standard input, so that the line has to appear."""
    ours, theirs = pty.openpty()
    process = spawn("generate", "-", "-p", "What is this?", "--model", "demo", stderr=theirs)
    os.close(theirs)
    assert "Reading the picture" in read_until(ours, b"s)").decode()
    ran = wait(process, red_circle.read_bytes())
    assert ran.code == 0 and ran.out.strip()
    rest = os.read(ours, 4096).decode()
    os.close(ours)
    assert rest.endswith("\r\x1b[K")


def test_nothing_of_progress_reaches_a_pipe(red_circle: Path) -> None:
    process = spawn("generate", "-", "-p", "What is this?", "--model", "demo")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)  # long enough for a line to appear on a terminal
    ran = wait(process, red_circle.read_bytes())
    assert ran.code == 0
    assert ran.err == "" and ESC not in ran.out


def test_an_answer_beyond_the_terminals_encoding_is_no_crash() -> None:
    code = (
        "import sys, click; from fastvlm_mlx.cli import main\n"
        "main.cli.callback = lambda: click.echo('\\u4f60')\n"
        "sys.exit(main.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"?\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_closed_is_an_empty_one(closed: str) -> None:
    """It was reported as a bug of ours: None has no isatty."""
    command = f"{shlex.join(COMMAND)} chat --model demo --plain {closed}"
    done = subprocess.run(
        ["sh", "-c", command], input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "bug" not in done.stderr
