"""What every test starts from: no settings of the developer's, MLX as the engine sets it up."""

from __future__ import annotations

import os
import tempfile

import pytest

# Before anything imports huggingface_hub, which reads these once: a test must neither use nor fill
# the developer's cache, nor depend on their login.
for name in ("FASTVLM_MODEL", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
_hub = tempfile.TemporaryDirectory(prefix="fastvlm-test-hub-")
os.environ["HF_HOME"] = _hub.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"


def pytest_sessionstart(session: pytest.Session) -> None:
    """The engine's CPU policy for tests that call the model directly: no compiler is ever run."""
    from fastvlm_mlx.backend import select_device

    select_device()
