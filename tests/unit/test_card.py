from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvlm_mlx.checkpoint.hub import is_license_file
from fastvlm_mlx.config import PRESETS, ModelConfig, ProjectorConfig, QuantConfig
from fastvlm_mlx.convert.card import app_card, native_card
from fastvlm_mlx.convert.provenance import Provenance, find_license_files, find_provenance

CONFIG = PRESETS["0.5b"]
COMMAND = "fastvlm convert apple/FastVLM-0.5B FastVLM-0.5B-mlx"
# The head of https://huggingface.co/apple/FastVLM-0.5B/blob/main/README.md, typed.
APPLES = (
    "---\nlicense: apple-amlr\nlibrary_name: ml-fastvlm\ntags:\n- transformers\n---\n# FastVLM\n"
)


def source(tmp_path: Path, readme: str | None = None, *files: str) -> Path:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    for file in files:
        (tmp_path / file).write_text(file)
    return tmp_path


def card(provenance: Provenance, config: ModelConfig = CONFIG, **changes: Any) -> str:
    options: dict[str, Any] = {"dtype": "bfloat16", "command": COMMAND, "bits_per_weight": 16.0}
    return native_card(provenance, config=config, **options | changes)


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    values: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return values


def test_a_hub_name_is_the_base_model_and_apples_licence_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path, APPLES, "LICENSE")
    text = card(find_provenance(folder, "apple/FastVLM-0.5B@main"))
    assert front_matter(text) == {
        "base_model": "apple/FastVLM-0.5B",
        "library_name": "mlx",
        "license": "apple-amlr",
        "pipeline_tag": "image-text-to-text",
        "tags": ["fastvlm", "mlx"],
    }
    assert "research purposes only" in text
    assert "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL" in text
    assert "The source's licence files are beside this card: `LICENSE`." in text


def test_apples_zip_says_nothing_and_is_still_research_only(tmp_path: Path) -> None:
    """A folder of get_models.sh has no card and no licence: converted, it must get both."""
    text = card(find_provenance(source(tmp_path), str(tmp_path)))
    assert front_matter(text)["license"] == "apple-amlr"
    assert "base_model" not in front_matter(text)
    assert "research purposes only" in text


def test_a_licence_file_without_a_word_of_apple_is_not_taken_for_apples(tmp_path: Path) -> None:
    """A model trained by oneself, with an MIT licence beside it, was published as Apple's."""
    text = card(find_provenance(source(tmp_path, None, "LICENSE", "NOTICE"), str(tmp_path)))
    assert front_matter(text)["license"] == "other"
    assert front_matter(text)["license_link"] == "LICENSE"
    assert "The source's licence files are beside this card: `LICENSE`, `NOTICE`." in text


@pytest.mark.parametrize("terms", ["mit", "other\nlicense_name: same-as-fastvlm-mlx"])
@pytest.mark.parametrize(
    "bases",
    [
        " apple/FastVLM-7B",
        " Apple/x  # Apple's",
        " [x/y, 'apple/FastVLM-7B']",
        "\n- x/y\n- apple/z",
    ],
)
@pytest.mark.parametrize("name", ["folder", "someone/tuned"])
def test_a_stranger_cannot_put_apples_weights_under_another_licence(
    tmp_path: Path, terms: str, bases: str, name: str
) -> None:
    folder = source(tmp_path, f"---\nlicense: {terms}\nbase_model:{bases}\n---\n")
    text = card(find_provenance(folder, str(folder) if name == "folder" else name))
    assert front_matter(text)["license"] == "apple-amlr"
    assert "research purposes only" in text and "same-as" not in text
    assert "Same licence as the project" not in text


def test_every_base_model_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path, "---\nlicense: mit\nbase_model: [x/y, me/z]\n---\n")
    text = card(find_provenance(folder, str(folder)))
    assert front_matter(text)["base_model"] == ["x/y", "me/z"]
    assert "Made from `x/y`, `me/z`." in text


# A vision tower from elsewhere


def with_tower(tmp_path: Path, mine: str, tower: str, tower_name: str | None = None) -> Provenance:
    folders = tmp_path / "mine", tmp_path / "tower"
    for folder, readme in zip(folders, (mine, tower), strict=True):
        folder.mkdir()
        source(folder, readme, "LICENSE")
        (folder / "LICENSE").write_text(readme)
    name = tower_name or str(folders[1])
    return find_provenance(folders[0], str(folders[0]), tower_folder=folders[1], tower_name=name)


