"""Prove `fusing.py` against timm's own `reparameterize_model`, and record the largest difference.

    pip install torch==2.15.0 timm==1.0.31
    python tests/parity/make_fusing_proof.py        # writes fusing.json; 1 minute, 4 GB

Both work in float64 on the same frozen training-form weights, real size and small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import frozen
import fusing
import numpy as np
import timm
import torch
from make_tower_reference import SMALL_ARGS
from timm.utils.model import reparameterize_model


def largest_difference(args: dict[str, Any]) -> dict[str, float | int]:
    """Return the largest absolute difference of any fused value, and what was compared."""
    torch.set_default_dtype(torch.float64)  # timm creates the fused convolutions with the default
    model = timm.create_model("fastvit_mci3", num_classes=0, **args).eval()
    state = {
        key: frozen.tensor(key, tuple(value.shape), round_to="bfloat16")
        for key, value in model.state_dict().items()
    }
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    model.load_state_dict(tensors, strict=True)
    theirs = {key: value.numpy() for key, value in reparameterize_model(model).state_dict().items()}
    ours = fusing.fuse_tower(state)
    if theirs.keys() != ours.keys():
        raise SystemExit(f"keys differ: {sorted(theirs.keys() ^ ours.keys())[:8]}")
    for key, value in theirs.items():
        if value.shape != ours[key].shape:
            raise SystemExit(f"{key}: {value.shape} and {ours[key].shape}")
    worst = max(float(np.abs(theirs[key] - ours[key]).max()) for key in theirs)
    return {"tensors": len(theirs), "largest_absolute_difference": worst}


def main() -> None:
    report = {
        "timm": timm.__version__,
        "small": largest_difference(SMALL_ARGS),
        "real": largest_difference({}),
    }
    text = json.dumps(report, indent=1)
    Path(__file__).with_name("fusing.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
