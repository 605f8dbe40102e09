"""Which module is packed how: recipes over groups of modules that run as one matrix product.

Knows canonical module paths, MLX's modes and the table of what `balanced` keeps wider. Knows no
arrays and no files. The tower has no group here, so it is always float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fastvlm_mlx.config import QUANT_MODES, QuantConfig
from fastvlm_mlx.errors import ConfigError

RecipeName = Literal["uniform", "balanced"]
Policy = Literal["float"] | int
"""What embeddings or projector become: "float", or so many bits."""
Layers = Literal["spread", "all"]

FEWEST_BITS = 2
"""MLX reads 1 bit too; a decoder packed so says nothing."""
DEFAULT_GROUP_SIZE = 64
"""Columns that share a scale in affine mode, as mlx-lm, mlx-vlm and Apple's app have them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How one module is packed. Raises ConfigError for what MLX has no kernel for."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        bits, group_sizes = QUANT_MODES.get(self.mode, ((), ()))
        if self.bits not in bits or self.group_size not in group_sizes:
            raise ConfigError(f"{self} cannot be packed: use {_what_works(self.mode)}")

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}, {self.mode}"


def _what_works(mode: str) -> str:
    """Say what a mode takes, or what every mode does if it is none."""

    def listed(numbers: tuple[int, ...]) -> str:
        return (
            ", ".join(map(str, numbers[:-1])) + (" or " if numbers[1:] else "") + str(numbers[-1])
        )

    return "; ".join(
        f"{name} with {listed(tuple(b for b in bits if b >= FEWEST_BITS))} bits "
        f"in groups of {listed(group_sizes)}"
        for name, (bits, group_sizes) in QUANT_MODES.items()
        if name == mode or mode not in QUANT_MODES
    )


# Module → group. The members of a group read the same input, may be fused into one product, and
# so get one setting.
_LAYER = r"decoder\.qwen2\.model\.layers\.(?P<layer>\d+)\."
_GROUPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), group)
    for pattern, group in (
        (_LAYER + r"self_attn\.[qkv]_proj", "self_attn.qkv"),
        (_LAYER + r"self_attn\.o_proj", "self_attn.o_proj"),
        (_LAYER + r"mlp\.(?:gate|up)_proj", "mlp.gate_up"),
        (_LAYER + r"mlp\.down_proj", "mlp.down_proj"),
        (r"decoder\.qwen2\.(?:model\.embed_tokens|lm_head)", "embeddings"),
        (r"projector\.linear_\d+", "projector"),
    )
)

# What `balanced` keeps wider: (group, in which layers). "spread" is the first and the last eighth
# of the layers (at least one each) and every third between. On the demo model the embeddings
# mattered most for their size, then these two groups at the ends (benchmarks/quantization.py).
BALANCED: tuple[tuple[str, Layers], ...] = (
    ("self_attn.qkv", "spread"),
    ("mlp.down_proj", "spread"),
    ("embeddings", "all"),
)
# How much wider: bits → affine bits, in every mode. Going to 8 from 3 or 4 bits gained little over
# these, as the narrow groups' error is what remains; mxfp8, the other modes' own wide one, was no
# closer than affine at 6 bits. Of 8 bits nothing is wider.
WIDER: dict[int, int] = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8}


