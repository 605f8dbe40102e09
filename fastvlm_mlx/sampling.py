"""How the next token is chosen: one frozen value object, validated when made. Knows no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastvlm_mlx.errors import FastVLMError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters; the default is greedy.

    `temperature` 0 takes the most likely token and ignores `top_p`, `top_k`, `min_p` and `seed`.
    `top_p` 1, `top_k` 0, `min_p` 0 and `repetition_penalty` 1 mean "off".
    `repetition_context` is how many of the latest prompt and answer ids the penalty looks at.
    `seed` None draws from MLX's global random state.

    Raises FastVLMError if a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0 and finite"),
            ("repetition_context", self.repetition_context > 0, "> 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "in [0, 2**64)"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise FastVLMError(f"{name} must be {expected}, not {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


GREEDY = Sampling()
