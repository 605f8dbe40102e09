"""One table for each source layout: how it is recognised, what each tensor is called here.

Canonical names are paths in `model/fastvlm.py`'s tree for projector and decoder, and the names
`fuse.py` reads for the tower (which is folded before it fits that tree). A layout is recognised by
key names alone, never by a value, a shape or a folder's name. Knows no files and loads nothing.

Sources: apple/ml-fastvlm `llava_qwen.py` and `app/FastVLM`; transformers `fast_vlm`; mlx-vlm
`models/fastvlm`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fastvlm_mlx.checkpoint.tower_names import (
    Rule,
    Transform,
    apple_tower,
    leaves,
    timm_tower,
)
from fastvlm_mlx.errors import CheckpointMismatch


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


_QUANTIZABLE = leaves((r"(?P<leaf>weight|bias|scales|biases)", "{leaf}", ""))


def _language(body: str, head: str) -> list[Rule]:
    """Qwen2's names are mlx-lm's; only the prefix differs."""
    same = leaves((r"(?P<rest>(?:embed_tokens|layers\.\d+|norm)\..+)", "{rest}", ""))
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
            *apple_tower(_APPLE_VISION, r"patch_embed\.", "OIHW"),
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
            *timm_tower(_TIMM_VISION),
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
            *apple_tower(_MLX_VISION, r"patch_embed\.blocks\.", ""),
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
