"""Which kernel MLX's Metal backend convolves two dimensions with (`dispatch_conv_2D_gpu`).

The conditions are those of the release, read in the machine code of mlx-metal 0.32.4 (libmlx.dylib
of the macOS 26 wheel), where they differ from the sources at hand: the depthwise kernel wants
channels in eights, not sixteens, and no whole tiles. An ungrouped convolution of at least 9 taps
whose input channels do not fit may be padded there first; it is called general here all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FAST = ("depthwise", "winograd", "implicit_gemm")

# Kernels each family launches; Winograd transforms weights and input, multiplies, transforms back.
_LAUNCHES: dict[str, tuple[str, ...]] = {
    "depthwise": ("depthwise_conv_2d",),
    "winograd": (
        "winograd_conv_2d_weight_transform",
        "winograd_conv_2d_input_transform",
        "steel_gemm (winograd)",
        "winograd_conv_2d_output_transform",
    ),
    "implicit_gemm": ("implicit_gemm_conv_2d",),
    "implicit_gemm_grouped": ("implicit_gemm_conv_2d",),
    "implicit_gemm_general": ("implicit_gemm_conv_2d_general",),
    "explicit_gemm": ("naive_unfold_nd", "steel_gemm (unfolded)"),
    "explicit_gemm_grouped": (
        "naive_unfold_transpose_nd",
        "copy (weight)",
        "steel_gemm_conv_groups",
    ),
}

_SLOW = {
    "implicit_gemm_grouped": "a grouped convolution that misses the depthwise kernel",
    "implicit_gemm_general": "the general implicit GEMM, whose channels do not fit its tiles",
    "explicit_gemm": "unfolds its input into memory first",
    "explicit_gemm_grouped": "unfolds its input into memory first, group by group",
}


def family(
    image: Sequence[int], weight: Sequence[int], output: Sequence[int], arguments: Sequence[Any]
) -> str:
    """Name the family; shapes NHWC and O,kh,kw,C/groups, `arguments` those of MLX's primitive."""
    (_, height, width, inputs), (outputs, kh, kw, _) = image, weight
    out_height, out_width = output[1:3]
    strides, _, _, dilation, input_dilation, groups, flip = arguments
    plain = all(d == 1 for d in dilation) and all(d == 1 for d in input_dilation)
    if groups > 1:
        per_in, per_out = inputs // groups, outputs // groups
        small = max(kh, kw) <= 7 and max(strides) <= 2
        if per_in == per_out == 1 and plain and small and inputs % 8 == 0:
            return "depthwise"
        if (_narrow(per_in, 4) or per_in == 8) and _narrow(per_out, 16):
            return "implicit_gemm_grouped"
        return "explicit_gemm_grouped"
    wide = inputs % 32 == 0 and outputs % 32 == 0 and inputs + outputs >= 256
    large = image[0] * height * width >= 4096
    if plain and not flip and kh == kw == 3 and max(strides) == 1 and wide and large:
        return "winograd"
    if _narrow(inputs, 4) and _narrow(outputs, 16):
        return "implicit_gemm"
    whole = inputs % 16 == 0 and outputs % 16 == 0
    if whole or output[0] * out_height * out_width >= 256:
        return "implicit_gemm_general"
    return "explicit_gemm"


def launches(name: str) -> tuple[str, ...]:
    """Return the kernels a family launches, in order."""
    return _LAUNCHES[name]


def slow_reason(name: str, weight: Sequence[int]) -> str:
    """Say why a convolution is on a slow path, or return nothing.

    A 1x1 is one: no convolution has a bias epilogue or uses the matrix units of an M5.
    """
    if name in _SLOW:
        return _SLOW[name]
    return (
        "a 1x1 convolution, which a GEMM with its bias inside would do"
        if (weight[1] == weight[2] == 1)
        else ""
    )


def _narrow(channels: int, most: int) -> bool:
    return channels <= most or channels % 16 == 0
