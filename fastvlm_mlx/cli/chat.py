"""`fastvlm chat`: a conversation about pictures, on a terminal or through a pipe.

Pictures and options are checked first; then the model loads while the user types. Knows which of
the two chats to run and how the process ends; knows nothing of turns or drawing.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fastvlm_mlx.cli.asking import answer_options, chosen_sampling, load_engine, model_options
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command, chosen_model, image_options, option
from fastvlm_mlx.errors import FastVLMError, ImageError, one_line
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM
from fastvlm_mlx.terminal.tty_state import KeptKeys, Signals

if TYPE_CHECKING:
    from fastvlm_mlx.terminal.attached import Attached, PictureForm
    from fastvlm_mlx.terminal.conversation import Conversation

log = logging.getLogger("fastvlm_mlx")

_NEEDED = ("prompt_toolkit", "rich")


@click.command("chat", cls=Command, short_help="Talk about pictures.")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@option(
    "Conversation",
    "--system",
    metavar="TEXT",
    help=f'The system turn; "" leaves it out.  [default: {DEFAULT_SYSTEM}]',
)
@option(
    "Conversation",
    "--session",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Go on with the conversation in FILE if it exists, and keep it there.",
)
@option(
    "Conversation",
    "--overflow",
    type=click.Choice(["refuse", "drop"]),
    default="refuse",
    show_default=True,
    help="When the context is full: refuse the question, or drop the oldest turns.",
)
@option(
    "Conversation",
    "--kv-bits",
    type=click.Choice(["8", "4"]),
    help="Pack the KV cache: less memory, answers may differ.",
)
@model_options
@image_options
@answer_options
@option("Terminal", "--no-preview", is_flag=True, help="Do not show pictures that are added.")
@option("Terminal", "--plain", is_flag=True, help="Lines only: no keys, no colours, no status.")
@click.pass_obj
def command(
    console: Console,
    images: tuple[str, ...],
    model: str | None,
    plain: bool,
    **given: Any,
) -> int:
    """Talk about pictures: the model loads while you type, and computes nothing twice.

    \b
    fastvlm chat photo.jpg
    fastvlm chat --session trip.chat --model apple/FastVLM-0.5B
    echo "What is this?" | fastvlm chat photo.jpg

    IMAGE is a file, an http(s) URL or a data: URI; it goes with the first question. More are added
    by dragging them onto the terminal or typing their paths. In the chat, /help lists the
    commands. Through a pipe, and with --plain, each line is a question or a command; a backslash at
    its end joins the next line to it. Answers go to standard output, everything else to standard
    error.
    """
    from fastvlm_mlx.terminal.attached import PictureForm

    interactive = not plain and _is_terminal()
    with ExitStack() as stack:
        if interactive:
            _require_extra()
            # From here on what is typed waits for the prompt: a picture may take seconds to fetch.
            keys = stack.enter_context(KeptKeys(sys.stdin, sys.stdout))
            stack.enter_context(Signals(_leave, keys, lambda: False))
        sampling = chosen_sampling(given)
        _check_session(given["session"])
        form = PictureForm(
            resolution=given["resolution"],
            image_mode=given["image_mode"],
            background=given["background"],
        )
        pictures = _read(images, form)
        name = chosen_model(model, console)
        run = _interactive if interactive else _plain
        return run(console, name, given | {"sampling": sampling}, form, pictures)


def _leave(number: int) -> NoReturn:
    """End by a signal, the terminal given back, while there is no chat yet."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _is_terminal() -> bool:
    terminals = sys.stdin.isatty() and sys.stdout.isatty()
    return terminals and os.environ.get("TERM", "dumb") != "dumb"


def _require_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise FastVLMError(
            f"the chat needs {' and '.join(missing)}: pip install 'fastvlm-mlx[chat]', "
            "or use --plain"
        )


def _check_session(file: Path | None) -> None:
    """Say now what would keep the conversation from being saved."""
    if file is None:
        return
    shown, folder = one_line(str(file)), file.expanduser().parent
    if not folder.is_dir():
        raise FastVLMError(f"{shown} cannot be written: there is no folder {file.parent}")
    if not os.access(folder, os.W_OK):
        raise FastVLMError(f"{shown} cannot be written: no permission to write in {file.parent}")


