"""`fastvlm chat` as a command: what it refuses, and the chat through a pipe."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_mlx as fv
from tests.cli.command import Run, spawn, wait

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

MODEL = ("--model", "demo")


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo")


# ---- a pipe


def test_each_line_is_a_turn_of_one_conversation(
    run: Run, engine: fv.Engine, red_circle: Path
) -> None:
    ran = run("chat", red_circle, *MODEL, stdin=b"What is this?\nWhat colour is it?\n")
    session = engine.chat()
    wanted = [session.ask("What is this?", [red_circle]).text]
    wanted.append(session.ask("What colour is it?").text)
    assert ran.out.splitlines() == wanted
    assert ran.code == 0 and ran.err == ""


def test_the_last_line_needs_no_end_and_blank_lines_ask_nothing(run: Run) -> None:
    one = run("chat", *MODEL, stdin=b"What is this?\n")
    assert run("chat", *MODEL, stdin=b"\n  \nWhat is this?").out == one.out
    assert run("chat", *MODEL, stdin=b"").out == ""


def test_the_default_model_is_the_demo_and_says_so(run: Run) -> None:
    ran = run("chat", stdin=b"hi\n")
    assert ran.code == 0 and "demo model" in ran.err and ran.err.count("\n") == 1


def test_a_path_in_a_line_is_a_picture(run: Run, engine: fv.Engine, red_circle: Path) -> None:
    """A path with a space, quoted as a terminal does when a file is dragged onto it."""
    ran = run("chat", *MODEL, stdin=f"'{red_circle}' What is this?\n".encode())
    assert ran.out == engine.generate("What is this?", images=[red_circle]).text + "\n"


def test_commands_answer_on_standard_error(run: Run) -> None:
    ran = run("chat", *MODEL, stdin=b"/set temperature 0.5\n/system\n/help\n/quit\nnever asked\n")
    assert ran.code == 0 and ran.out == ""
    assert ran.err.startswith("temperature 0.5\nYou are a helpful assistant.\n/image")


def test_a_backslash_at_the_end_goes_on_with_the_next_line(run: Run, engine: fv.Engine) -> None:
    stdin = b"What is this?\\\nAnd the colour?\nAnd C:\\\\\nEnd.\\"
    ran = run("chat", *MODEL, stdin=stdin)
    session = engine.chat()
    questions = ("What is this?\nAnd the colour?", "And C:\\\\", "End.\\")
    assert ran.out == "".join(session.ask(question).text + "\n" for question in questions)


def test_in_a_pipe_turns_that_no_file_holds_are_given_up_unasked(run: Run, tmp_path: Path) -> None:
    """Asked, with nobody to answer, the lines after it went on with the old conversation."""
    other = tmp_path / "other"
    run("chat", *MODEL, "--session", other, stdin=b"Hello\nHello again\n")
    stdin = f"What is this?\n/clear\n/system\nWhat?\n/load {other}\n/edit\n".encode()
    ran = run("chat", *MODEL, stdin=stdin)
    assert ran.code == 0
    assert ran.err.splitlines() == [
        "a new conversation",
        "You are a helpful assistant.",
        "2 turns loaded",
        "the last question was: Hello again; /edit TEXT asks another",
    ]


def test_in_a_pipe_a_conversation_that_a_file_holds_is_not_given_up(
    run: Run, tmp_path: Path
) -> None:
    """One /clear emptied the file."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for file in (ours, other):
        run("chat", *MODEL, "--session", file, stdin=b"Hello\n")
    before = ours.read_bytes(), other.read_bytes()
    for command in ("/clear", f"/save {other}"):
        ran = run("chat", *MODEL, "--session", ours, stdin=f"{command}\nWhat?\n".encode())
        assert ran.code == 2 and ran.out == ""
        assert ran.err.startswith("fastvlm: error: a pipe cannot be asked: "), ran
        assert ran.err.count("\n") == 1
        assert (ours.read_bytes(), other.read_bytes()) == before


