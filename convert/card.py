"""An artifact's model card: what it is, how it is used, how it was made, under which licence.

Holds no date and no path but those of the command itself, so the same command writes the same
bytes. Where the source comes from is `provenance.py`'s. Knows no weights and writes nothing.

Source of Apple's terms: https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fastvlm_mlx.config import ModelConfig, VisionConfig
from fastvlm_mlx.convert.provenance import APPLE_LICENSE, Provenance

_APPLE_TERMS = (
    "Apple releases FastVLM's weights under the "
    "[Apple Machine Learning Research Model License]"
    "(https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL): for research purposes only, "
    "not for commercial use, in converted and quantized form too."
)
_READERS = {
    "mlx-vlm": "https://github.com/Blaizzy/mlx-vlm",
    "mlx-swift-lm": "https://github.com/ml-explore/mlx-swift-lm",
}


def native_card(
    provenance: Provenance,
    *,
    config: ModelConfig,
    dtype: str,
    command: str,
    bits_per_weight: float,
) -> str:
    """Return README.md of a native folder. `command` is the exact command that made it."""
    others = _other_readers(config)
    question = '"Describe the image."'
    run = [f"fastvlm generate photo.jpg -p {question} --model FOLDER"]
    if "mlx-vlm" in others:
        run.append(f"mlx_vlm.generate --model FOLDER --image photo.jpg --prompt {question}")
    links = ", ".join(f"[{name}]({_READERS[name]})" for name in others)
    what = f"in MLX form, for {f'{links} and ' if links else ''}fastvlm-mlx, which wrote it"
    use = f"With `FOLDER` as this folder:\n\n{_code(run)}"
    fitting = "padded to a square"
    if config.image_mode == "crop":
        pad = f" ({' and '.join(others)} {'pad' if len(others) > 1 else 'pads'})"
        fitting = "cropped to a square" + (pad if others else "")
    tower = "float16, its last stage float32" if dtype == "float16" else dtype
    sizes = _sizes(config, dtype, bits_per_weight, tower=tower, fitting=fitting)
    kind = _kind("MLX", config, dtype)
    return _card(provenance, kind=kind, what=what, sizes=sizes, command=command, use=use)


def app_card(
    provenance: Provenance,
    *,
    config: ModelConfig,
    dtype: str,
    command: str,
    bits_per_weight: float,
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
    tower = "Core ML, `fastvithd.mlpackage`"
    # Whatever the source does: the app knows no padding (its FastVLM.swift).
    fitting = f"the shortest edge scaled to {config.vision.image_size}, then cropped to the centre"
    sizes = _sizes(config, dtype, bits_per_weight, tower=tower, fitting=fitting)
    kind = _kind("Apple's app", config, dtype)
    return _card(provenance, kind=kind, what=what, sizes=sizes, command=command, use=use)


def _other_readers(config: ModelConfig) -> tuple[str, ...]:
    """Return the programs beside this one that can run such a model.

    Neither knows a projector of one linear layer; mlx-vlm's code has Apple's tower's sizes in it,
    but for the size of its pictures.
    """
    if config.projector.kind == "linear":
        return ()
    apples = VisionConfig(image_size=config.vision.image_size)
    return tuple(_READERS) if config.vision == apples else ("mlx-swift-lm",)


def _card(
    provenance: Provenance,
    *,
    kind: str,
    what: str,
    sizes: Mapping[str, str],
    command: str,
    use: str,
) -> str:
    name = "FastVLM demo model" if provenance.is_own else "FastVLM"
    if provenance.base_models:
        name = provenance.base_models[0].rpartition("/")[2]
    return "\n".join(
        (
            *_yaml(provenance),
            f"# {name} ({kind})",
            "",
            f"{name} {what}.{_origin(provenance)}",
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


def _kind(form: str, config: ModelConfig, dtype: str) -> str:
    """Return what tells one model's folders apart."""
    return f"{form}, {f'{config.quant.bits} bits' if config.quant else dtype}"


