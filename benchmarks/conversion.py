"""Time and peak memory of convert and quantize at a real size, on random weights on disk.

    python benchmarks/conversion.py --size 7b                # 35 GB of disk for a while, 10 minutes
    python benchmarks/conversion.py --size 0.5b --bits 4     # 3 GB

Writes a checkpoint in Apple's layout (bfloat16, shards of at most 5 GB, names and shapes of the
released ones), then runs `fastvlm convert` and `fastvlm quantize --bits N` on it, each as a process
of its own whose peak resident memory the system reports. Everything is removed at the end. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastvlm_mlx as fv
from fastvlm_mlx.config import PRESETS, DecoderConfig

ROOT = Path(__file__).parents[1]
TOWER_KEYS = ROOT / "tests" / "parity" / "keys_apple_fused.json"
SHARD_BYTES = 5 * 10**9
BLOCK = 2**22
Shapes = dict[str, tuple[int, ...]]


def qwen2_shapes(sizes: DecoderConfig, prefix: str) -> Shapes:
    """Return the tensors of a Qwen2 of these sizes, but for its head."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    narrow = hidden // sizes.num_heads * sizes.num_kv_heads
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (sizes.vocab_size, hidden),
        f"{prefix}norm.weight": (hidden,),
    }
    for layer in range(sizes.num_layers):
        at = f"{prefix}layers.{layer}."
        for name, width in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (width, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def shapes_of(size: str) -> Shapes:
    sizes = PRESETS[size].decoder
    hidden, rows = sizes.hidden_size, sizes.vocab_size
    shapes: Shapes = {k: tuple(s) for k, s in json.loads(TOWER_KEYS.read_text()).items()}
    shapes |= {
        "model.mm_projector.0.weight": (hidden, 3072),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    return shapes | qwen2_shapes(sizes, "model.")


def config_of(size: str) -> dict[str, Any]:
    sizes = PRESETS[size].decoder
    return {
        "eos_token_id": 151645,
        "hidden_size": sizes.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": 32768,
        "mm_hidden_size": 3072,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "mobileclip_l_1024",
        "model_type": "llava_qwen2",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": sizes.tied,
        "tokenizer_model_max_length": 8192,
        "vocab_size": sizes.vocab_size,
    }


def write_tokenizer(folder: Path, rows: int) -> None:
    """The demo's vocabulary with Qwen2's control tokens where Qwen2 has them."""
    demo = json.loads((Path(fv.__file__).parent / "demo" / "tokenizer.json").read_text())
    words = [w for w in demo["model"]["vocab"] if not w.startswith("<")]
    vocab = {word: number for number, word in enumerate(words)}
    vocab |= {f"<unused {number}>": number for number in range(len(vocab), 151643)}
    controls = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    merges = [m if isinstance(m, str) else " ".join(m) for m in demo["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    added = {token: 151643 + number for number, token in enumerate(controls)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert max(vocab.values()) < rows


def values(key: str, shape: tuple[int, ...], dtype: str) -> Iterator[bytes]:
    """Normal values seeded by the key; the first block is repeated, which no code can tell."""
    count = math.prod(shape)
    if dtype == "I64":
        yield bytes(8 * count)
        return
    random = np.random.default_rng(zlib.crc32(key.encode()))
    block = random.standard_normal(min(count, BLOCK), np.float32) * 0.02
    bits = (np.abs(block) + 1e-3 if len(shape) < 2 else block).view(np.uint32) >> 16
    halves = bits.astype(np.uint16)
    for start in range(0, count, BLOCK):
        yield halves[: min(BLOCK, count - start)].tobytes()


def write_checkpoint(folder: Path, size: str) -> int:
    """Return the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(size)))
    write_tokenizer(folder, PRESETS[size].decoder.vocab_size)
    rows = []
    for key, shape in shapes_of(size).items():
        dtype = "I64" if key.endswith("num_batches_tracked") else "BF16"
        rows.append((key, dtype, shape, math.prod(shape) * (8 if dtype == "I64" else 2)))
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    for row in rows:
        if sum(r[3] for r in shards[-1]) + row[3] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(row)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for key, dtype, shape, nbytes in shard:
            header[key] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key, dtype, shape, _ in shard:
                # In the smaller sizes the head is the embedding's copy.
                copied = key == "lm_head.weight" and PRESETS[size].decoder.tied
                seed = "model.embed_tokens.weight" if copied else key
                file.writelines(values(seed, shape, dtype))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(row[3] for row in rows)


def measured(*arguments: str) -> dict[str, float | int]:
    """Run `fastvlm`, and return its wall seconds, processor seconds and peak resident bytes."""
    started = time.perf_counter()
    run = "import sys; from fastvlm_mlx.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", run, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fastvlm {' '.join(arguments)} failed")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_resident_bytes": usage.ru_maxrss * scale,
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def largest_shard(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=PRESETS, default="7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to work; removed from it at the end")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fastvlm-conversion-", dir=options.folder))
    try:
        source, native, packed = work / "source", work / "native", work / "packed"
        result: dict[str, Any] = {"size": options.size, "bits": options.bits}
        result["source_bytes"] = write_checkpoint(source, options.size)
        print(f"source: {result['source_bytes'] / 1e9:.2f} GB", flush=True)
        result["convert"] = measured("convert", str(source), str(native))
        result["convert"]["bytes"] = folder_bytes(native)
        result["largest_shard_bytes"] = largest_shard(native)
        shutil.rmtree(native)
        result["quantize"] = measured(
            "quantize", str(source), str(packed), "--bits", str(options.bits)
        )
        result["quantize"]["bytes"] = folder_bytes(packed)
    finally:
        shutil.rmtree(work)
    for name in ("convert", "quantize"):
        step = result[name]
        print(
            f"{name}: {step['seconds']} s, {step['peak_resident_bytes'] / 2**30:.2f} GiB peak, "
            f"{step['bytes'] / 1e9:.2f} GB written"
        )
    limit = result["largest_shard_bytes"] + 2 * 2**30
    result["within_limit"] = all(
        result[name]["peak_resident_bytes"] < limit for name in ("convert", "quantize")
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
