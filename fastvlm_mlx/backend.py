"""MLX's backend and device: is exactly one backend installed, and which device to use.

Knows how MLX is packaged (on Linux the backend is a distribution of its own, and two of them
overwrite each other's `libmlx.so`) and why compilation is off on a CPU. Knows nothing of models.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import BackendError, FastVLMError

if TYPE_CHECKING:
    import mlx.core as mx

BACKENDS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
"""MLX's Linux backends as distributions, with the extra of ours that installs each."""
DTYPES = ("float32", "bfloat16", "float16")
"""What can be computed in, by name."""

_compile_disabled_here = False


def require_backend() -> None:
    """Check that MLX can be imported and has exactly one backend; imports `mlx.core`.

    Raises:
        BackendError: no backend or several are installed, or MLX does not load.
    """
    versions = _installed_backends() if sys.platform == "linux" else {}
    if len(versions) > 1:
        # The GPU one is the likelier wish: it is never installed by default.
        wanted = max(versions)
        raise BackendError(
            f"{' and '.join(versions)} are installed together and overwrite each other; run: "
            f"pip uninstall -y {' '.join(versions)} && pip install {_extra(wanted)}"
        )
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendError(_why_no_mlx(versions, error)) from error


def select_device(name: str | None = None) -> mx.Device:
    """Make `name` ("cpu", "gpu", or None for MLX's own choice) the default device; return it.

    On a CPU, `mx.compile` is switched off for the process: there it calls `g++` at run time, which
    a user's machine may lack, and the loops it makes are not vectorised, so they are slower than
    MLX's own. Selecting a GPU later switches it on again, unless MLX_DISABLE_COMPILE is set.

    Raises:
        BackendError: unknown name, no GPU in this machine or this MLX, or no working MLX.
    """
    global _compile_disabled_here
    require_backend()
    import mlx.core as mx

    if name not in (None, "cpu", "gpu"):
        raise BackendError(f"unknown device {name!r}: use cpu or gpu")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError(f"no GPU is usable here: {_gpu_advice()}, or use --device cpu")
    if name is not None:
        mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
    device = mx.default_device()
    if device.type == mx.DeviceType.cpu:
        mx.disable_compile()
        _compile_disabled_here = "MLX_DISABLE_COMPILE" not in os.environ
    elif _compile_disabled_here:
        mx.enable_compile()
        _compile_disabled_here = False
    return device


def has_scalar_cpu() -> bool:
    """Whether MLX's own loops are scalar on this machine's CPU: it has no SIMD for x86-64.

    Source: mlx/backend/cpu/simd, which has NEON and Accelerate.
    """
    return sys.platform == "linux" and os.uname().machine == "x86_64"


def compute_dtype(name: str | None, device: mx.Device) -> mx.Dtype:
    """Return one of DTYPES by `name`; by default bfloat16, on a CPU float32.

    A CPU's half-precision matrix products are slow. Raises FastVLMError for another name.
    """
    import mlx.core as mx

    if name not in (None, *DTYPES):
        raise FastVLMError(f"unknown dtype {name!r}: use {', '.join(DTYPES)}")
    default = "float32" if device.type == mx.DeviceType.cpu else "bfloat16"
    dtype: mx.Dtype = getattr(mx, name or default)
    return dtype


def _installed_backends() -> dict[str, str]:
    """The installed backend distributions and their versions, read off their folders' names.

    importlib.metadata would say the same, for 10 ms of imports in every start.
    """
    versions: dict[str, str] = {}
    for folder in reversed(sys.path):
        try:
            entries = os.listdir(folder or ".")  # noqa: PTH208 (names alone, some hundreds)
        except OSError:  # what is on sys.path need not exist, nor be a folder
            continue
        for entry in entries:
            name, dash, version = entry.removesuffix(".dist-info").partition("-")
            if dash and entry.endswith(".dist-info") and name.replace("_", "-") in BACKENDS:
                versions[name.replace("_", "-")] = version
    return {name: versions[name] for name in BACKENDS if name in versions}


def _why_no_mlx(versions: dict[str, str], error: ImportError) -> str:
    """One line for a failed `import mlx.core`; `versions` holds the installed backend, if any."""
    from importlib import metadata

    try:
        mlx = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        return f"MLX is not installed; run: pip install {_extra('mlx-cpu')}{_or_cuda()}"
    if sys.platform == "linux" and not versions:
        return (
            f"MLX has no backend: mlx {mlx} on Linux needs one; "
            f"run: pip install {_extra('mlx-cpu')}{_or_cuda()}"
        )
    for name, version in versions.items():
        if version != mlx:  # `pip install -U mlx` alone leaves the backend behind
            return f"mlx {mlx} and {name} {version} do not match; run: pip install {name}=={mlx}"
    reason = f"MLX {mlx} does not load ({str(error).splitlines()[0]})"
    cuda = next((name for name in versions if name != "mlx-cpu"), None)
    if cuda is not None:
        return (
            f"{reason}; check the NVIDIA driver, or go without the GPU: "
            f"pip uninstall -y {cuda} && pip install {_extra('mlx-cpu')}"
        )
    return f"{reason}; run: pip install --force-reinstall {' '.join(['mlx', *versions])}"


def _extra(backend: str) -> str:
    """What to give pip for `backend`; macOS needs no extra."""
    if sys.platform != "linux":
        return "fastvlm-mlx"
    return f"'fastvlm-mlx[{BACKENDS[backend]}]'"


def _or_cuda() -> str:
    return " (or [cuda12], [cuda13] for an NVIDIA GPU)" if sys.platform == "linux" else ""


def _gpu_advice() -> str:
    if sys.platform == "linux":
        return "it takes an NVIDIA GPU and 'fastvlm-mlx[cuda12]' in place of [cpu]"
    return "it takes Apple silicon"