def _origin(provenance: Provenance) -> str:
    tower = provenance.tower.base_models if provenance.tower else ()
    made = f" Made from {_names(provenance.base_models)}." if provenance.base_models else ""
    return made + (f" Its vision tower is from {_names(tower)}." if tower else "")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _yaml(provenance: Provenance) -> Iterable[str]:
    """The front matter of our card."""
    yield "---"
    towers = provenance.tower.base_models if provenance.tower else ()
    bases = tuple(dict.fromkeys((*provenance.base_models, *towers)))
    if len(bases) == 1:
        yield f"base_model: {bases[0]}"
    elif bases:
        yield "base_model:"
        yield from (f"- {base}" for base in bases)
    yield "library_name: mlx"
    license_id, license_name = _license(provenance)
    yield f"license: {license_id}"
    if license_name:
        yield f'license_name: "{license_name}"'
    if license_id == "other" and provenance.license_files:
        yield f'license_link: "{next(iter(provenance.license_files))}"'
    yield "pipeline_tag: image-text-to-text"
    yield "tags:"
    yield "- fastvlm"
    yield "- mlx"
    yield "---"
    yield ""


def _license(provenance: Provenance) -> tuple[str, str | None]:
    """Return the hub's id of the licence of the whole, and its name where it has one."""
    if provenance.is_apple:  # nobody but Apple can put its weights under other terms
        return APPLE_LICENSE, None
    parts = (provenance, provenance.tower) if provenance.tower else (provenance,)
    first, *others = ((part.license or "other", part.license_name) for part in parts)
    return first if all(other == first for other in others) else ("other", None)


def _license_paragraph(provenance: Provenance) -> str:
    if provenance.is_own:
        return "Trained from scratch by the fastvlm-mlx project. Same licence as the project."
    tower = provenance.tower
    named = provenance.license_name or provenance.license
    stated = [f"The source names its licence: {named}."] if named else []
    if tower and (tower.license_name or tower.license):
        stated.append(f"Its vision tower's: {tower.license_name or tower.license}.")
    beside = []
    if provenance.license_files:
        whose = "The sources' licence files are" if tower else "The source's licence files are"
        beside = [f"{whose} beside this card: {_names(provenance.license_files)}."]
    if provenance.is_apple:
        return " ".join((_APPLE_TERMS, *beside))
    return " ".join(
        (*stated, *beside, f"For what derives from Apple's own weights: {_APPLE_TERMS}")
    )


def _sizes(
    config: ModelConfig, dtype: str, bits_per_weight: float, *, tower: str, fitting: str
) -> dict[str, str]:
    side, decoder = config.vision.image_size, config.decoder
    head = "tied" if decoder.tied else "with its own head"
    return {
        "pictures": f"{side}x{side} pixels, {fitting}; {config.vision.tokens(side, side)} tokens",
        "decoder": f"Qwen2, {decoder.num_layers} layers of {decoder.hidden_size}, "
        f"vocabulary {decoder.vocab_size}, {head}",
        "context": f"{decoder.max_positions} positions",
        "vision tower": tower,
        "projector, decoder": _weights(config, dtype),
        "bits per weight": f"{bits_per_weight:.2f}",
    }


def _weights(config: ModelConfig, dtype: str) -> str:
    quant = config.quant
    if quant is None:
        return dtype
    settings = [_setting(quant.bits, quant.group_size, quant.mode)]
    for setting, count in Counter(quant.overrides.values()).most_common():
        modules = "1 module" if count == 1 else f"{count} modules"
        settings.append(f"{modules} with {_setting(*setting)}")
    return "; ".join((*settings, f"rest {dtype}"))


def _setting(bits: int, group_size: int, mode: str) -> str:
    return f"{bits} bits, {mode}, groups of {group_size}"


def _code(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
