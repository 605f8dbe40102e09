"""The parent's side of a comparison: starts a runtime's process, asks it, ends it in any case.

Knows pipes, patience and how a Python that has never heard of this package runs one file of it.
Knows no runtime and no figures: requests and replies are `worker.py`'s.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fastvlm_mlx
from fastvlm_mlx.errors import FastVLMError, one_line

PATIENCE_S = 1800.0
"""How long one request may take: a 7B answer on a CPU does."""
_FAREWELL_S = 10.0

# Makes this package importable under its name from its own folder alone: not its neighbours, which
# may be another environment's. Importing it preloads OpenBLAS, before any runtime's mlx.core.
_BOOT = """
import importlib.util, runpy, sys
_, package, file = sys.argv
spec = importlib.util.spec_from_file_location(
    "fastvlm_mlx", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["fastvlm_mlx"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import fastvlm_mlx.bench.worker
runpy.run_path(file, run_name="__main__")
"""


class PeerProcess:
    """A child that runs `file` under `python`, answering one request at a time.

    A context manager: at its end no process is left. `spawned_s` is `time.monotonic` just before
    the child was started.
    """

    def __init__(self, name: str, file: Path, *, python: Path | None = None) -> None:
        """Start it. Raises FastVLMError if `python` cannot be run."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        interpreter = str(python or sys.executable)
        package = str(Path(fastvlm_mlx.__file__).parent)
        self.spawned_s = time.monotonic()
        try:
            self.process = subprocess.Popen(
                [interpreter, "-P", "-c", _BOOT, package, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=None if python is None else _foreign_environment(),
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._stderr.close()
            raise FastVLMError(f"cannot run {interpreter}: {error.strerror}") from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, do: str, *, patience_s: float = PATIENCE_S, **values: Any) -> dict[str, Any]:
        """Return the reply to one request.

        Raises FastVLMError, one line, if the runtime fails, dies or takes longer than `patience_s`;
        in the last two cases its process is gone afterwards.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise FastVLMError(self._how_it_ended(do)) from None
        try:
            line = self._lines.get(timeout=patience_s)
        except queue.Empty:
            self.kill()
            raise FastVLMError(f"{self.name} did not {do} within {patience_s:g} s") from None
        if line is None:
            raise FastVLMError(self._how_it_ended(do))
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise FastVLMError(one_line(f"{self.name} cannot {do}: {reply['error']}"))
        done: dict[str, Any] = reply["done"]
        return done

    def close(self) -> None:
        """Ask it to quit, wait for that a little, then kill it. Safe to call twice."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write('{"do": "quit"}\n')
            self.process.stdin.close()
            self.process.wait(_FAREWELL_S)
        except (BrokenPipeError, ValueError, subprocess.TimeoutExpired):
            pass  # it is killed below
        self.kill()

    def kill(self) -> None:
        """End it now, and leave neither process, thread nor open file. Safe to call twice."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass  # what was still to be sent has no reader
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self, do: str) -> str:
        """Return one line about a child that is gone, and leave nothing of it."""
        try:
            code = self.process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            code = None
        how = "closed its output" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        said = self._last_words()
        self.kill()
        return one_line(f"{self.name} {how} when it was to {do}{f': {said}' if said else ''}")

    def _last_words(self) -> str:
        """Return the last line it wrote to standard error, "" if none or if it was read before."""
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")


def _foreign_environment() -> dict[str, str]:
    """Return our environment less what would lead another Python to our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in ours}
