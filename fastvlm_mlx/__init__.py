"""fastvlm-mlx: Apple's FastVLM on MLX.

Importing this package loads neither MLX nor a model: public names are found on first use.
OpenBLAS, where Linux has it, is made global before anything can import mlx.core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvlm_mlx import _blas

if TYPE_CHECKING:
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.engine import EncodedImage, Engine, load
    from fastvlm_mlx.errors import FastVLMError
    from fastvlm_mlx.events import Finished, Generation, Stats, TextDelta, TurnsDropped
    from fastvlm_mlx.generate.session import ChatSession, collect
    from fastvlm_mlx.sampling import Sampling

__version__ = "0.1.0"

_HOMES = {
    "ChatSession": "generate.session",
    "EncodedImage": "engine",
    "Engine": "engine",
    "FastVLMError": "errors",
    "Finished": "events",
    "Generation": "events",
    "ModelConfig": "config",
    "Sampling": "sampling",
    "Stats": "events",
    "TextDelta": "events",
    "TurnsDropped": "events",
    "collect": "generate.session",
    "load": "engine",
}

__all__ = [
    "ChatSession",
    "EncodedImage",
    "Engine",
    "FastVLMError",
    "Finished",
    "Generation",
    "ModelConfig",
    "Sampling",
    "Stats",
    "TextDelta",
    "TurnsDropped",
    "collect",
    "load",
]

_blas.preload()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] in ("engine", "generate.session"):
        # Before anything imports mlx.core, whose own ImportError says nothing of the fix.
        importlib.import_module(f"{__name__}.backend").require_backend()
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
