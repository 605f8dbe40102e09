"""Layouts are recognised by key names, and every key is mapped, dropped by name, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm_mlx.checkpoint.layouts import LAYOUTS, first_few, recognise
from fastvlm_mlx.errors import CheckpointMismatch

PARITY = Path(__file__).parents[1] / "parity"
LANGUAGE = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
APPLE = "model.vision_tower.vision_tower.model."


def keys(name: str) -> list[str]:
    return list(json.loads((PARITY / f"keys_{name}.json").read_text()))


@pytest.mark.parametrize(
    ("inventory", "prefix", "extra", "layout"),
    [
        ("apple_fused", APPLE, LANGUAGE, "llava_qwen2"),
        ("apple_training", APPLE, LANGUAGE, "llava_qwen2"),
        ("fast_vlm", "", [], "fast_vlm"),
    ],
)
def test_real_inventories_are_recognised_and_wholly_mapped(
    inventory: str, prefix: str, extra: list[str], layout: str
) -> None:
    names = [key if key.startswith(prefix) else prefix + key for key in keys(inventory)] + extra
    found = recognise(names)
    renamed = found.rename_all(names)
    dropped = [name for name in names if found.rename(name) is None]
    assert found.name == layout
    assert len(renamed) + len(dropped) == len(names)
    assert all(name.endswith((".num_batches_tracked", "head.proj")) for name in dropped)


def test_both_forms_of_a_tower_have_the_same_modules() -> None:
    """A fused and a training-form tower differ in branches, never in modules."""
    apple = LAYOUTS[0]

    def modules(inventory: str) -> set[str]:
        names = [k if k.startswith(APPLE) else APPLE + k for k in keys(inventory)]
        return {".".join(name.split(".")[:5]) for name in apple.rename_all(names)}

    assert {m for m in modules("apple_fused") if ".blocks." in m} == {
        m for m in modules("apple_training") if ".blocks." in m
    }


def test_a_token_mixer_layer_scale_is_not_the_block_layer_scale() -> None:
    """Folding the block's layer scale into the mixer is a fault seen in ports."""
    block = APPLE + "network.0.0."
    assert LAYOUTS[0].rename(block + "token_mixer.layer_scale") == (
        "vision.stages.0.blocks.0.mixer_scale",
        "",
    )
    assert LAYOUTS[0].rename(block + "layer_scale") == (
        "vision.stages.0.blocks.0.layer_scale",
        "",
    )


def test_unmapped_keys_are_counted_and_the_first_named() -> None:
    """Other ports load with strict=False and drop such keys silently."""
    names = [APPLE + "patch_embed.0.reparam_conv.weight", *LANGUAGE]
    surprises = [f"model.image_newline_{i}" for i in range(9)]
    layout = recognise(names)
    with pytest.raises(CheckpointMismatch, match=r"llava_qwen2: 9 tensors .* and 6 more") as caught:
        layout.rename_all(names + surprises)
    assert "\n" not in str(caught.value)


def test_one_weight_under_two_names_is_refused() -> None:
    layout = LAYOUTS[0]
    twice = ["model.mm_projector.weight", "model.mm_projector.0.weight"]
    with pytest.raises(CheckpointMismatch, match="same weight twice"):
        layout.rename_all(twice)


def test_no_layout_and_two_layouts_are_refused_by_name() -> None:
    with pytest.raises(CheckpointMismatch, match="fit none of llava_qwen2, fast_vlm, mlx-vlm"):
        recognise(["model.layers.0.mlp.up_proj.weight", "vision_model.embeddings.weight"])
    both = [*keys("fast_vlm"), APPLE + "patch_embed.0.reparam_conv.weight", *LANGUAGE]
    with pytest.raises(CheckpointMismatch, match="two layouts"):
        recognise(both)


def test_few_names_are_shown_whole() -> None:
    assert first_few(["b", "a"]) == "a, b"
    assert first_few(["d", "c", "b", "a"]) == "a, b, c and 1 more"
