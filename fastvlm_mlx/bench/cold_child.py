"""The child of a cold start: what takes the times of the real `fastvlm generate`.

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
from types import ModuleType
from typing import Any

ENGINE = "fastvlm_mlx.engine"
FIRST_TOKEN = "first token"
"""What the command logs when it has one."""

_passed: dict[str, float] = {}


def watch(python_up: float) -> None:
    """Begin to take times; `python_up` is when the interpreter came to its first line."""
    _passed["python_up"] = python_up
    sys.meta_path.insert(0, _Watcher())
    log = logging.getLogger("fastvlm_mlx")
    log.addHandler(_Listener())
    log.setLevel(logging.INFO)


def passed(what: str) -> None:
    """Take the time of something."""
    _passed[what] = time.monotonic()


def report() -> None:
    """Print a JSON object of times, in seconds, as the last line."""
    print("\n" + json.dumps(_passed), flush=True)


class _Listener(logging.Handler):
    """Takes the time of the first token."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == FIRST_TOKEN:
            passed("first_token")


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
            passed("engine_imported")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _time(module: ModuleType, function: str) -> None:
    """Have a module's function leave the times it began and ended."""
    real = getattr(module, function)

    def timed(*given: Any, **options: Any) -> Any:
        passed(f"{function}_began")
        found = real(*given, **options)
        passed(f"{function}_ended")
        return found

    setattr(module, function, timed)
