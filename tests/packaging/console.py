"""Runs the ```console blocks of a Markdown file and compares what they show with what happens.

A block holds commands (`$ command`, continued after a trailing backslash) and, under each, the
output as a terminal shows it: standard output and error together. The rules, all of them:

- a shown line `...` stands for any number of lines;
- numbers of time, speed and memory may differ: a number before ms, s, tok/s, tokens/s, B, kB, MB,
  GB, KiB, MiB or GiB (blanks that align it too), and the value of a JSON key that ends in _ms,
  _s, _tps or _bytes;
- blanks at the end of a line don't count;
- a command exits 0, or with the code its line names in a comment at its end: `# exits 2`.

Commands that need the network, a Mac or a hub name belong into ```sh blocks, which are not run.
Knows nothing of pytest or of what the commands do.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_UNITS = r"(?:ms|s|tok/s|tokens/s|B|kB|MB|GB|KiB|MiB|GiB)"
_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?"
_MEASURED = re.compile(rf"{_NUMBER}(?=\s?{_UNITS}(?![\w/]))")
_JSON_MEASURED = re.compile(rf'("\w+_(?:ms|s|tps|bytes)":\s*)(?:{_NUMBER}|null)')
_EXIT_CODE = re.compile(r"#\s*exits (\d+)\s*$")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a block, the lines shown under it, and the exit code it should end with."""

    text: str
    shown: tuple[str, ...]
    exit_code: int


def blocks(markdown: str, kind: str) -> list[str]:
    """The bodies of the fenced blocks whose info string begins with the word `kind`."""
    return [m["body"] for m in _BLOCK.finditer(markdown) if m["kind"] == kind]


def commands(block: str) -> list[Command]:
    """The commands of a console block; ValueError when it does not begin with one."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif not found:
            raise ValueError(f"a console block begins with '$ command', not {line!r}")
        elif found[-1][0].endswith("\\") and not found[-1][1]:
            text, shown = found.pop()
            found.append((f"{text}\n{line.removeprefix('> ')}", shown))
        else:
            found[-1][1].append(line)
    return [
        Command(text, tuple(shown), int(code[1]) if (code := _EXIT_CODE.search(text)) else 0)
        for text, shown in found
    ]


def run(command: Command, folder: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Output (both streams, in order) and exit code of `command` in `folder`, with no input."""
    done = subprocess.run(
        ["bash", "-c", command.text],
        cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.stdout, done.returncode


def matches(shown: tuple[str, ...], output: str) -> bool:
    """Whether `output` is what the lines `shown` promise, under the rules above."""
    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line.strip() == "..." else re.escape(_settle(line)) + r"\n"
        for line in shown
    )
    lines = "".join(f"{_settle(line)}\n" for line in output.splitlines())
    return re.fullmatch(pattern, lines) is not None


def _settle(line: str) -> str:
    """`line` with its measured numbers replaced and blanks at its end removed."""
    measured = _MEASURED.sub("#", _JSON_MEASURED.sub(r"\1#", line))
    return re.sub(r" +#", " #", measured).rstrip()
