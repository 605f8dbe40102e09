"""What every test starts from: no settings of the developer's, MLX as the engine sets it up."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads these once: a test must neither use nor fill
# the developer's cache, nor depend on their login.
for name in ("FASTVLM_MODEL", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
_hub = tempfile.TemporaryDirectory(prefix="fastvlm-test-hub-")
os.environ["HF_HOME"] = _hub.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

# A shell's job in the background ignores Ctrl-C, and so would every child that a test interrupts:
# three tests waited for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """The engine's CPU policy for tests that call the model directly: no compiler is ever run."""
    import fastvlm_mlx  # noqa: F401 (before mlx.core, so that OpenBLAS takes the slow BLAS's place)

    if sys.platform == "linux" and shutil.which("g++") is None:
        _let_mlx_trace_compiled_functions()
    from fastvlm_mlx.backend import select_device

    select_device()


def _let_mlx_trace_compiled_functions() -> None:
    """Answer MLX's question, asked once a process, whether this machine has a g++ with yes.

    Without one it does not even trace `mx.compile` on a CPU, and tests could not count in the graph
    what a GPU runs. The answer is all there is: what tried to run such a graph would raise.
    """
    import mlx.core as mx

    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "g++"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
        compiler.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
        try:
            mx.compile(lambda x: x + x)(mx.zeros(1))
        finally:
            os.environ["PATH"] = path
