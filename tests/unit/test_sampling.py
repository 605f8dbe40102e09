"""Sampling parameters are checked when they are given, not when they have done harm."""

from __future__ import annotations

import math

import pytest

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.sampling import GREEDY, Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_context", 0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(FastVLMError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_the_default_is_greedy() -> None:
    assert Sampling() == GREEDY
    assert GREEDY.greedy
    assert not Sampling(temperature=0.1).greedy
