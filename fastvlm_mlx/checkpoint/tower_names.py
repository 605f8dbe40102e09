"""What each source calls the vision tower's tensors, as tables: Apple's names and timm's.

A tensor's name is a module's path and a leaf. Both dialects have the same modules and almost the
same leaves, so each table is modules x leaves. Knows no whole checkpoint and loads nothing.

Sources: apple/ml-fastvlm `mci.py`, apple/ml-mobileclip `mobileone.py`; timm `fastvit.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Transform = Literal["", "OIHW"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """The end of a name: where it matches `pattern`, `target` replaces it, its groups filled in.

    The transform "OIHW" says that the source's convolution is PyTorch's [O,I,kh,kw].
    """

    pattern: re.Pattern[str]
    target: str
    transform: Transform = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """Names that begin with `pattern` and end with one of the leaves: `target`, then the leaf's."""

    pattern: re.Pattern[str]
    target: str
    leaves: tuple[Leaf, ...]


def _rules(prefix: str, modules: Iterable[tuple[str, str]], leaves: tuple[Leaf, ...]) -> list[Rule]:
    """Make the rule of every module: prefix + module + leaf → module + leaf."""
    return [Rule(re.compile(prefix + module), target, leaves) for module, target in modules]


def leaves(*table: tuple[str, str, Transform]) -> tuple[Leaf, ...]:
    """Make the leaves of rows (pattern, target, transform)."""
    return tuple(Leaf(re.compile(leaf), target, transform) for leaf, target, transform in table)


_BN = r"(?P<bn>weight|bias|running_mean|running_var)"


def _unit(fused: str, kxk: str, scale: str, skip: str, transform: Transform) -> tuple[Leaf, ...]:
    """Leaves of one convolution unit, each branch by its source's name for it."""
    return leaves(
        (rf"{fused}\.weight", "weight", transform),
        (rf"{fused}\.bias", "bias", ""),
        (rf"{kxk}\.conv\.weight", r"kxk.{n}.conv.weight", transform),
        (rf"{kxk}\.bn\.{_BN}", r"kxk.{n}.bn.{bn}", ""),
        (rf"{scale}\.conv\.weight", "scale.conv.weight", transform),
        (rf"{scale}\.bn\.{_BN}", r"scale.bn.{bn}", ""),
        (rf"{skip}\.{_BN}", r"skip.bn.{bn}", ""),
    )


def _large_kernel(fused: str, large: str, small: str, transform: Transform) -> tuple[Leaf, ...]:
    """Leaves of the large-kernel convolution: its 7x7 is the unit's branch 0, its 3x3 `scale`."""
    return leaves(
        (rf"{fused}\.weight", "weight", transform),
        (rf"{fused}\.bias", "bias", ""),
        (rf"{large}\.conv\.weight", "kxk.0.conv.weight", transform),
        (rf"{large}\.bn\.{_BN}", r"kxk.0.bn.{bn}", ""),
        (rf"{small}\.conv\.weight", "scale.conv.weight", transform),
        (rf"{small}\.bn\.{_BN}", r"scale.bn.{bn}", ""),
    )


def _block(ffn: str, skip: str, scale: str, transform: Transform) -> tuple[Leaf, ...]:
    """Leaves of a block beside its mixer's convolution units."""
    return leaves(
        (rf"token_mixer\.norm\.{skip}\.{_BN}", r"mixer_norm.skip.bn.{bn}", ""),
        (rf"token_mixer\.layer_scale{scale}", "mixer_scale", ""),
        (rf"layer_scale{scale}", "layer_scale", ""),
        (rf"layer_scale_(?P<n>[12]){scale}", r"layer_scale_{n}", ""),
        (r"norm\.(?P<leaf>weight|bias)", r"norm.{leaf}", ""),
        (r"token_mixer\.qkv\.weight", "qkv.weight", ""),
        (r"token_mixer\.proj\.(?P<leaf>weight|bias)", r"proj.{leaf}", ""),
        (rf"{ffn}\.conv\.conv\.weight", "ffn.conv.conv.weight", transform),
        (rf"{ffn}\.conv\.bn\.{_BN}", r"ffn.conv.bn.{bn}", ""),
        (rf"{ffn}\.fc(?P<n>[12])\.weight", r"ffn.fc{n}.weight", transform),
        (rf"{ffn}\.fc(?P<n>[12])\.bias", r"ffn.fc{n}.bias", ""),
    )


