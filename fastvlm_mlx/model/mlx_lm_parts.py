"""The only importer of mlx-lm: Qwen2, KV caches and samplers, without its package `__init__`.

Knows where mlx-lm lives and which of its names we use. Refuses to know anything about FastVLM.

`import mlx_lm` (or any submodule of it) runs the package's `__init__`, which imports
transformers: 0.8 s, 2.4 s where torch is installed. The three modules we need import nothing but
mlx and, relatively, each other. So they are loaded as children of a bare package of our own that
has mlx-lm's folder as its `__path__`. The name `mlx_lm` in sys.modules is never touched: a real
`import mlx_lm`, before or after or in another thread meanwhile, is not affected. The price is
that the classes here are twins of mlx_lm's, not the same objects.

Fallback: where that layout is absent (mlx-lm is no folder, or a module moved), the plain import
is used, and its own error is the one shown.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import BackendError

if TYPE_CHECKING:
    from mlx_lm.models.activations import swiglu
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.base import scaled_dot_product_attention as attend
    from mlx_lm.models.cache import KVCache, QuantizedKVCache
    from mlx_lm.models.qwen2 import Model, ModelArgs
    from mlx_lm.sample_utils import (
        apply_min_p,
        apply_top_k,
        apply_top_p,
        make_logits_processors,
    )

__all__ = [
    "KVCache",
    "Model",
    "ModelArgs",
    "QuantizedKVCache",
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "attend",
    "create_attention_mask",
    "make_logits_processors",
    "swiglu",
]

_MODULES = ("models.qwen2", "models.cache", "sample_utils")
_PRIVATE = f"{__package__}._mlx_lm"


def load_modules(private: str = _PRIVATE) -> tuple[ModuleType, ...]:
    """Return mlx-lm's qwen2, cache and sample_utils modules, loaded below the package `private`.

    Raises BackendError if mlx-lm is not installed. Thread safety: this runs while our own module
    is being imported, under Python's lock for it.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None:
        raise BackendError("mlx-lm is not installed: pip install mlx-lm")
    if spec.submodule_search_locations is None:
        return _plain_import()
    bare = ModuleType(private, "mlx-lm's modules, without the package's __init__.")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[private] = bare
    try:
        return tuple(importlib.import_module(f"{private}.{name}") for name in _MODULES)
    except ModuleNotFoundError:
        for name in [n for n in sys.modules if n == private or n.startswith(f"{private}.")]:
            del sys.modules[name]
        return _plain_import()


def _plain_import() -> tuple[ModuleType, ...]:
    return tuple(importlib.import_module(f"mlx_lm.{name}") for name in _MODULES)


if not TYPE_CHECKING:
    _qwen2, _cache, _sample_utils = load_modules()
    Model, ModelArgs = _qwen2.Model, _qwen2.ModelArgs
    # Taken from where Qwen2 itself takes them: the same objects, whichever way it was loaded.
    attend, swiglu = _qwen2.scaled_dot_product_attention, _qwen2.swiglu
    create_attention_mask = _qwen2.create_attention_mask
    KVCache, QuantizedKVCache = _cache.KVCache, _cache.QuantizedKVCache
    apply_min_p, apply_top_k = _sample_utils.apply_min_p, _sample_utils.apply_top_k
    apply_top_p = _sample_utils.apply_top_p
    make_logits_processors = _sample_utils.make_logits_processors
