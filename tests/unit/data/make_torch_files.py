"""Makes the small torch files beside it with torch itself (2.15 made those committed).

    python tests/unit/data/make_torch_files.py

Values follow formulas that test_torch_file.py repeats in numpy.
"""

from __future__ import annotations

from pathlib import Path

import torch

HERE = Path(__file__).parent
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip


def ramp(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) * 0.5).reshape(shape)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3, _weight=ramp(4, 3))
        self.norm = torch.nn.BatchNorm2d(2)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def main() -> None:
    torch.save(Tied().state_dict(), HERE / "module.bin")
    base = ramp(4, 6)
    views = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "columns": base[:, 1::2],
        "permuted": ramp(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([[True, False], [False, True]]),
        "parameter": torch.nn.Parameter(ramp(2, 2).to(torch.bfloat16)),
    }
    views |= {str(dtype).removeprefix("torch."): ramp(5).to(dtype) for dtype in DTYPES}
    torch.save(views, HERE / "views.bin")
    torch.save(views, HERE / "views_protocol4.bin", pickle_protocol=4)
    small = {"a": ramp(2)}
    torch.save(small, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": small, "epoch": 3}, HERE / "nested.bin")
    torch.save({"a": torch.tensor([1, 2], dtype=torch.uint16)}, HERE / "uint16.bin")
    torch.save(torch.nn.Linear(1, 1), HERE / "whole_module.bin")
    torch.jit.script(torch.nn.ReLU()).save(HERE / "script.bin")


if __name__ == "__main__":
    main()
