"""Extra lessons for the tower: which shape, colour or digit sits in which of its 4x4 cells.

Knows how to turn a scene into targets and how to score the tower's features against them. The
two small heads exist in training only: without them the tower learns colours from the answers
within minutes, but shapes and digits very slowly. Refuses to know about questions.
"""

from __future__ import annotations

import numpy as np
import torch
from painting import COLOURS, SHAPES
from scenes import Scene
from torch import Tensor, nn
from torch.nn import functional

CELLS = 4
DIGITS = 2  # places a number may have; class 10 is "no digit"
LABELS = (*SHAPES, *COLOURS, *"0123456789")


class LandmarkHeads(nn.Module):
    """Reads labels off each cell, and the whole number off all cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(width, len(LABELS), 1)
        self.narrow = nn.Conv2d(width, 32, 1)
        self.number = nn.Linear(32 * CELLS * CELLS, DIGITS * 11)
        nn.init.constant_(self.cells.bias, -3.0)

    def forward(self, features: Tensor, cells: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, share of digits read right); features are [n, width, CELLS, CELLS]."""
        loss = functional.binary_cross_entropy_with_logits(
            self.cells(features), cells, reduction="sum"
        )
        loss = loss / cells.sum()
        read = self.number(functional.gelu(self.narrow(features)).flatten(1)).view(-1, 11)
        wanted = digits.flatten()
        shown = (wanted >= 0) & (wanted < 10)
        right = (read.argmax(-1) == wanted)[shown].float().mean()
        return loss + functional.cross_entropy(read, wanted, ignore_index=-1), right


def cell_of(scene: Scene, x: float, y: float) -> int:
    """Which of the CELLS x CELLS cells of the padded square a point of the picture is in."""
    width, height = scene.image.size
    side = max(width, height)
    column = int((x + (side - width) // 2) * CELLS / side)
    row = int((y + (side - height) // 2) * CELLS / side)
    return min(row, CELLS - 1) * CELLS + min(column, CELLS - 1)


def landmarks(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Targets: cells [n, labels, CELLS, CELLS] in 0..1, digits [n, DIGITS] (-1: not a number)."""
    cells = np.zeros((len(scenes), len(LABELS), CELLS, CELLS), np.float32)
    digits = np.full((len(scenes), DIGITS), -1, np.int64)
    for index, scene in enumerate(scenes):
        marks = [(s.x, s.y, (s.shape, s.colour)) for s in scene.shapes]
        marks += [
            (x, y, (digit, scene.number_colour))
            for digit, (x, y) in zip(scene.number, scene.digit_centres, strict=True)
        ]
        for x, y, labels in marks:
            row, column = divmod(cell_of(scene, x, y), CELLS)
            for label in labels:
                cells[index, LABELS.index(label), row, column] = 1
        if scene.number:
            digits[index] = [int(d) for d in scene.number] + [10] * (DIGITS - len(scene.number))
    return torch.from_numpy(cells), torch.from_numpy(digits)
