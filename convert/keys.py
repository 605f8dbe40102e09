"""What an artifact calls each weight: canonical names to the native folder's keys and the app's.

A table each way only: this one writes, `checkpoint/layouts.py` reads, and every artifact is read
back before it is handed over. Knows names and nothing of values.

Sources: mlx-vlm `models/fastvlm`, mlx-swift-lm `FastVLM.swift`; apple/ml-fastvlm `app/FastVLM`.
"""

from __future__ import annotations

import re

TOWER = "vision_tower.vision_model."
CLIP_HEAD = f"{TOWER}head.proj"

# Apple numbers stages, downsamplings and position encodings in one list, `network`.
_STAGES = {0: 0, 1: 2, 2: 4, 3: 7, 4: 10}
_DOWNSAMPLES = {1: 1, 2: 3, 3: 5, 4: 8}
_POSITIONS = {3: 6, 4: 9}

_MIXERS = (
    (r"mixer\.", "token_mixer.reparam_conv."),
    (r"(?=qkv\.|proj\.)", "token_mixer."),
    (r"ffn\.", "convffn."),
    (r"(?=norm\.|layer_scale)", ""),
)
_VISION = (
    (r"stem\.(\d)\.", r"patch_embed.blocks.\1.reparam_conv."),
    *(
        (rf"stages\.{s}\.blocks\.(\d+)\.{module}", rf"network.{n}.\g<1>.{target}")
        for s, n in _STAGES.items()
        for module, target in _MIXERS
    ),
    *(
        (rf"stages\.{s}\.downsample\.{i}\.", f"network.{n}.proj.{i}.{unit}.")
        for s, n in _DOWNSAMPLES.items()
        for i, unit in enumerate(("lkb_reparam", "reparam_conv"))
    ),
    *((rf"stages\.{s}\.pos_emb\.", f"network.{n}.reparam_conv.") for s, n in _POSITIONS.items()),
    (r"expansion\.conv\.", "conv_exp.reparam_conv."),
    (r"expansion\.se\.", "conv_exp.se."),
)
_DECODER = ((r"decoder\.qwen2\.", "language_model."),)
_NATIVE = (
    *((rf"vision\.{name}", TOWER + key) for name, key in _VISION),
    (r"projector\.linear_1\.", "mm_projector.0."),
    (r"projector\.linear_2\.", "mm_projector.2."),
    *_DECODER,
)
_APP = (
    (r"projector\.linear_1\.", "multi_modal_projector.linear_0."),
    (r"projector\.linear_2\.", "multi_modal_projector.linear_2."),
    *_DECODER,
)


def native_key(name: str, *, linear_projector: bool = False) -> str:
    """Return the native folder's key of a canonical tensor name in inference form.

    A projector of one linear layer is `mm_projector` itself. Raises KeyError for other names.
    """
    key = _renamed(name, _NATIVE)
    return key.replace("mm_projector.0.", "mm_projector.") if linear_projector else key


def app_key(name: str) -> str:
    """Return the key in Apple's app folder, which holds no tower. Raises KeyError."""
    return _renamed(name, _APP)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, target in table:
        match = re.match(pattern, name)
        if match:
            return match.expand(target) + name[match.end() :]
    raise KeyError(name)