def test_the_help_says_where_output_goes(run: Run) -> None:
    out = " ".join(run("chat", "--help").out.split())
    assert "Answers go to standard output, everything else to standard error." in out


def test_the_first_error_ends_the_run_after_what_was_answered(run: Run) -> None:
    ran = run("chat", *MODEL, stdin=b"What is this?\n/frob\nnever asked\n")
    assert ran.code == 2
    assert ran.out.count("\n") == 1
    assert ran.err.startswith("fastvlm: error: there is no command /frob")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (b"./missing.png What is this?\n", "no such file"),
        (f"{__file__!r} is text\n/image {__file__}\n".encode(), "is not a picture"),
        (b"word " * 2000, "the model has 1024"),
        (b"/undo\n", "nothing was asked yet"),
        (b"/retry\n", "nothing was asked yet"),
        (b"/edit What?\n", "nothing was asked yet"),
        (b"/drop 1\n", "there is no picture 1"),
        (b"/set temperature hot\n", "temperature takes"),
        (b"/load missing.chat\n", "missing.chat: no such file"),
        (b"/save\n", "/save needs a FILE"),
        (b"caf\xe9?\n", "not valid UTF-8"),
    ],
)
def test_what_a_line_gets_wrong_is_one_line(run: Run, stdin: bytes, words: str) -> None:
    ran = run("chat", *MODEL, stdin=stdin)
    assert ran.code == 2
    last = ran.err.splitlines()[-1]
    assert last.startswith("fastvlm: error: ") and words in last, ran


def test_an_answer_cut_at_max_tokens_says_so(run: Run) -> None:
    ran = run("chat", *MODEL, "--max-tokens", 2, stdin=b"What is this?\n")
    assert ran.code == 0
    assert ran.err == "fastvlm: the answer was cut at 2 tokens (max_tokens)\n"


def test_the_oldest_turns_are_dropped_loudly(run: Run) -> None:
    lines = b"word " * 150 + b"\n"
    words = ("--overflow", "drop", "--max-tokens", 2)
    ran = run("chat", *MODEL, *words, stdin=lines * 4 + b"word " * 300)
    assert ran.code == 0
    assert "the context is full: the oldest" in ran.err
    refused = run("chat", *MODEL, "--max-tokens", 2, stdin=lines * 7)
    assert refused.code == 2 and "overflow" in refused.err


def test_the_answer_is_raw_in_a_pipe(run: Run, endless: Path) -> None:
    ran = run("chat", "--model", endless, "--max-tokens", 3, stdin=b"hi\n")
    assert ran.out == "\x1b\x1b\x1b\n"


def test_ctrl_c_ends_a_piped_chat(endless: Path) -> None:
    process = spawn("chat", "--model", endless, "--max-tokens", 8000)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    assert process.stdout.read(1) == b"\x1b"
    process.send_signal(signal.SIGINT)
    ran = wait(process)
    assert ran.code == 130 and "Traceback" not in ran.err


def test_a_reader_that_leaves_ends_the_chat_quietly(endless: Path) -> None:
    process = spawn("chat", "--model", endless, "--max-tokens", 8000)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(60) != 0
    process.stdin.close()
    process.stderr.close()


# ---- refused before a model is looked at


def test_a_bad_picture_is_refused_before_the_model(run: Run) -> None:
    message = run("chat", "missing.png", "--model", "./nowhere").refused()
    assert message == "missing.png: no such file"


def test_a_question_given_as_a_picture_is_recognised(run: Run) -> None:
    message = run("chat", "What is this?", *MODEL).refused()
    assert message.endswith("a question is typed in the chat")


