"""An artifact's model card: what it is, how it is used, how it was made, under which licence.

Holds no date and no path but those of the command itself, so the same command writes the same
bytes. Where the source comes from is `provenance.py`'s. Knows no weights and writes nothing.

Source of Apple's terms: https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.provenance import APPLE_LICENSE, Provenance

_APPLE_TERMS = (
    "Apple releases FastVLM's weights under the "
    "[Apple Machine Learning Research Model License]"
    "(https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL): for research purposes only, "
    "not for commercial use, in converted and quantized form too."
)


def native_card(
    provenance: Provenance,
    *,
    config: ModelConfig,
    dtype: str,
    command: str,
    bits_per_weight: float | None,
) -> str:
    """Return README.md of a native folder. `command` is the exact command that made it."""
    question = '"Describe the image."'
    run = (
        f"fastvlm generate photo.jpg -p {question} --model FOLDER",
        f"mlx_vlm.generate --model FOLDER --image photo.jpg --prompt {question}",
    )
    what = (
        "in MLX form, for [mlx-vlm](https://github.com/Blaizzy/mlx-vlm), "
        "[mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) and fastvlm-mlx, which wrote it"
    )
    use = f"With `FOLDER` as this folder:\n\n{_code(run)}"
    tower = "float16, its last stage float32" if dtype == "float16" else dtype
    sizes = _sizes(config, dtype, bits_per_weight, tower=tower)
    return _card(provenance, what=what, sizes=sizes, command=command, use=use)


def app_card(
    provenance: Provenance,
    *,
    config: ModelConfig,
    dtype: str,
    command: str,
    bits_per_weight: float | None,
) -> str:
    """Return README.md of a folder for Apple's app. `command` is the exact command that made it."""
    what = (
        "in the form that the app of [ml-fastvlm](https://github.com/apple/ml-fastvlm) for iOS and "
        "macOS is built with, written by fastvlm-mlx"
    )
    use = (
        "Clone ml-fastvlm, put everything in this folder into `app/FastVLM/model`, and build "
        "`app/FastVLM.xcodeproj` in Xcode."
    )
    sizes = _sizes(config, dtype, bits_per_weight, tower="Core ML, `fastvithd.mlpackage`")
    return _card(provenance, what=what, sizes=sizes, command=command, use=use)


def _card(
    provenance: Provenance, *, what: str, sizes: Mapping[str, str], command: str, use: str
) -> str:
    name = "FastVLM demo model" if provenance.is_own else "FastVLM"
    if provenance.base_model:
        name = provenance.base_model.rpartition("/")[2]
    origin = f" Made from `{provenance.base_model}`." if provenance.base_model else ""
    return "\n".join(
        (
            *_yaml(provenance),
            f"# {name} (MLX)",
            "",
            f"{name} {what}.{origin}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in sizes.items()),
            "",
            "## Use",
            "",
            use,
            "",
            *(("## Made by", "", _code((command,)), "") if command else ()),
            "## Licence",
            "",
            _license_paragraph(provenance),
            "",
        )
    )


def _yaml(provenance: Provenance) -> Iterable[str]:
    """The front matter of our card."""
    yield "---"
    if provenance.base_model:
        yield f"base_model: {provenance.base_model}"
    yield "library_name: mlx"
    # Nobody but Apple can put its weights under other terms.
    license_id = APPLE_LICENSE if provenance.is_apple else provenance.license or "other"
    yield f"license: {license_id}"
    if provenance.license_name and not provenance.is_apple:
        yield f'license_name: "{provenance.license_name}"'
    if license_id == "other" and provenance.license_files:
        yield f'license_link: "{provenance.license_files[0].name}"'
    yield "pipeline_tag: image-text-to-text"
    yield "tags:"
    yield "- fastvlm"
    yield "- mlx"
    yield "---"
    yield ""


def _license_paragraph(provenance: Provenance) -> str:
    files = ", ".join(f"`{file.name}`" for file in provenance.license_files)
    if provenance.is_own:
        return "Trained from scratch by the fastvlm-mlx project. Same licence as the project."
    if provenance.is_apple:
        beside = f" Its text is beside this card: {files}." if files else ""
        return _APPLE_TERMS + beside
    named = provenance.license_name or provenance.license
    stated = f"The source names its licence: {named}." if named else ""
    beside = f" Its text is beside this card: {files}." if files else ""
    return f"{stated}{beside} For what derives from Apple's own weights: {_APPLE_TERMS}".strip()


def _sizes(
    config: ModelConfig, dtype: str, bits_per_weight: float | None, *, tower: str
) -> dict[str, str]:
    side, decoder = config.vision.image_size, config.decoder
    fitting = "padded to a square" if config.image_mode == "pad" else "cropped to a square"
    head = "tied" if decoder.tied else "with its own head"
    sizes = {
        "pictures": f"{side}x{side} pixels, {fitting}; {config.vision.tokens(side, side)} tokens",
        "decoder": f"Qwen2, {decoder.num_layers} layers of {decoder.hidden_size}, "
        f"vocabulary {decoder.vocab_size}, {head}",
        "context": f"{decoder.max_positions} positions",
        "vision tower": tower,
        "projector, decoder": _weights(config, dtype),
    }
    if bits_per_weight is not None:
        sizes["bits per weight"] = f"{bits_per_weight:.2f}"
    return sizes


def _weights(config: ModelConfig, dtype: str) -> str:
    quant = config.quant
    if quant is None:
        return dtype
    others = len(quant.overrides)
    mixed = f", {others} modules otherwise (config.json says which)" if others else ""
    return f"{quant.bits} bits, {quant.mode}, groups of {quant.group_size}{mixed}; rest {dtype}"


def _code(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
