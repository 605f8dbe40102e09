"""The child of a cold start: the real `fastvlm generate`, with the times of what it passes.

Knows where the command imports, loads and answers, and takes `time.monotonic` there, which all
processes of a machine share. Imports nothing that the command would not, so that what is timed is
the command; changes nothing of what it does. Run by `cold.py`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ENGINE = "fastvlm_mlx.engine"
FIRST_TOKEN = "first token"
"""What the command logs when it has one."""

_passed: dict[str, float] = {}


def main(python_up: float, arguments: Sequence[str]) -> int:
    """Run the command line; print a JSON object of times as the last line. Returns its exit code.

    `python_up` is when the interpreter came to its first line.
    """
    _passed["python_up"] = python_up
    sys.meta_path.insert(0, _Watcher())
    log = logging.getLogger("fastvlm_mlx")
    log.addHandler(_Listener())
    log.setLevel(logging.INFO)
    from fastvlm_mlx.cli.main import main as fastvlm

    _passed["command_imported"] = time.monotonic()
    code = fastvlm(arguments)
    print("\n" + json.dumps(_passed), flush=True)
    return code


class _Listener(logging.Handler):
    """Takes the time of the first token."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == FIRST_TOKEN:
            _passed["first_token"] = time.monotonic()


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for the engine to be imported, whenever the command does that, and times its loading.

    Importing it here would take from the command what it does meanwhile: decode pictures.
    """

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _time(module, "load_model")
            _passed["engine_imported"] = time.monotonic()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _time(module: ModuleType, function: str) -> None:
    """Have a module's function leave the times it began and ended."""
    real = getattr(module, function)

    def timed(*given: Any, **options: Any) -> Any:
        _passed[f"{function}_began"] = time.monotonic()
        found = real(*given, **options)
        _passed[f"{function}_ended"] = time.monotonic()
        return found

    setattr(module, function, timed)
