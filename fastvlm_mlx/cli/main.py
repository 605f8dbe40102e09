"""The `fastvlm` command: which subcommands there are, and how every error ends.

A subcommand is `fastvlm_mlx.cli.NAME.command`, imported on use; its module imports what is heavy
inside its functions, so `--help` stays quick. Knows exit codes (0, 2 for a user's mistake, 130
for Ctrl-C, 1 for a bug of ours and for a check that fails) and nothing of models.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.artifacts import TYPED
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import verbose_option
from fastvlm_mlx.errors import FastVLMError, one_line

_COMMANDS = (
    "generate",
    "chat",
    "preview",
    "bench",
    "inspect",
    "convert",
    "quantize",
    "export-app",
    "verify",
)

log = logging.getLogger("fastvlm_mlx")


class _Commands(click.Group):
    """Subcommands by the name of their module; `meta` keeps the command line as typed."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        typed = shlex.join([info_name or "fastvlm", *args])
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[TYPED] = typed
        return context

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's name)
        return list(_COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's name)
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = cmd_name.replace("-", "_")
        command: click.Command = importlib.import_module(f"fastvlm_mlx.cli.{module}").command
        return command


@click.group(
    "fastvlm",
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
@click.version_option(__version__, prog_name="fastvlm", message="%(prog)s %(version)s")
@verbose_option()
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Ask Apple's FastVLM about pictures, with MLX.

    \b
    fastvlm generate photo.jpg -p "What is this?" --model apple/FastVLM-0.5B
    """
    console = Console(sys.stderr)
    ctx.obj = console
    handler = _Lines(console)
    log.addHandler(handler)

    def undo() -> None:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        console.close()

    ctx.call_on_close(undo)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _Lines(logging.Handler):
    """Log records as one line each: `fastvlm: warning: …`."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._console.line(f"fastvlm: {kind}{one_line(record.getMessage())}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` default to sys.argv's."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer may hold what the terminal's encoding lacks: "?" rather than a crash.
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(words, prog_name="fastvlm", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.ClickException as error:
        return _fail(_click_line(error, words))
    except FastVLMError as error:
        return _fail(str(error))
    except ImportError as error:
        return _fail_import(error, words)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _fail("the answer cannot be written: no space left on the device")
        return _fail_bug(error, words)
    return code if isinstance(code, int) else 0


def _open_closed_streams() -> None:
    """Read nothing from, and write nowhere to, what the caller closed (`<&-`, `>&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (until the end)
            setattr(sys, name, stream)


def _fail_import(error: ImportError, words: Sequence[str]) -> int:
    """Say what MLX lacks, if that is why a module could not be imported."""
    from fastvlm_mlx.backend import require_backend

    try:
        require_backend()
    except FastVLMError as cause:
        return _fail(str(cause))
    return _fail_bug(error, words)


def _fail_bug(error: Exception, words: Sequence[str]) -> int:
    if "-v" in words or "--verbose" in words:
        traceback.print_exc()
    why = f"{type(error).__name__}: {error}"
    return _fail(f"a bug in fastvlm, please report it with what -v says: {why}", code=1)


def _fail(message: str, *, code: int = 2) -> int:
    click.echo(f"fastvlm: error: {one_line(message)}", err=True)
    return code


def _click_line(error: click.ClickException, words: Sequence[str]) -> str:
    """Return click's message as one of ours, and where the help is."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if not isinstance(error, click.UsageError):
        return message
    # An option that lacks its value is found too early for a context.
    command = next((f"fastvlm {word}" for word in words if word in _COMMANDS), "fastvlm")
    return f"{message} (see {error.ctx.command_path if error.ctx else command} --help)"
