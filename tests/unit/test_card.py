from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvlm_mlx.config import PRESETS, ModelConfig, QuantConfig
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
    options: dict[str, Any] = {"dtype": "bfloat16", "command": COMMAND, "bits_per_weight": None}
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
    assert "`LICENSE`" in text


def test_apples_zip_says_nothing_and_is_still_research_only(tmp_path: Path) -> None:
    """A folder of get_models.sh has no card and no licence: converted, it must get both."""
    text = card(find_provenance(source(tmp_path), str(tmp_path)))
    assert front_matter(text)["license"] == "apple-amlr"
    assert "base_model" not in front_matter(text)
    assert "research purposes only" in text


def test_a_stranger_cannot_put_apples_weights_under_another_licence(tmp_path: Path) -> None:
    folder = source(tmp_path, "---\nlicense: mit\nbase_model: apple/FastVLM-7B\n---\n")
    assert front_matter(card(find_provenance(folder, str(folder))))["license"] == "apple-amlr"


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
    assert (found.base_model, found.license, found.license_name) == (None, None, None)


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_provenance(folder, "checkpoints/mine").base_model is None


def test_a_card_says_size_command_and_use_and_nothing_of_the_machine(tmp_path: Path) -> None:
    quant = QuantConfig(bits=4, group_size=64, overrides={"projector.linear_1": (8, 64, "affine")})
    text = card(
        find_provenance(source(tmp_path), str(tmp_path)),
        dataclasses.replace(CONFIG, quant=quant),
        bits_per_weight=4.504,
    )
    assert "4 bits, affine, groups of 64, 1 modules otherwise" in text
    assert "| bits per weight | 4.50 |" in text
    assert "1024x1024 pixels, padded to a square; 256 tokens" in text
    assert f"```sh\n{COMMAND}\n```" in text
    assert "fastvlm generate photo.jpg" in text
    assert "mlx_vlm.generate" in text
    assert str(tmp_path) not in text


def test_a_command_cannot_end_its_fence(tmp_path: Path) -> None:
    text = card(find_provenance(source(tmp_path), "demo"), command="fastvlm convert '```' x")
    assert "````sh\nfastvlm convert '```' x\n````" in text


def test_the_apps_card_says_where_its_files_go(tmp_path: Path) -> None:
    text = app_card(
        find_provenance(source(tmp_path, APPLES), "apple/FastVLM-0.5B"),
        config=CONFIG,
        dtype="float16",
        command="fastvlm export-app apple/FastVLM-0.5B out",
        bits_per_weight=None,
    )
    assert "`app/FastVLM/model`" in text
    assert "mlx_vlm" not in text


def test_licence_files_are_found_in_any_case_and_folders_are_none(tmp_path: Path) -> None:
    source(tmp_path, None, "LICENSE", "license_model.txt", "NOTICE", "LICENSE.py", "README.md")
    (tmp_path / "LICENSES").mkdir()
    found = {path.name for path in find_license_files(tmp_path)}
    assert found == {"LICENSE", "license_model.txt", "NOTICE"}
