"""Reference features of the vision tower: timm's `fastvit_mci3` as transformers' fast_vlm runs it.

    pip install torch==2.15.0 timm==1.0.31 transformers==5.23.0     # CPU; no GPU was used
    python tests/parity/make_tower_reference.py                     # about 3 minutes, 6 GB

Weights come from `frozen.py`, rounded to bfloat16 values so that a bfloat16 checkpoint holds the
same ones; pixels are `frozen.picture(height, width, seed)` / 255 in the order [1, 3, H, W]. The
tower runs in float64, so what a float32 engine differs from it by is the engine's own rounding.
Writes `tower.npz`, `tower_small.npz`, the key inventories `keys_*.json`
and `config_fast_vlm.json`, as transformers saves it for 0.5B. Imports none of
fastvlm_mlx. Names in the archives: `<case>` features [tokens, channels] float32 (row-major over
the grid), `<case>.tokens` which tokens those are, `<case>.rms` of all tokens, `<case>.mean` and
`<case>.std` over the tokens, a channel each; `cases` is the JSON text that describes them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import frozen
import numpy as np
import timm
import torch
import transformers
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

HERE = Path(__file__).parent

# name: (model_args beyond inference_mode, fused?, height, width, picture seed, every n-th token)
REAL: dict[str, tuple[bool, int, int, int, int]] = {
    "fused_256": (True, 256, 256, 1, 1),
    "fused_192x320": (True, 192, 320, 2, 1),
    "training_256": (False, 256, 256, 3, 1),
    "fused_1024": (True, 1024, 1024, 4, 17),
}
# Every kind of module once; widths grow by 2, 1, 2 and 3 between stages.
SMALL_ARGS: dict[str, Any] = {"layers": [1, 2, 1, 2, 1], "embed_dims": [16, 32, 32, 64, 192]}
SMALL: dict[str, tuple[bool, int, int, int, int]] = {
    "fused_128": (True, 128, 128, 5, 1),
    "fused_64x192": (True, 64, 192, 6, 1),
    "training_128": (False, 128, 128, 5, 1),
    "training_192x64": (False, 192, 64, 7, 1),
}


def tower(fused: bool, **model_args: Any) -> TimmWrapperModel:
    """Return transformers' wrapper around timm's tower with frozen weights, float64, eval mode."""
    config = TimmWrapperConfig(
        architecture="fastvit_mci3", model_args={"inference_mode": fused, **model_args}
    )
    model = TimmWrapperModel(config).eval()
    state = {
        key: torch.from_numpy(
            np.array(frozen.tensor(key, tuple(value.shape), round_to="bfloat16"))
        ).to(value.dtype)
        for key, value in model.timm_model.state_dict().items()
    }
    model.timm_model.load_state_dict(state, strict=True)
    return model.double()


@torch.inference_mode()
def features(model: TimmWrapperModel, height: int, width: int, seed: int) -> np.ndarray:
    """Return [tokens, channels] float64, as FastVlmModel.get_image_features shapes them."""
    pixels = torch.from_numpy(frozen.picture(height, width, seed)).permute(2, 0, 1)[None]
    hidden = model(pixels.double() / 255, return_dict=True).last_hidden_state
    return hidden.flatten(2).permute(0, 2, 1)[0].numpy()


def write_cases(
    path: Path, cases: dict[str, tuple[bool, int, int, int, int]], args: dict[str, Any]
) -> None:
    """Run the cases and write one archive."""
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for fused in (True, False):
        model = tower(fused, **args)
        for name, (form, height, width, seed, step) in cases.items():
            if form is not fused:
                continue
            started = time.perf_counter()
            every = features(model, height, width, seed)
            print(f"{path.name} {name} {every.shape} {time.perf_counter() - started:.0f} s")
            tokens = np.arange(0, len(every), step)
            arrays[name] = every[tokens].astype(np.float32)
            arrays[f"{name}.tokens"] = tokens
            arrays[f"{name}.rms"] = np.sqrt(np.mean(every**2))
            arrays[f"{name}.mean"] = every.mean(0).astype(np.float32)
            arrays[f"{name}.std"] = every.std(0).astype(np.float32)
            described[name] = {
                "fused": fused,
                "height": height,
                "width": width,
                "seed": seed,
                "dtype": "float64",
            }
    info = {
        "model_args": args,
        "cases": described,
        "versions": {m.__name__: m.__version__ for m in (torch, timm, transformers)},
    }
    np.savez_compressed(path, **arrays, cases=np.array(json.dumps(info)))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def write_keys(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write key -> shape, one line a key, sorted."""
    rows = (f" {json.dumps(key)}: {list(state[key].shape)}" for key in sorted(state))
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def write_inventories() -> None:
    """Write timm's key inventories, real and small, and fast_vlm 0.5B's; no weights are made."""
    with torch.device("meta"):
        for name, fused in (("fused", True), ("training", False)):
            for size, args in (("", {}), ("small_", SMALL_ARGS)):
                model = timm.create_model(
                    "fastvit_mci3", num_classes=0, inference_mode=fused, **args
                )
                write_keys(HERE / f"keys_timm_{size}{name}.json", model.state_dict())
        text = {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 152000,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        }
        config = FastVlmConfig(text_config=text, image_seq_length=256)
        config.to_json_file(HERE / "config_fast_vlm.json")
        write_keys(
            HERE / "keys_fast_vlm.json", FastVlmForConditionalGeneration(config).state_dict()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="keys, small, real; all when none is named")
    parts = parser.parse_args().part or ["keys", "small", "real"]
    if "keys" in parts:
        write_inventories()
    if "small" in parts:
        write_cases(HERE / "tower_small.npz", SMALL, SMALL_ARGS)
    if "real" in parts:
        write_cases(HERE / "tower.npz", REAL, {})


if __name__ == "__main__":
    main()
