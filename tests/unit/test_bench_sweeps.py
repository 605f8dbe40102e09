"""A sweep's values: in order, on the model's grid, and within its context."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm_mlx.bench import inputs, sweeps
from fastvlm_mlx.config import PRESETS, ModelConfig
from fastvlm_mlx.prompt.tokenizer import Tokenizer

DEMO = Path(inputs.__file__).parents[1] / "demo"


@pytest.mark.parametrize("values", [sweeps.RESOLUTIONS, sweeps.PROMPT_WORDS, sweeps.IMAGE_COUNTS])
def test_values_grow(values: tuple[int, ...]) -> None:
    assert len(values) >= 4 and list(values) == sorted(set(values))


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_value_fits_every_size(config: ModelConfig) -> None:
    """The tower takes each resolution; the longest prompt, beside a picture, is in the context."""
    tokens = [config.vision.tokens(side, side) for side in sweeps.RESOLUTIONS]
    assert (tokens[0], tokens[-1]) == (16, 576)
    tokenizer = Tokenizer.from_folder(DEMO)
    longest = len(tokenizer.encode(inputs.words(sweeps.PROMPT_WORDS[-1])))
    assert longest > 2048, "longer than one pass of prefill"
    most = max(longest + 256, sweeps.IMAGE_COUNTS[-1] * tokens[-1])
    assert most + 512 < config.decoder.max_positions
