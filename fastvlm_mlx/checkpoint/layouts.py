"""One table for each source layout: how it is recognised, what each tensor is called here.

Canonical names are paths in `model/fastvlm.py`'s tree for projector and decoder, and the names
`fuse.py` reads for the tower (which is folded before it fits that tree). A layout is recognised by
key names alone, never by a value, a shape or a folder's name. Knows no files and loads nothing.

Sources: apple/ml-fastvlm `mci.py` and `llava_qwen.py`; timm `fastvit.py`; transformers
`fast_vlm`; mlx-vlm `models/fastvlm`; Apple's app (`app/FastVLM`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from fastvlm_mlx.errors import CheckpointMismatch

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


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """A source layout: `matches` are key patterns of which each must fit at least one tensor."""

    name: str
    description: str
    matches: tuple[re.Pattern[str], ...]
    rules: tuple[Rule, ...]
    drop: tuple[re.Pattern[str], ...]
    has_tower: bool = True

    def rename(self, name: str) -> tuple[str, Transform] | None:
        """Return (canonical name, transform); None if the tensor is known and not needed.

        Raises KeyError for a name that no rule covers.
        """
        for rule in self.rules:
            module = rule.pattern.match(name)
            if module is None:
                continue
            rest = name[module.end() :]
            for leaf in rule.leaves:
                found = leaf.pattern.fullmatch(rest)
                if found is not None:
                    path = rule.target.format_map(module.groupdict())
                    return path + leaf.target.format_map(found.groupdict()), leaf.transform
        if any(pattern.fullmatch(name) for pattern in self.drop):
            return None
        raise KeyError(name)

    def rename_all(self, names: Iterable[str]) -> dict[str, tuple[str, Transform]]:
        """Return canonical name → (source name, transform) for every needed tensor.

        Raises CheckpointMismatch naming the first few tensors that no rule covers, or that two
        names give the same canonical one.
        """
        renamed: dict[str, tuple[str, Transform]] = {}
        unmapped = []
        for name in sorted(names):
            try:
                target = self.rename(name)
            except KeyError:
                unmapped.append(name)
                continue
            if target is None:
                continue
            if target[0] in renamed:
                raise CheckpointMismatch(
                    f"{self.name}: {renamed[target[0]][0]} and {name} are the same weight twice"
                )
            renamed[target[0]] = (name, target[1])
        if unmapped:
            raise CheckpointMismatch(
                f"{self.name}: {len(unmapped)} tensors are no part of this layout: "
                f"{first_few(unmapped)}"
            )
        return renamed


def first_few(names: Collection[str], count: int = 3) -> str:
    """Join the first names for an error line, and say how many more there are."""
    shown = sorted(names)[:count]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def recognise(names: Collection[str]) -> WeightLayout:
    """Return the one layout whose key patterns the tensor names fit. Raises CheckpointMismatch."""
    fitting = [
        layout
        for layout in LAYOUTS
        if all(any(p.fullmatch(name) for name in names) for p in layout.matches)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        both = " and ".join(layout.name for layout in fitting)
        raise CheckpointMismatch(f"tensors of two layouts in one folder: {both}")
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointMismatch(
        f"no FastVLM checkpoint: its tensors ({first_few(names)}) fit none of {known}"
    )


def _rules(prefix: str, modules: Iterable[tuple[str, str]], leaves: tuple[Leaf, ...]) -> list[Rule]:
    """Make the rule of every module: prefix + module + leaf → module + leaf."""
    return [Rule(re.compile(prefix + module), target, leaves) for module, target in modules]


def _leaves(*table: tuple[str, str, Transform]) -> tuple[Leaf, ...]:
    return tuple(Leaf(re.compile(leaf), target, transform) for leaf, target, transform in table)


_BN = r"(?P<bn>weight|bias|running_mean|running_var)"
_QUANTIZABLE = _leaves((r"(?P<leaf>weight|bias|scales|biases)", "{leaf}", ""))


def _unit(
    fused: Iterable[str], kxk: str, scale: str, skip: str, transform: Transform
) -> tuple[Leaf, ...]:
    """Leaves of one convolution unit, each branch by its source's name for it."""
    return _leaves(
        *((rf"{name}\.weight", "weight", transform) for name in fused),
        *((rf"{name}\.bias", "bias", "") for name in fused),
        (rf"{kxk}\.conv\.weight", r"kxk.{n}.conv.weight", transform),
        (rf"{kxk}\.bn\.{_BN}", r"kxk.{n}.bn.{bn}", ""),
        (rf"{scale}\.conv\.weight", "scale.conv.weight", transform),
        (rf"{scale}\.bn\.{_BN}", r"scale.bn.{bn}", ""),
        (rf"{skip}\.{_BN}", r"skip.bn.{bn}", ""),
    )


def _large_kernel(fused: str, large: str, small: str, transform: Transform) -> tuple[Leaf, ...]:
    """Leaves of the large-kernel convolution: its 7x7 is the unit's branch 0, its 3x3 `scale`."""
    return _leaves(
        (rf"{fused}\.weight", "weight", transform),
        (rf"{fused}\.bias", "bias", ""),
        (rf"{large}\.conv\.weight", "kxk.0.conv.weight", transform),
        (rf"{large}\.bn\.{_BN}", r"kxk.0.bn.{bn}", ""),
        (rf"{small}\.conv\.weight", "scale.conv.weight", transform),
        (rf"{small}\.bn\.{_BN}", r"scale.bn.{bn}", ""),
    )


