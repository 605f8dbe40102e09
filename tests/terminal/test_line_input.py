"""Keys to text: what Enter, paste, history and completion do, and what a terminal then shows."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pyte
import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.terminal.history import MAX_ENTRIES, HistoryFile, history_path
from fastvlm_mlx.terminal.line_input import Cancelled, LineInput

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

UP, ALT_ENTER, ENTER, NEW_LINE, TAB = "\x1b[A", "\x1b\r", "\r", "\n", "\t"


class Keyboard:
    """A LineInput at whose keys this test sits."""

    def __init__(self, pipe: PipeInput, **given: object) -> None:
        self.pipe = pipe
        self.pictures = 0
        settings: dict[str, object] = {
            "history_file": None,
            "status": lambda columns: "status"[:columns],
            "images": lambda: self.pictures,
            "color": False,
            "on_image_paste": lambda: None,
        }
        self.line = LineInput(**(settings | given), input=pipe, output=DummyOutput())  # type: ignore[arg-type]

    def read(self, keys: str, default: str = "") -> str:
        """Return what is read; after 10 s Ctrl-C is pressed, so that no test waits for ever."""
        hurry = threading.Timer(10, lambda: self.pipe.send_text("\x1b[201~\x07\x03"))
        hurry.start()
        try:
            self.pipe.send_text(keys)
            return self.line.read(default)
        except Cancelled as cancelled:
            assert hurry.is_alive(), f"{keys!r} sent nothing; typed: {cancelled.text!r}"
            raise
        finally:
            hurry.cancel()


@contextmanager
def keyboard(**given: object) -> Iterator[Keyboard]:
    with create_pipe_input() as pipe:
        yield Keyboard(pipe, **given)


def test_enter_sends_and_three_keys_begin_a_new_line() -> None:
    with keyboard() as keys:
        assert keys.read(f"one{ENTER}") == "one"
        assert keys.read(f"a{ALT_ENTER}b{NEW_LINE}c\\{ENTER}d{ENTER}") == "a\nb\nc\nd"
        assert keys.read(f"two backslashes \\\\{ENTER}") == "two backslashes \\\\"
        assert keys.read(f"a\\{ENTER}{ENTER}") == "a\n"


def test_a_backslash_within_a_line_is_text() -> None:
    with keyboard() as keys:
        assert keys.read(f"a\\b\x1b[D{ENTER}") == "a\\b"


def test_a_paste_of_many_lines_is_one_input() -> None:
    """Without bracketed paste each line of it was a question of its own."""
    with keyboard() as keys:
        pasted = "\x1b[200~line one\r\nline two\\\rline three\n\x1b[201~"
        assert keys.read(f"see: {pasted}ok{ENTER}") == "see: line one\nline two\\\nline three\nok"


def test_a_question_is_offered_again() -> None:
    with keyboard() as keys:
        assert keys.read(f"!{ENTER}", default="What is\nthis?") == "What is\nthis?!"


def test_ctrl_c_says_what_was_typed() -> None:
    with keyboard(history_file=None) as keys:
        with pytest.raises(Cancelled) as raised:
            keys.read("half a question\x03")
        assert raised.value.text == "half a question"
        assert isinstance(raised.value, KeyboardInterrupt)
        with pytest.raises(Cancelled) as raised:
            keys.read("\x03")
        assert raised.value.text == ""
        assert keys.read(f"next{ENTER}") == "next"


def test_another_thread_may_end_the_line_before_and_while_it_is_typed() -> None:
    with keyboard() as keys:
        typed = threading.Event()
        keys.line._session.default_buffer.on_text_changed += lambda buffer: (
            typed.set() if buffer.text == "half" else None
        )
        thread = threading.Thread(target=lambda: typed.wait(10) and keys.line.cancel())
        thread.start()
        with pytest.raises(Cancelled) as raised:
            keys.read("half")
        thread.join()
        assert raised.value.text == "half"
        with pytest.raises(Cancelled):
            keys.read("")


def test_ctrl_d_leaves_an_empty_prompt_only() -> None:
    with keyboard() as keys:
        assert keys.read(f"ab\x1b[D\x04{ENTER}") == "a"
        with pytest.raises(EOFError):
            keys.read("\x04")


def test_keys_typed_before_are_the_next_lines() -> None:
    with keyboard() as keys:
        assert keys.read(f"one{ENTER}two{ENTER}thr") == "one"
        assert keys.read("") == "two"
        assert keys.read(f"ee{ENTER}") == "three"


def test_history_is_there_again_in_the_next_run(tmp_path: Path) -> None:
    file = tmp_path / "state" / "fastvlm" / "history"
    with keyboard(history_file=file) as keys:
        for text in ("first", "second\nof two lines", "second\nof two lines", "   "):
            keys.read(text.replace("\n", NEW_LINE) + ENTER)
        assert keys.read(f"{UP}{UP}{UP}{UP}{ENTER}") == "first"  # within this run, too
    assert HistoryFile(file).entries() == ["first", "second\nof two lines", "first"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with keyboard(history_file=file) as keys:
        assert keys.read(f"{UP}{UP}{ENTER}") == "second\nof two lines"
        assert keys.read(f"\x12of two{ENTER}{ENTER}") == "second\nof two lines"


def test_a_cancelled_line_is_not_remembered(tmp_path: Path) -> None:
    with keyboard(history_file=tmp_path / "history") as keys:
        with pytest.raises(Cancelled):
            keys.read("never\x03")
        keys.read(f"asked{ENTER}")
    assert HistoryFile(tmp_path / "history").entries() == ["asked"]


def test_a_history_that_cannot_be_written_is_said_once_and_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with keyboard(history_file=tmp_path / "file" / "history") as keys:
        keys.read(f"one{ENTER}")
        keys.read(f"two{ENTER}")
        assert keys.read(f"{UP}{UP}{ENTER}") == "one"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "lasts for this chat only" in warnings[0].getMessage()


def test_a_corrupted_history_loses_only_what_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.write_bytes(b'"one"\n\xff\xfe\0 junk\n{"no": 1}\n"two"\n"half a li')
    file.chmod(0o644)
    history = HistoryFile(file)
    assert history.entries() == ["one", "two"]
    history.append("three")
    assert history.entries() == ["one", "two", "three"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_history_is_bounded_whatever_was_typed(tmp_path: Path) -> None:
    file = tmp_path / "history"
    history = HistoryFile(file)
    for number in range(1500):
        history.append(f"line {number}")
    kept = history.entries()
    assert kept == [f"line {number}" for number in range(500, 1500)]
    assert file.read_bytes().count(b"\n") <= 1200
    history.append("x" * 100_000)
    assert history.entries() == kept
    for number in range(150):
        history.append(f"{number}" + "y" * 30_000)
    assert file.stat().st_size < 3 * 2**20
    assert history.entries()[-1].startswith("149y")
    assert len(history.entries()) <= MAX_ENTRIES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history"]


def test_two_chats_at_once_lose_none_of_each_others_lines(tmp_path: Path) -> None:
    """A writer that opened the file before another replaced it wrote to a file that was gone."""
    file = tmp_path / "history"
    file.write_text("".join(json.dumps(f"old {n}") + "\n" for n in range(1150)))

    def type_lines(name: str) -> None:
        history = HistoryFile(file)
        for number in range(200):
            history.append(f"{name} {number}")

    threads = [threading.Thread(target=type_lines, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = HistoryFile(file).entries()
    for name in "abc":
        mine = [entry for entry in kept if entry.startswith(f"{name} ")]
        assert mine == [f"{name} {number}" for number in range(200)]


def test_where_the_history_is_kept() -> None:
    home = {"HOME": "/home/ann"}
    linux: Callable[[dict[str, str]], Path | None] = lambda e: history_path(e, platform="linux")  # noqa: E731
    assert linux(home) == Path("/home/ann/.local/state/fastvlm/history")
    assert linux(home | {"XDG_STATE_HOME": "/state"}) == Path("/state/fastvlm/history")
    assert linux(home | {"XDG_STATE_HOME": "relative"}) == linux(home)
    assert linux(home | {"FASTVLM_HISTORY": "/x/h"}) == Path("/x/h")
    assert linux(home | {"FASTVLM_HISTORY": ""}) is None
    mac = history_path(home, platform="darwin")
    assert mac == Path("/home/ann/Library/Application Support/fastvlm/history")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("my cat (1).png", "notes.txt", ".hidden.png", "e\u0301te\u0301.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "photos" / "in").mkdir(parents=True)
    for name in ("cat.png", "notes.txt"):
        (tmp_path / "photos" / "in" / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/qu", "/quit"),
        ("/ret", "/retry"),
        ("/loa", "/load "),
        ("/set over", "/set overflow "),
        ("/set overflow d", "/set overflow d"),  # drop or default: shown, not chosen
        ("/set overflow dr", "/set overflow drop"),
        ("/retry seed=1 temp", "/retry seed=1 temperature="),
        ("/drop 1", "/drop 1"),
        ("/image my", "/image my\\ cat\\ (1).png"),
        ("/image 'my", "/image 'my cat (1).png'"),
        ("/image é", "/image e\u0301te\u0301.jpg"),
        ("/image not", "/image not"),
        ("/load not", "/load notes.txt"),
        ("look at ./ph", "look at ./photos/"),
        ("look at photos/", "look at photos/in/"),  # a path by its slash alone
        ("look at photos/in/c", "look at photos/in/cat.png"),
        ("'photos/in/", "'photos/in/cat.png'"),
        ("photos/in/n", "photos/in/n"),  # notes.txt is no picture
        ("look at .hid", "look at .hidden.png"),
        ("look at ~", "look at ~/"),
        ("look at ~/ph", "look at ~/photos/"),
        ("look at ..", "look at ../"),
        ("either/or", "either/or"),
        ("/edit photos/i", "/edit photos/in/"),
        ("not a path ph", "not a path ph"),
    ],
)
def test_tab_completes(folder: Path, typed: str, sent: str) -> None:
    with keyboard(pictures=lambda: ["a.png"]) as keys:
        done = threading.Event()
        keys.line._session.default_buffer.on_completions_changed += lambda _: done.set()
        keys.line._session.default_buffer.on_text_changed += lambda buffer: (
            done.set() if buffer.text == sent != typed else None
        )

        def press_enter() -> None:
            done.wait(2 if sent != typed else 0.3)
            keys.pipe.send_text("\x1b[F" + ENTER)

        thread = threading.Thread(target=press_enter)
        thread.start()
        assert keys.read(typed + TAB) == sent
        thread.join()


def test_ctrl_v_takes_the_clipboards_picture_or_pastes_what_was_cut() -> None:
    with keyboard() as keys:
        taken: list[str | None] = ["picture added", None]

        def take() -> str | None:
            keys.pictures += 1
            return taken.pop(0)

        keys.line._on_image_paste = take
        assert keys.read(f"gone\x17a\x16b\x16{ENTER}") == "abgone"
        assert keys.pictures == 2


def test_ctrl_v_survives_a_clipboard_that_cannot_be_asked() -> None:
    def fail() -> str | None:
        raise ImageError("on macOS only")

    with keyboard(on_image_paste=fail) as keys:
        keys.pipe.send_text("a\x16")
        shown: list[str] = []
        session = keys.line._session
        session.app.after_render += lambda _: (
            shown.append(keys.line._toolbar()[0][1]) or keys.pipe.send_text(ENTER)
            if keys.line._notice
            else None
        )
        assert keys.line.read() == "a"
        assert shown[0] == "on macOS only"


def test_a_history_that_another_program_holds_is_given_up_not_waited_for(tmp_path: Path) -> None:
    """Enter waited for the lock, silently, for as long as the other held it."""
    import fcntl

    path = tmp_path / "history"
    HistoryFile(path).append("before")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            HistoryFile(path).append("after")
    HistoryFile(path).append("later")
    assert HistoryFile(path).entries() == ["before", "later"]


def test_the_prompt_counts_pending_pictures_and_the_status_has_the_windows_width() -> None:
    widths: list[int] = []
    with keyboard(status=lambda columns: widths.append(columns) or "s") as keys:
        prompts = []
        for keys.pictures in (0, 1, 2):
            prompts.append("".join(part[1] for part in keys.line._prompt()))
        assert prompts == ["> ", "[1 picture] > ", "[2 pictures] > "]
        keys.line._toolbar()
        assert widths == [DummyOutput().get_size().columns - 1]


def test_refresh_and_show_from_other_threads_never_raise(capfd: pytest.CaptureFixture[str]) -> None:
    with keyboard() as keys:
        stop = threading.Event()
        problems: list[BaseException] = []

        def disturb() -> None:
            try:
                while not stop.wait(0.0005):
                    keys.line.refresh()
                    keys.line.show("loaded")
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=disturb)
        thread.start()
        for number in range(30):
            assert keys.read(f"{number}{ENTER}") == str(number)
        stop.set()
        thread.join()
        assert not problems
        assert not keys.line._lines


class Terminal:
    """A real pseudo-terminal with the child in it, and the screen that a person would see."""

    def __init__(self, folder: Path, columns: int, rows: int = 12, **environ: str) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PROMPT_TOOLKIT")}
        self.screen = pyte.HistoryScreen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.child = pexpect.spawn(
            sys.executable,
            [str(Path(__file__).with_name("line_input_child.py")), str(folder)],
            dimensions=(rows, columns),
            env=clean | {"TERM": "xterm-256color"} | environ,
            timeout=60,
        )
        self.child.delaybeforesend = None
        # The terminal's own answers (where the cursor is) go back as if typed.
        self.screen.write_process_input = lambda data: self.child.send(data)

    def wait(self, *parts: str) -> str:
        """Read until all the parts are on the screen at once; return the screen's lines."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            text = "\n".join(row.rstrip() for row in self.screen.display)
            if all(part in text for part in parts):
                return text
            try:
                data = self.child.read_nonblocking(4096, timeout=0.2)
            except (pexpect.TIMEOUT, pexpect.EOF):
                continue
            self.raw += data
            self.stream.feed(data)
        raise AssertionError(f"{parts} never came:\n{text}")

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(columns: int, **environ: str) -> Terminal:
        opened.append(Terminal(tmp_path, columns, **environ))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.child.close(force=True)