def test_standard_input_cannot_be_the_picture(run: Run) -> None:
    assert "standard input holds the questions" in run("chat", "-", *MODEL).refused()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-bits", "3"], "'3' is not one of '8', '4'"),
        (["--overflow", "cut"], "'cut' is not one of 'refuse', 'drop'"),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--max-tokens", "0"], "'--max-tokens'"),
        (["--resolution", "100"], "100 is no multiple of 64"),
        (["--memory-limit", "1MB"], "demo needs"),
        (["--session", "/no/such/folder/x.chat"], "there is no folder /no/such/folder"),
        (["--session", "/"], "is a directory"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(run: Run, words: list[str], message: str) -> None:
    assert message in run("chat", *MODEL, *words, stdin=b"hi\n").refused()


def test_a_model_that_cannot_be_loaded_is_said_even_if_nothing_is_asked(run: Run) -> None:
    assert "nowhere" in run("chat", "--model", "./nowhere").refused()
    assert "nowhere" in run("chat", "--model", "./nowhere", stdin=b"hi\n").refused()


def test_packed_kv_answers(run: Run, red_circle: Path) -> None:
    ran = run("chat", red_circle, *MODEL, "--kv-bits", 8, stdin=b"What is this?\n/stats\n")
    assert ran.code == 0 and "circle" in ran.out


# ---- sessions


def test_a_session_goes_on_in_the_next_run(
    run: Run, engine: fv.Engine, red_circle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trip.chat"
    words = ("chat", *MODEL, "--session", file)
    first = run(*words, stdin=f"'{red_circle}' What is this?\n".encode())
    second = run(*words, stdin=b"What colour is it?\n")
    session = engine.chat()
    assert first.out == session.ask("What is this?", [red_circle]).text + "\n"
    assert second.out == session.ask("What colour is it?").text + "\n"
    assert second.err == ""


def test_a_system_message_given_replaces_the_files(run: Run, tmp_path: Path) -> None:
    words = ("chat", *MODEL, "--session", tmp_path / "trip.chat")
    run(*words, "--system", "One.", stdin=b"hi\n")
    assert run(*words, stdin=b"/system\n").err == "One.\n"
    assert run(*words, "--system", "Two.", stdin=b"/system\n").err == "Two.\n"


def test_a_file_that_is_no_session_is_refused_and_untouched(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert "notes.txt" in run("chat", *MODEL, "--session", file, stdin=b"hi\n").refused()
    assert file.read_text() == "mine"


# ---- terminals


def test_what_is_not_installed_is_said_with_the_way_out(tmp_path: Path) -> None:
    """Where prompt_toolkit or rich is missing, a terminal gets one line, and --plain works."""
    block = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'rich' else find(name, *rest)\n"
        "from fastvlm_mlx.cli.main import main; sys.exit(main())\n"
    )
    code, out = in_terminal([sys.executable, "-c", block, "chat", *MODEL], b"")
    assert code == 2
    assert "pip install 'fastvlm-mlx[chat]', or use --plain" in out


@pytest.mark.parametrize("how", ["dumb", "plain"])
def test_on_a_dumb_terminal_it_talks_in_lines_without_prompt_toolkit(how: str) -> None:
    env = {"TERM": "dumb" if how == "dumb" else "xterm"}
    report = (
        "import sys; from fastvlm_mlx.cli.main import main; code = main();"
        "print(sorted({'prompt_toolkit', 'rich'} & set(sys.modules))); sys.exit(code)"
    )
    words = [sys.executable, "-c", report, "chat", *MODEL, *(["--plain"] if how == "plain" else [])]
    code, out = in_terminal(words, b"What is this?\n/frob\n/undo\n\x04", env)
    assert code == 0
    assert "\x1b" not in out
    assert "error: there is no command /frob" in out and "took back" in out
    assert "to first token" in out
    assert out.rstrip().endswith("[]")


def test_before_the_prompt_mlx_is_not_imported() -> None:
    """The model's thread imports it while the prompt is already there."""
    code = (
        "import sys; from fastvlm_mlx.cli import chat\n"
        "import fastvlm_mlx.terminal.app, fastvlm_mlx.terminal.conversation\n"
        "import fastvlm_mlx.terminal.plain\n"
        "print([name for name in ('mlx', 'numpy', 'PIL', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def in_terminal(
    words: list[str], typed: bytes, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a command on a pseudo-terminal with keys typed beforehand; return code and screen."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | (env or {"TERM": "xterm"}),
    )
    os.close(theirs)
    os.write(ours, typed)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    return process.wait(60), seen.decode()