def _block(ffn: str, skip: str, scale: str, transform: Transform) -> tuple[Leaf, ...]:
    """Leaves of a block beside its mixer's convolution units."""
    return _leaves(
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


def _apple_tower(prefix: str, stem: str, transform: Transform) -> list[Rule]:
    """Apple's names: stages, downsamplings and position encodings share one numbered `network`."""
    unit = _unit(["reparam_conv"], r"rbr_conv\.(?P<n>\d+)", r"rbr_scale", r"rbr_skip", transform)
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


def _timm_tower(prefix: str) -> list[Rule]:
    """timm's `fastvit_mci3` names."""
    unit = _unit(["reparam_conv"], r"conv_kxk\.(?P<n>\d+)", r"conv_scale", r"identity", "OIHW")
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
    return _leaves(
        (r"reparam_conv\.weight", "weight", transform),
        (r"reparam_conv\.bias", "bias", ""),
        (rf"{encoding}\.weight", "encoding.weight", transform),
        (rf"{encoding}\.bias", "encoding.bias", ""),
    )


def _gates(reduce: str, expand: str, transform: Transform) -> tuple[Leaf, ...]:
    return _leaves(
        (rf"{reduce}\.weight", "reduce.weight", transform),
        (rf"{reduce}\.bias", "reduce.bias", ""),
        (rf"{expand}\.weight", "expand.weight", transform),
        (rf"{expand}\.bias", "expand.bias", ""),
    )


def _language(body: str, head: str) -> list[Rule]:
    """Qwen2's names are mlx-lm's; only the prefix differs."""
    same = _leaves((r"(?P<rest>(?:embed_tokens|layers\.\d+|norm)\..+)", "{rest}", ""))
    return [
        Rule(re.compile(body), "decoder.qwen2.model.", same),
        Rule(re.compile(head + r"lm_head\."), "decoder.qwen2.lm_head.", _QUANTIZABLE),
    ]


def _projector(first: str, second: str) -> list[Rule]:
    return [
        Rule(re.compile(rf"{first}\."), "projector.linear_1.", _QUANTIZABLE),
        Rule(re.compile(rf"{second}\."), "projector.linear_2.", _QUANTIZABLE),
    ]


def _patterns(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in patterns)


_APPLE_VISION = r"model\.vision_tower\.vision_tower\.model\."
_TIMM_VISION = r"model\.vision_tower\.timm_model\."
_MLX_VISION = r"vision_tower\.vision_model\."

LAYOUTS: tuple[WeightLayout, ...] = (
    WeightLayout(
        name="llava_qwen2",
        description="Apple's PyTorch checkpoint",
        matches=_patterns(_APPLE_VISION + r"patch_embed\..+", r"model\.layers\..+"),
        rules=(
            *_apple_tower(_APPLE_VISION, r"patch_embed\.", "OIHW"),
            *_projector(r"model\.mm_projector(?:\.0)?", r"model\.mm_projector\.2"),
            *_language(r"model\.", ""),
        ),
        drop=_patterns(
            _APPLE_VISION + r".+\.num_batches_tracked",
            _APPLE_VISION + r"head\.proj",
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),
    ),
    WeightLayout(
        name="fast_vlm",
        description="transformers' fast_vlm",
        matches=_patterns(_TIMM_VISION + r"stem\..+", r"model\.language_model\.layers\..+"),
        rules=(
            *_timm_tower(_TIMM_VISION),
            *_projector(
                r"model\.multi_modal_projector\.linear_1", r"model\.multi_modal_projector\.linear_2"
            ),
            *_language(r"model\.language_model\.", ""),
        ),
        drop=_patterns(_TIMM_VISION + r".+\.num_batches_tracked"),
    ),
    WeightLayout(
        name="mlx-vlm",
        description="MLX folder (mlx-vlm, mlx-community, fastvlm-mlx)",
        matches=_patterns(_MLX_VISION + r"patch_embed\..+", r"language_model\.model\.layers\..+"),
        rules=(
            *_apple_tower(_MLX_VISION, r"patch_embed\.blocks\.", ""),
            *_projector(r"mm_projector(?:\.0)?", r"mm_projector\.2"),
            *_language(r"language_model\.model\.", r"language_model\."),
        ),
        drop=_patterns(_MLX_VISION + r"head\.proj"),
    ),
    WeightLayout(
        name="apple-app",
        description="MLX folder for Apple's app (no vision tower inside)",
        matches=_patterns(
            r"multi_modal_projector\.linear_0\..+", r"language_model\.model\.layers\..+"
        ),
        rules=(
            *_projector(r"multi_modal_projector\.linear_0", r"multi_modal_projector\.linear_2"),
            *_language(r"language_model\.model\.", r"language_model\."),
        ),
        drop=(),
        has_tower=False,
    ),
)
