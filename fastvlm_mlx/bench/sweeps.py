"""Which values a sweep goes through, where the command line names none.

Knows the ranges that show how a cost grows, from the smallest picture of use to beyond the model's
own, from a few words to a long text. Measures nothing; packing is `synthetic.BITS`.
"""

from __future__ import annotations

RESOLUTIONS = (256, 384, 512, 768, 1024, 1280, 1536)
"""Pixels a side, multiples of the tower's 64."""
PROMPT_WORDS = (8, 64, 128, 256, 512, 1024)
"""Words of the prompt; its tokens are counted in the run."""
IMAGE_COUNTS = (1, 2, 3, 4)
"""Pictures in one prompt."""
