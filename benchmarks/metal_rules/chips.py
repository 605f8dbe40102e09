"""Apple GPUs as MLX tells them apart: a generation and the last letter of the architecture's name.

MLX reads both from names like `applegpu_g16s`: `g` is a base chip, `s` a Pro or a Max (M4 Max
reports it, ml-explore/mlx#3885, where Pro is said to share it), `d` an Ultra, `p` a phone.
"""

from __future__ import annotations

from dataclasses import dataclass

# metal::is_nax_available (mlx/backend/metal/device.cpp:947-965 @ 846d1762); macOS 26.2 as well.
_NAX_GENERATION = {"p": 18}
_NAX_GENERATION_OF_OTHERS = 17


@dataclass(frozen=True, slots=True)
class Chip:
    """A class of GPUs that MLX's rules do not tell apart further."""

    name: str
    generation: int
    letter: str

    @property
    def nax(self) -> bool:
        """Whether MLX uses its matrix units (macOS 26.2 or later, the wheel built for it)."""
        return self.generation >= _NAX_GENERATION.get(self.letter, _NAX_GENERATION_OF_OTHERS)

    @property
    def large(self) -> bool:
        """Whether it is one of the larger chips by its letter, `s` or `d`."""
        return self.letter in "sd"


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        *(
            Chip(f"m{n}{suffix}", 12 + n, letter)
            for n in (1, 2, 3, 4, 5)
            for suffix, letter in (("", "g"), ("-max", "s"), ("-ultra", "d"))
        ),
        Chip("a17-pro", 16, "p"),
        Chip("a18", 17, "p"),
        Chip("a19", 18, "p"),
    )
    if chip.name not in ("m4-ultra", "m5-ultra")
}