def _read(sources: Sequence[str], form: PictureForm) -> tuple[Attached, ...]:
    from fastvlm_mlx.terminal.attached import attach

    if "-" in sources:
        raise click.UsageError("standard input holds the questions: give the picture as a file")
    pictures = []
    for source in sources:
        try:
            pictures.append(attach(source, form))
        except ImageError as error:
            if " " in source.strip():
                raise ImageError(f"{error}; a question is typed in the chat") from error
            raise
    return tuple(pictures)


def _interactive(
    console: Console,
    name: str,
    given: dict[str, Any],
    form: PictureForm,
    pictures: tuple[Attached, ...],
) -> int:
    from fastvlm_mlx.terminal.app import App
    from fastvlm_mlx.terminal.history import history_path

    def run(chat: Conversation) -> int:
        # Lines of the log must not be written into the prompt.
        shown = _Shown(chat.news.say)
        before = log.handlers[:]
        log.handlers[:] = [shown]
        try:
            return App(chat, history_file=history_path(os.environ)).run(pictures)
        finally:
            log.handlers[:] = before

    console.close()
    return _chat(name, given, form, pictures, run)


def _plain(
    console: Console,
    name: str,
    given: dict[str, Any],
    form: PictureForm,
    pictures: tuple[Attached, ...],
) -> int:
    from fastvlm_mlx.terminal.plain import PlainChat

    if hasattr(sys.stdin, "reconfigure"):
        # What is no UTF-8 is refused as a question, in one line.
        sys.stdin.reconfigure(errors="surrogateescape")

    def run(chat: Conversation) -> int:
        return PlainChat(chat, say=console.line, calm=console.close).run(pictures)

    console.start(f"Loading {name}")
    return _chat(name, given, form, pictures, run, report=console.report)


def _chat(
    name: str,
    given: dict[str, Any],
    form: PictureForm,
    pictures: tuple[Attached, ...],
    run: Callable[[Conversation], int],
    *,
    report: Callable[[int, int, str], None] | None = None,
) -> int:
    """Start the model's thread, run the chat, and see that the process can end."""
    from fastvlm_mlx.terminal.conversation import Conversation
    from fastvlm_mlx.terminal.live_session import Opening
    from fastvlm_mlx.terminal.settings import Settings

    code = 1
    chat = Conversation(
        lambda say, progress: load_engine(name, given, say=say, progress=report or progress),
        name=_shown_name(name),
        settings=Settings(
            sampling=given["sampling"],
            max_tokens=given["max_tokens"],
            preview=not given["no_preview"],
            overflow=given["overflow"],
        ),
        form=form,
        opening=Opening(
            system=given["system"],
            kv_bits=int(given["kv_bits"]) if given["kv_bits"] else None,
            file=given["session"] and given["session"].expanduser(),
        ),
    )
    try:
        chat.add(pictures)
        code = run(chat)
    except FastVLMError:
        code = 2
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        if not _left(chat):
            # A thread inside MLX, or a download, would hold up or abort the interpreter's end.
            atexit.register(_end_now, chat, code)
    for note in chat.news.take():
        click.echo(f"fastvlm: {one_line(note)}", err=True)
    lost = chat.kept.by_itself and chat.kept.unsaved
    return 2 if lost and code == 0 else code


def _shown_name(model: str) -> str:
    """Return a folder's last name: the status line has no room for all of its path."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _left(chat: Conversation) -> bool:
    """Save and end the model's thread; return whether it has ended. Ctrl-C gives up waiting."""
    try:
        return chat.leave()
    except KeyboardInterrupt:
        return False


def _end_now(chat: Conversation, code: int) -> None:
    if chat.ended:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, or closed: we leave all the same
            stream.flush()
    os._exit(code)


class _Shown(logging.Handler):
    """Log records as lines that the chat shows where there is room for them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say_line = say

    def emit(self, record: logging.LogRecord) -> None:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._say_line(f"{kind}{one_line(record.getMessage())}")
