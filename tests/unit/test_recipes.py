"""Recipes: which module gets how many bits, and what is refused."""

from __future__ import annotations

import pytest

from fastvlm_mlx.checkpoint.store import _shapes
from fastvlm_mlx.config import PRESETS, QUANT_MODES, QuantConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.quantize.recipes import (
    BALANCED,
    WIDER,
    Recipe,
    Setting,
    group_of,
    make_recipe,
    plan_modules,
    quant_config,
)

LAYER = "decoder.qwen2.model.layers.{}."
EMBEDDING = "decoder.qwen2.model.embed_tokens"
HEAD = "decoder.qwen2.lm_head"
SHAPES = {size: _shapes(config) for size, config in PRESETS.items()}


def recipe(name: str = "uniform", bits: int = 4, num_layers: int = 24, **options: object) -> Recipe:
    return make_recipe(name, bits=bits, num_layers=num_layers, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting",
    [(7, 64, "affine"), (4, 48, "affine"), (4, 64, "mxfp4"), (8, 16, "nvfp4"), (4, 64, "gptq")],
    ids=str,
)
def test_what_mlx_has_no_kernel_for_is_refused_with_what_works(
    setting: tuple[int, int, str],
) -> None:
    with pytest.raises(ConfigError) as caught:
        Setting(*setting)
    line = str(caught.value)
    works = {
        "affine": "affine with 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128",
        "mxfp4": "mxfp4 with 4 bits in groups of 32",
        "nvfp4": "nvfp4 with 4 bits in groups of 16",
    }
    own = [text for mode, text in works.items() if setting[2] in (mode, "gptq")]
    assert "\n" not in line and all(text in line for text in own)
    assert ("mxfp8" in line) == (setting[2] == "gptq"), "other modes are no help"


def test_a_policy_that_cannot_be_packed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"embeddings: 7 bits .* cannot be packed.*; or float"):
        recipe(embeddings=7)
    with pytest.raises(ConfigError, match="projector: 0 bits leave nothing"):
        recipe(projector=0)


def test_every_mode_width_and_group_size_of_the_table_is_a_setting() -> None:
    for mode, (widths, group_sizes) in QUANT_MODES.items():
        for bits in widths:
            for group_size in group_sizes:
                Setting(bits, group_size, mode)  # what a folder of others may have
                if bits == 1:
                    continue
                made = recipe(bits=bits, mode=mode, group_size=group_size)
                assert made.narrow == Setting(bits, group_size, mode)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "gptq"},
        {"bits": 16},
        {"bits": 8, "mode": "mxfp4"},
        {"name": "best"},
        {"embeddings": 7},
        {"projector": "int4"},
        {"group_size": 16},
    ],
    ids=str,
)
def test_a_recipe_of_what_does_not_exist_is_refused_in_one_line(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_group_sizes_default_to_64_and_to_the_mode_s_own() -> None:
    sizes = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
    for mode, size in sizes.items():
        bits = 8 if mode == "mxfp8" else 4
        assert recipe(bits=bits, mode=mode).narrow.group_size == size


def test_uniform_packs_all_of_the_decoder_alike() -> None:
    settings, indivisible = plan_modules(recipe(), SHAPES["7b"])
    assert set(settings.values()) == {Setting(4, 64)}
    assert len(settings) == 28 * 7 + 2
    assert indivisible == ()


@pytest.mark.parametrize("name", ["uniform", "balanced"])
def test_tower_norms_biases_and_projector_stay_float(name: str) -> None:
    """Other tools quantize the projector by accident of its name."""
    settings, _ = plan_modules(recipe(name), SHAPES["0.5b"])
    assert all(group_of(path) for path in settings)
    assert not any(path.startswith(("vision", "projector")) for path in settings)


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_modules_that_may_be_fused_never_differ(size: str, bits: int) -> None:
    """mlx-lm's own mixed recipe widens v_proj alone, which q and k can then not be fused with."""
    layers = PRESETS[size].decoder.num_layers
    settings, _ = plan_modules(recipe("balanced", bits=bits, num_layers=layers), SHAPES[size])
    for layer in range(layers):
        attention, mlp = LAYER.format(layer) + "self_attn.", LAYER.format(layer) + "mlp."
        assert len({settings[f"{attention}{part}_proj"] for part in "qkv"}) == 1
        assert settings[f"{mlp}gate_proj"] == settings[f"{mlp}up_proj"]


def test_balanced_widens_the_table_s_groups_at_the_table_s_layers() -> None:
    made = recipe("balanced", num_layers=24)
    wide = [
        layer
        for layer in range(24)
        if made.setting(LAYER.format(layer) + "mlp.down_proj") == made.wide
    ]
    assert wide == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert made.setting(LAYER.format(0) + "mlp.up_proj") == made.narrow == Setting(4, 64)
    assert made.wide == Setting(6, 64)
    assert made.setting(EMBEDDING) == made.setting(HEAD) == made.wide


def test_the_table_names_groups_that_exist_and_widths_that_are_wider() -> None:
    groups = {group_of(name.removesuffix(".weight")) for name in SHAPES["7b"]} - {None}
    names = {place[0] for place in groups if place}
    assert {group for group, _ in BALANCED} <= names
    assert set(WIDER) == set(QUANT_MODES["affine"][0]) - {1, 8}
    assert all(wide > bits for bits, wide in WIDER.items())


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_of_8_bits_nothing_is_wider(mode: str) -> None:
    made = recipe("balanced", bits=8, mode=mode)
    assert made.wide == made.embeddings == made.narrow


def test_one_bit_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 bits leave nothing of a model: use 2 or more"):
        recipe(bits=1)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 8, 28])