def group_of(path: str) -> tuple[str, int | None] | None:
    """Return (group, layer or None) of a canonical module path; None if it is never packed."""
    for pattern, group in _GROUPS:
        found = pattern.fullmatch(path)
        if found is not None:
            layer = found.groupdict().get("layer")
            return group, None if layer is None else int(layer)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings by group: `narrow`, but `wide` where `wider` says so.

    `embeddings` (with the head) and `projector` have settings of their own; None stays float.
    """

    name: RecipeName
    num_layers: int
    narrow: Setting
    wide: Setting
    wider: tuple[tuple[str, Layers], ...]
    embeddings: Setting | None
    projector: Setting | None

    def setting(self, path: str) -> Setting | None:
        """Return how the module at this canonical path is packed, None if it stays float."""
        place = group_of(path)
        if place is None:
            return None
        group, layer = place
        if layer is None:
            return self.projector if group == "projector" else self.embeddings
        where = dict(self.wider).get(group)
        wide = where == "all" or (where == "spread" and self._is_spread(layer))
        return self.wide if wide else self.narrow

    def _is_spread(self, layer: int) -> bool:
        edge = max(1, self.num_layers // 8)
        at_edge = layer < edge or layer >= self.num_layers - edge
        return at_edge or (layer - edge) % 3 == 2


def make_recipe(
    name: RecipeName,
    *,
    bits: int,
    num_layers: int,
    mode: str = "affine",
    group_size: int | None = None,
    embeddings: Policy | None = None,
    projector: Policy | None = None,
) -> Recipe:
    """Build a recipe for a decoder of `num_layers`.

    `uniform` packs all of the decoder alike; `balanced` keeps what `BALANCED` lists wider.
    `group_size` is 64 by default in affine mode and the mode's own in others. `embeddings` (and
    the head) are as the recipe says by default, `projector` is float; a number of bits is packed
    in `mode` where that has it, else affine. Raises ConfigError for what cannot be packed.
    """
    if name not in get_args(RecipeName):
        raise ConfigError(f"unknown recipe {name!r}: use {' or '.join(get_args(RecipeName))}")
    if mode not in QUANT_MODES:
        raise ConfigError(f"unknown quantization mode {mode!r}: use {', '.join(QUANT_MODES)}")
    own = DEFAULT_GROUP_SIZE if mode == "affine" else QUANT_MODES[mode][1][0]
    if bits < FEWEST_BITS:
        raise ConfigError(f"{bits} bits leave nothing of a model: use {FEWEST_BITS} or more")
    narrow = Setting(bits, own if group_size is None else group_size, mode)
    wide = _affine(WIDER[bits], narrow) if bits in WIDER else narrow
    wider = BALANCED if name == "balanced" else ()
    return Recipe(
        name=name,
        num_layers=num_layers,
        narrow=narrow,
        wide=wide,
        wider=wider,
        embeddings=_policy(
            "embeddings", embeddings, narrow, wide if "embeddings" in dict(wider) else narrow
        ),
        projector=_policy("projector", projector, narrow, None),
    )


def _affine(bits: int, like: Setting) -> Setting:
    """Return an affine setting, its groups as wide as those of an affine `like`."""
    return Setting(bits, like.group_size if like.mode == "affine" else DEFAULT_GROUP_SIZE)


def _policy(
    what: str, policy: Policy | None, narrow: Setting, default: Setting | None
) -> Setting | None:
    if policy is None:
        return default
    if policy == "float":
        return None
    if isinstance(policy, str):
        raise ConfigError(f"{what}: {policy!r} is no number of bits: use one, or float")
    if policy < FEWEST_BITS:
        raise ConfigError(f"{what}: {policy} bits leave nothing: use {FEWEST_BITS} or more")
    try:
        if policy in QUANT_MODES[narrow.mode][0]:
            return Setting(policy, narrow.group_size, narrow.mode)
        return _affine(policy, narrow)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}; or float") from error


def plan_modules(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Setting], tuple[str, ...]]:
    """Apply a recipe to a model's parameters, given as path → shape (`Checkpoint.shapes`).

    Return the setting of every module to pack, and the paths of those that stay float because
    groups do not divide their input width. Both are sorted. Raises ConfigError if none is left.
    """
    settings: dict[str, Setting] = {}
    indivisible = []
    for name in sorted(shapes):
        path, _, leaf = name.rpartition(".")
        setting = recipe.setting(path) if leaf == "weight" else None
        if setting is None:
            continue
        if shapes[name][-1] % setting.group_size:
            indivisible.append(path)
        else:
            settings[path] = setting
    if not settings:
        raise ConfigError(
            f"nothing can be packed with {recipe.narrow}: no module's width is a multiple of it"
        )
    return settings, tuple(indivisible)


def quant_config(recipe: Recipe, settings: Mapping[str, Setting]) -> QuantConfig:
    """Return the config of modules so packed; only those that differ from most are named."""
    default = recipe.narrow
    return QuantConfig(
        bits=default.bits,
        group_size=default.group_size,
        mode=default.mode,
        overrides={
            path: (setting.bits, setting.group_size, setting.mode)
            for path, setting in sorted(settings.items())
            if setting != default
        },
    )