def apple_tower(prefix: str, stem: str, transform: Transform) -> list[Rule]:
    """Apple's names: stages, downsamplings and position encodings share one numbered `network`."""
    unit = _unit("reparam_conv", r"rbr_conv\.(?P<n>\d+)", r"rbr_scale", r"rbr_skip", transform)
    large = _large_kernel("lkb_reparam", "lkb_origin", "small_conv", transform)
    stages = list(enumerate((0, 2, 4, 7, 10)))
    downsamples = list(enumerate((1, 3, 5, 8), start=1))
    blocks = [
        (rf"network\.{i}\.(?P<j>\d+)\.", f"vision.stages.{s}.blocks.{{j}}.") for s, i in stages
    ]
    mixers = [(path + r"token_mixer\.(?:mixer\.)?", to + "mixer.") for path, to in blocks]
    return [
        *_rules(prefix, [(stem + r"(?P<i>[012])\.", r"vision.stem.{i}.")], unit),
        *_rules(prefix, blocks, _block("convffn", "rbr_skip", "", transform)),
        *_rules(prefix, mixers, unit),
        *_rules(
            prefix,
            [
                (rf"network\.{i}\.proj\.0\.", f"vision.stages.{s}.downsample.0.")
                for s, i in downsamples
            ],
            large,
        ),
        *_rules(
            prefix,
            [
                (rf"network\.{i}\.proj\.1\.", f"vision.stages.{s}.downsample.1.")
                for s, i in downsamples
            ],
            unit,
        ),
        *_rules(
            prefix,
            [
                (r"network\.6\.", "vision.stages.3.pos_emb."),
                (r"network\.9\.", "vision.stages.4.pos_emb."),
            ],
            _pos_emb("pe", transform),
        ),
        *_rules(prefix, [(r"conv_exp\.", "vision.expansion.conv.")], unit),
        *_rules(
            prefix,
            [(r"conv_exp\.se\.", "vision.expansion.se.")],
            _gates("reduce", "expand", transform),
        ),
    ]


def timm_tower(prefix: str) -> list[Rule]:
    """timm's `fastvit_mci3` names."""
    unit = _unit("reparam_conv", r"conv_kxk\.(?P<n>\d+)", r"conv_scale", r"identity", "OIHW")
    large = _large_kernel("reparam_conv", "large_conv", "small_conv", "OIHW")
    stage = r"stages\.(?P<s>[0-4])\."
    block = (stage + r"blocks\.(?P<j>\d+)\.", r"vision.stages.{s}.blocks.{j}.")
    mixer = (block[0] + r"token_mixer\.(?:mixer\.)?", block[1] + "mixer.")
    downsample = stage + r"downsample\.proj\."
    return [
        *_rules(prefix, [(r"stem\.(?P<i>[012])\.", r"vision.stem.{i}.")], unit),
        *_rules(prefix, [block], _block("mlp", "identity", r"\.gamma", "OIHW")),
        *_rules(prefix, [mixer], unit),
        *_rules(prefix, [(downsample + r"0\.", r"vision.stages.{s}.downsample.0.")], large),
        *_rules(prefix, [(downsample + r"1\.", r"vision.stages.{s}.downsample.1.")], unit),
        *_rules(
            prefix,
            [(stage + r"pos_emb\.", r"vision.stages.{s}.pos_emb.")],
            _pos_emb("pos_enc", "OIHW"),
        ),
        *_rules(prefix, [(r"final_conv\.", "vision.expansion.conv.")], unit),
        *_rules(
            prefix, [(r"final_conv\.se\.", "vision.expansion.se.")], _gates("fc1", "fc2", "OIHW")
        ),
    ]


def _pos_emb(encoding: str, transform: Transform) -> tuple[Leaf, ...]:
    return leaves(
        (r"reparam_conv\.weight", "weight", transform),
        (r"reparam_conv\.bias", "bias", ""),
        (rf"{encoding}\.weight", "encoding.weight", transform),
        (rf"{encoding}\.bias", "encoding.bias", ""),
    )


def _gates(reduce: str, expand: str, transform: Transform) -> tuple[Leaf, ...]:
    return leaves(
        (rf"{reduce}\.weight", "reduce.weight", transform),
        (rf"{reduce}\.bias", "reduce.bias", ""),
        (rf"{expand}\.weight", "expand.weight", transform),
        (rf"{expand}\.bias", "expand.bias", ""),
    )