def test_a_tower_of_apples_brings_its_terms_and_is_named(tmp_path: Path) -> None:
    """The app's folder says nothing of where it is from; the tower's source does."""
    found = with_tower(tmp_path, "---\nlicense: mit\n---\n", APPLES, "apple/FastVLM-0.5B")
    text = card(found)
    assert front_matter(text)["base_model"] == "apple/FastVLM-0.5B"
    assert front_matter(text)["license"] == "apple-amlr"
    assert "Its vision tower is from `apple/FastVLM-0.5B`." in text
    assert "Made from" not in text
    assert "# FastVLM (MLX, " in text
    files = "`LICENSE`, `LICENSE-vision-tower`"
    assert f"The sources' licence files are beside this card: {files}." in text


def test_both_base_models_are_named(tmp_path: Path) -> None:
    mine = "---\nlicense: mit\nbase_model: me/base\n---\n"
    tower = "---\nlicense: apache-2.0\nbase_model: you/tower\n---\n"
    text = card(with_tower(tmp_path, mine, tower))
    matter = front_matter(text)
    assert (matter["base_model"], matter["license"]) == (["me/base", "you/tower"], "other")
    assert "# base (MLX, " in text
    assert "Made from `me/base`. Its vision tower is from `you/tower`." in text
    assert "The source names its licence: mit. Its vision tower's: apache-2.0." in text


def test_the_demo_with_anothers_tower_is_not_this_projects(tmp_path: Path) -> None:
    tower = source(tmp_path, "---\nlicense: mit\n---\n")
    found = find_provenance(tmp_path, "demo", tower_folder=tower, tower_name=str(tower))
    assert not found.is_own and "Same licence as the project" not in card(found)
    again = find_provenance(tmp_path, "demo", tower_folder=tower, tower_name="demo")
    assert again.is_own
    same = find_provenance(tmp_path, "demo", tower_folder=tower, tower_name=None)
    assert same.is_own and same.tower is None


def test_licence_files_of_both_travel_the_same_text_once(tmp_path: Path) -> None:
    mine, tower = tmp_path / "mine", tmp_path / "tower"
    for folder, files in (
        (mine, {"LICENSE": "a", "NOTICE.txt": "n", "License.md": "m"}),
        (tower, {"LICENSE": "b", "NOTICE.txt": "n", "LICENSE.MD": "x", "LICENSE_MODEL": "c"}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    found = find_provenance(mine, str(mine), tower_folder=tower, tower_name=str(tower))
    texts = {name: path.read_text() for name, path in found.license_files.items()}
    assert texts == {
        "LICENSE": "a",
        "NOTICE.txt": "n",
        "License.md": "m",
        "LICENSE-vision-tower": "b",
        "LICENSE-vision-tower.MD": "x",
        "LICENSE_MODEL": "c",
    }
    assert all(is_license_file(name) for name in texts)


def test_a_licence_of_megabytes_is_none(tmp_path: Path) -> None:
    source(tmp_path, None, "LICENSE")
    (tmp_path / "LICENSE.tar").write_bytes(b"x" * ((1 << 20) + 1))
    assert [path.name for path in find_license_files(tmp_path)] == ["LICENSE"]


def test_another_model_keeps_its_own_licence(tmp_path: Path) -> None:
    readme = "---\nlicense: other\nlicense_name: my-terms\nbase_model:\n- me/base\n---\n"
    folder = source(tmp_path, readme, "LICENSE.md")
    text = card(find_provenance(folder, str(folder)))
    matter = front_matter(text)
    assert (matter["license"], matter["license_name"]) == ("other", "my-terms")
    assert (matter["base_model"], matter["license_link"]) == ("me/base", "LICENSE.md")
    assert "my-terms" in text.split("## Licence")[1]


def test_the_demo_and_what_is_made_of_it_are_this_projects(tmp_path: Path) -> None:
    text = card(find_provenance(source(tmp_path), "demo"))
    assert "Same licence as the project." in text
    assert "research" not in text
    again = card(find_provenance(source(tmp_path, text), str(tmp_path)))
    assert again == text


def test_a_card_made_from_a_card_says_the_same(tmp_path: Path) -> None:
    first = card(find_provenance(source(tmp_path, APPLES), "apple/FastVLM-0.5B"))
    assert card(find_provenance(source(tmp_path, first), str(tmp_path))) == first


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "---",
        "no front matter",
        "---\nbase_model: apple/FastVLM-0.5B\n",
        "---\nlicense: [}\nbase_model: {a: b}\n---\n",
        "---\nbase_model: 'x\ny'\nlicense: <script>\nlicense_name: 'a: *b'\n---\n",
        "\0---\n" * 3,
    ],
)
def test_a_broken_card_is_passed_over(tmp_path: Path, readme: str) -> None:
    found = find_provenance(source(tmp_path, readme), str(tmp_path))
    assert (found.base_models, found.license, found.license_name) == ((), None, None)


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_provenance(folder, "checkpoints/mine").base_models == ()