def test_first_and_last_layer_are_at_an_edge_however_few_there_are(num_layers: int) -> None:
    made = recipe("balanced", num_layers=num_layers)
    for layer in (0, num_layers - 1):
        assert made.setting(LAYER.format(layer) + "self_attn.q_proj") == made.wide


@pytest.mark.parametrize(("mode", "group_size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_other_modes_wide_groups_are_affine(mode: str, group_size: int) -> None:
    made = recipe("balanced", mode=mode)
    assert made.narrow == Setting(4, group_size, mode)
    assert made.setting(EMBEDDING) == Setting(6, 64)


def test_wide_groups_keep_the_group_size_asked_for() -> None:
    assert recipe("balanced", group_size=32).wide == Setting(6, 32)


def test_policies_say_what_embeddings_and_projector_become() -> None:
    first = "projector.linear_1"
    assert recipe().setting(first) is None
    assert recipe(projector=8).setting(first) == Setting(8, 64)
    assert recipe("balanced", embeddings="float").setting(EMBEDDING) is None
    assert recipe("balanced", embeddings="float").setting(HEAD) is None
    assert recipe(embeddings=8).setting(HEAD) == Setting(8, 64)
    assert recipe(mode="mxfp4", embeddings=4).setting(EMBEDDING) == Setting(4, 32, "mxfp4")
    assert recipe(mode="mxfp4", embeddings=8).setting(EMBEDDING) == Setting(8, 64)


def test_a_module_whose_width_groups_do_not_divide_stays_float_and_is_named() -> None:
    shapes = {
        LAYER.format(0) + "self_attn.q_proj.weight": (96, 96),
        LAYER.format(0) + "self_attn.q_proj.bias": (96,),
        LAYER.format(0) + "mlp.down_proj.weight": (96, 128),
    }
    settings, indivisible = plan_modules(recipe(), shapes)
    assert settings == {LAYER.format(0) + "mlp.down_proj": Setting(4, 64)}
    assert indivisible == (LAYER.format(0) + "self_attn.q_proj",)


def test_a_recipe_that_packs_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing can be packed"):
        plan_modules(recipe(), {LAYER.format(0) + "mlp.down_proj.weight": (96, 96)})


def test_the_config_names_only_modules_that_differ() -> None:
    settings, _ = plan_modules(recipe(), SHAPES["0.5b"])
    assert quant_config(recipe(), settings) == QuantConfig(bits=4, group_size=64)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_config_gives_every_module_its_setting_back(mode: str) -> None:
    made = recipe("balanced", mode=mode, projector=8)
    settings, _ = plan_modules(made, SHAPES["0.5b"])
    config = quant_config(made, settings)
    assert {path: Setting(*config.of(path)) for path in settings} == settings
    assert 0 < len(config.overrides) < len(settings)