def test_in_a_terminal_of_40_columns_and_after_a_resize(
    terminals: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = terminals(40, PICTURES="1")
    screen = terminal.wait("[1 picture] >", "demo | 12 of 1024 positions | =========")
    assert max(map(len, screen.split("\n"))) == 39  # one status line, one column left free
    terminal.child.send("Was ist 日本 an caf\u00e9, dieser langen Zeile?" + NEW_LINE + "ende")
    screen = terminal.wait("\n… ende")
    assert "[1 picture] > Was ist" in screen
    terminal.resize(60, 12)
    screen = terminal.wait("positions | " + "=" * 29, "… ende")
    assert max(map(len, screen.split("\n"))) == 59
    terminal.resize(24, 12)
    screen = terminal.wait("Zeile", "… ende", "\ndemo | 12 of 1024 posit")
    assert screen.count("Was ist") == screen.count("demo") == 1  # nothing of the wider one is left
    terminal.child.send(ENTER)
    terminal.wait("answering")
    terminal.resize(80, 12)
    terminal.wait("[1 picture] >")
    assert HistoryFile(tmp_path / "history").entries() == [
        "Was ist 日本 an café, dieser langen Zeile?\nende"
    ]
    terminal.child.send("\x03")
    terminal.wait('cancelled ""')
    terminal.child.expect(pexpect.EOF)


def test_what_is_typed_while_the_answer_comes_is_the_next_question(
    terminals: Callable[..., Terminal], tmp_path: Path
) -> None:
    """With ICRNL left on, the Enter of a line typed ahead arrived as Ctrl-J: it was not sent."""
    (tmp_path / "busy").touch()
    terminal = terminals(80)
    terminal.wait(">", "demo |")
    terminal.child.send(f"one{ENTER}")
    terminal.wait("answering")
    terminal.child.send(f"typed ahead{ENTER}and ha")
    (tmp_path / "busy").unlink()
    terminal.wait('read "typed ahead"', "> and ha", "demo |")
    terminal.child.send(f"lf{ENTER}")
    terminal.wait('read "and half"')


def test_without_color_nothing_is_styled(terminals: Callable[..., Terminal]) -> None:
    terminal = terminals(80, NO_COLOR="1")
    terminal.wait(">", "demo |")
    terminal.child.send("/s\t")
    terminal.wait("/system", "/stats")
    codes = set(re.findall(rb"\x1b\[([0-9;:]*)m", terminal.raw))
    assert codes <= {b"", b"0"}
    colored = terminals(80)
    colored.wait(">", "demo |")
    assert set(re.findall(rb"\x1b\[([0-9;:]*)m", colored.raw)) - {b"", b"0"}
    styled = re.findall(rb"\x1b\[([0-9;:]*)m", colored.raw)
    assert b"0;2" in styled  # the status line is dim,
    assert not any(b"7" in code.split(b";") for code in styled)  # and no bar in reverse video


def test_only_the_line_input_needs_prompt_toolkit() -> None:
    names = ("dropped", "commands", "settings", "history", "clipboard")
    code = f"""
import sys
for name in {names!r}:
    __import__("fastvlm_mlx.terminal." + name)
assert "prompt_toolkit" not in sys.modules
assert "mlx.core" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
