"""Which cases `fastvlm bench` measures: all combinations of what was asked for, or a sweep's range.

Knows options and the model's sizes; measures nothing.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

from fastvlm_mlx.bench import sweeps
from fastvlm_mlx.bench.harness import Say, require_room
from fastvlm_mlx.bench.results import Case, Report
from fastvlm_mlx.config import ModelConfig, VisionConfig
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.prompt.processor import Processor


def make_cases(given: dict[str, Any], config: ModelConfig) -> tuple[Case, ...]:
    """Return every combination of what was asked for, or the sweep's values where nothing was."""
    defaults: dict[str, tuple[Any, ...]] = {
        "resolution": (config.vision.image_size,),
        "images": (1,),
        "prompt": ("short",),
    }
    swept = {
        "resolution": sweeps.RESOLUTIONS,
        "images": sweeps.IMAGE_COUNTS,
        "prompt": tuple(f"{count} words" for count in sweeps.PROMPT_WORDS),
    }
    if given["sweep"] in swept:
        defaults[given["sweep"]] = swept[given["sweep"]]
    chosen = [given[name] or default for name, default in defaults.items()]
    return tuple(
        Case(resolution=pixels, images=images, prompt=prompt, max_tokens=given["max_tokens"])
        for pixels, images, prompt in product(*chosen)
    )


def fitting(
    cases: tuple[Case, ...],
    given: dict[str, Any],
    config: ModelConfig,
    processor: Processor,
    say: Say,
) -> tuple[Case, ...]:
    """Return those cases of a sweep's own range that the model can take, and name the others.

    Raises FastVLMError for a case that was asked for and does not fit, or if none does.
    """
    if given.get(given["sweep"], ()) is not None:  # no sweep, or over values given
        for case in cases:
            require_room(case, config, processor)
        return cases
    found: list[Case] = []
    for case in cases:
        try:
            require_room(case, config, processor)
        except FastVLMError as error:
            say(f"left out of the sweep: {error}")
        else:
            found.append(case)
    if not found:
        raise FastVLMError("no case of the sweep fits this model: give a smaller --resolution")
    return tuple(found)


def require_their_tower(config: ModelConfig) -> None:
    """Refuse a model whose tower mlx-vlm cannot load: it knows the sizes of Apple's alone."""
    apple = dataclasses.replace(VisionConfig(), image_size=config.vision.image_size)
    if config.vision != apple:
        raise FastVLMError(
            "mlx-vlm takes only towers of Apple's size: compare with --size 0.5b, or a model of "
            "Apple's"
        )


def require_common(cases: tuple[Case, ...], saved: tuple[Report, ...]) -> None:
    """Refuse a comparison with a saved result that would end empty, before it is measured."""
    there = dict.fromkeys(result.case for report in saved for result in report.cases)
    if saved and not set(there) & set(cases):
        names = "; ".join(case.name for case in there) or "none"
        raise FastVLMError(f"no case of this run is in the result to compare with: it has {names}")
