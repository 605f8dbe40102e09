"""The command line of a measurement: help as it was written, a mistake told in one line, exit 2.

Knows how numbers are typed; knows nothing of what they are for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from fastvlm_mlx.config import VisionConfig

LARGEST_SIDE = 4096  # pixels, as `fastvlm generate --resolution` has it


class Arguments(argparse.ArgumentParser):
    """A parser of `python -m MODULE` whose help keeps the lines of `about`, the module's text."""

    def __init__(self, module: str, about: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m {module}", description=about, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line, without the usage: `--help` tells that."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """Return a whole number above zero. Raises argparse's error, one line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)


def side(text: str) -> int:
    """Return pixels a side on the tower's grid. Raises argparse's error, one line."""
    step = VisionConfig().stride
    pixels = positive(text)
    if pixels % step or pixels > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{pixels} is no multiple of {step} up to {LARGEST_SIDE}")
    return pixels


def several(one: Callable[[str], int]) -> Callable[[str], list[int]]:
    """Return what reads numbers with commas between them: ascending, each once."""

    def read(text: str) -> list[int]:
        return sorted({one(part.strip()) for part in text.split(",")})

    return read
