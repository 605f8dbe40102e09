"""Which Metal kernels MLX launches for a traced graph: the rules, each with where it was read.

Knows facts of MLX's Metal backend and nothing of any model. Nothing here runs on a GPU, and no
rule says how long a kernel takes.

Two commits are named because no single one could be read whole. `MLX_COMMIT` is the nearest to the
release that was read for the convolutions (its line numbers are in the repository's history);
`SOURCES` names for each rule the file and the commit whose text was read. Forks are named where
upstream's own file of that age was not at hand; what a fork changed of its own is left out. What
decides most was also read in the machine code of the release, mlx-metal 0.32.4 for macOS 26, where
`SOURCES` says so; the other rules were not.
"""

from __future__ import annotations

from importlib.metadata import version

MLX_VERSION = "0.32"
MLX_COMMIT = "846d1762"

_UPSTREAM = "ml-explore/mlx"
SOURCES: dict[str, str] = {
    "convolution": f"mlx/backend/metal/conv.cpp @ 853e5479 and {MLX_COMMIT} ({_UPSTREAM}); "
    "dispatch_conv_2D_gpu in the machine code of 0.32.4",
    "gemm": "mlx/backend/metal/matmul.cpp @ ce23fd13 (osaurus-ai/mlx), 0dfe6cbd (sawfwair/mlx); "
    "check_transpose, split-K and thin NAX (steel_matmul_axpby) in the machine code of 0.32.4",
    "quantized": "mlx/backend/metal/quantized.cpp @ 0b9bdfb5 (osaurus-ai/mlx), 04099640 "
    f"({_UPSTREAM}); use_qmv_wide as quoted from v0.32.0; qmm_splitk in 0.32.4's "
    "machine code",
    "attention": f"mlx/backend/metal/scaled_dot_product_attention.cpp @ 00703ea6 ({_UPSTREAM}); "
    "head widths and thresholds of the two passes in 0.32.4's binary",
    "attention, unfused": f"mlx/fast.cpp:725-785 @ {MLX_COMMIT} ({_UPSTREAM})",
    "norms": f"mlx/backend/metal/normalization.cpp @ 0017d3c3 ({_UPSTREAM})",
    "rope": f"mlx/backend/metal/rope.cpp @ 1163da19 ({_UPSTREAM})",
    "softmax": f"mlx/backend/metal/softmax.cpp @ 0189ab6a ({_UPSTREAM})",
    "reduction": f"mlx/backend/metal/reduce.cpp, stored after 00769c30 ({_UPSTREAM})",
    "copies": "mlx/backend/gpu/primitives.cpp @ 00d6024e, mlx/backend/gpu/slicing.cpp @ 12928d8b "
    f"({_UPSTREAM})",
    "strides": f"mlx/backend/common/utils.cpp @ 0b37b0c7 ({_UPSTREAM}); tests compare with MLX",
    "fusion": "the installed MLX itself: its own compiled graph is counted",
}


class UnknownRule(Exception):
    """A graph has an operation, or a form of one, that no rule here covers."""


def check_version(installed: str | None = None) -> None:
    """Raise UnknownRule unless mlx, as installed, is of the minor version whose rules these are."""
    installed = installed or version("mlx")
    if installed.split(".")[:2] != MLX_VERSION.split("."):
        files = "; ".join(sorted(set(SOURCES.values())))
        raise UnknownRule(
            f"mlx {installed} is not the {MLX_VERSION} whose Metal rules are replayed: re-read the "
            f"rules in {files}, then raise MLX_VERSION in benchmarks/metal_rules/__init__.py"
        )