def test_a_card_says_size_command_and_use_and_nothing_of_the_machine(tmp_path: Path) -> None:
    quant = QuantConfig(bits=4, group_size=64, overrides={"projector.linear_1": (8, 64, "affine")})
    text = card(
        find_provenance(source(tmp_path), str(tmp_path)),
        dataclasses.replace(CONFIG, quant=quant),
        bits_per_weight=4.504,
    )
    assert "4 bits, affine, groups of 64; 1 module with 8 bits, affine, groups of 64; rest" in text
    assert "| bits per weight | 4.50 |" in text
    assert "1024x1024 pixels, padded to a square; 256 tokens" in text
    assert f"```sh\n{COMMAND}\n```" in text
    assert "fastvlm generate photo.jpg" in text
    assert "mlx_vlm.generate" in text
    assert str(tmp_path) not in text


def test_mixed_settings_are_told_apart(tmp_path: Path) -> None:
    overrides = {f"decoder.{i}": (6, 64, "affine") for i in range(9)} | {"x": (8, 32, "mxfp8")}
    quant = QuantConfig(bits=4, group_size=64, overrides=overrides)
    text = card(find_provenance(tmp_path, "demo"), dataclasses.replace(CONFIG, quant=quant))
    assert (
        "| 4 bits, affine, groups of 64; 9 modules with 6 bits, affine, groups of 64; "
        "1 module with 8 bits, mxfp8, groups of 32; rest bfloat16 |"
    ) in text


def test_a_card_names_only_programs_that_can_run_the_model(tmp_path: Path) -> None:
    """mlx-vlm's code has Apple's tower's sizes in it, and neither knows a linear projector."""
    found = find_provenance(tmp_path, "demo")
    for vision in ({"image_size": 512}, {}):
        changed = dataclasses.replace(CONFIG.vision, **vision)  # type: ignore[arg-type]
        text = card(found, dataclasses.replace(CONFIG, vision=changed))
        assert "mlx-vlm](" in text and "mlx_vlm.generate" in text and "mlx-swift-lm](" in text
    small = dataclasses.replace(CONFIG.vision, layers=(1, 1, 1, 1, 1))
    text = card(found, dataclasses.replace(CONFIG, vision=small))
    assert "mlx_vlm" not in text and "mlx-vlm" not in text and "mlx-swift-lm](" in text
    linear = ProjectorConfig(in_dim=3072, out_dim=896, kind="linear")
    text = card(found, dataclasses.replace(CONFIG, projector=linear))
    assert "mlx_vlm" not in text and "mlx-vlm" not in text and "mlx-swift-lm" not in text
    assert "in MLX form, for fastvlm-mlx, which wrote it." in text


def test_a_card_says_who_pads_where_the_model_crops(tmp_path: Path) -> None:
    found = find_provenance(tmp_path, "demo")
    cropping = dataclasses.replace(CONFIG, image_mode="crop")
    assert "cropped to a square (mlx-vlm and mlx-swift-lm pad);" in card(found, cropping)
    small = dataclasses.replace(CONFIG.vision, layers=(1, 1, 1, 1, 1))
    text = card(found, dataclasses.replace(cropping, vision=small))
    assert "cropped to a square (mlx-swift-lm pads);" in text
    linear = ProjectorConfig(in_dim=3072, out_dim=896, kind="linear")
    assert "cropped to a square;" in card(found, dataclasses.replace(cropping, projector=linear))


def test_a_command_cannot_end_its_fence(tmp_path: Path) -> None:
    text = card(find_provenance(source(tmp_path), "demo"), command="fastvlm convert '```' x")
    assert "````sh\nfastvlm convert '```' x\n````" in text


def test_the_apps_card_says_where_its_files_go(tmp_path: Path) -> None:
    text = app_card(
        find_provenance(source(tmp_path, APPLES), "apple/FastVLM-0.5B"),
        config=CONFIG,
        dtype="float16",
        command="fastvlm export-app apple/FastVLM-0.5B out",
        bits_per_weight=16.0,
    )
    assert "`app/FastVLM/model`" in text
    assert "mlx_vlm" not in text
    # CONFIG pads; the app does not, whatever the model was trained with.
    cut = "1024x1024 pixels, the shortest edge scaled to 1024, then cropped to the centre; 256"
    assert cut in text and "padded" not in text


def test_licence_files_are_found_in_any_case_and_folders_are_none(tmp_path: Path) -> None:
    source(tmp_path, None, "LICENSE", "license_model.txt", "NOTICE", "LICENSE.py", "README.md")
    (tmp_path / "LICENSES").mkdir()
    found = {path.name for path in find_license_files(tmp_path)}
    assert found == {"LICENSE", "license_model.txt", "NOTICE"}
