"""What mlx-vlm's own convert makes of an Apple checkpoint with a real-size tower: its inventory.

    python -m venv vlm && vlm/bin/pip install mlx-vlm==0.7.10 "mlx[cpu]==0.32.4"
    vlm/bin/python tests/parity/make_mlx_vlm_reference.py      # 2 minutes, 3 GB, 1 GB of disk

Writes a `llava_qwen2` folder (real tower and a tiny decoder, frozen weights, bfloat16) in a
temporary folder, runs

    python -m mlx_vlm convert --hf-path SRC --mlx-path DST                      (bf16)
    python -m mlx_vlm convert --hf-path SRC --mlx-path DST --dtype float32      (f32)
    python -m mlx_vlm convert --hf-path SRC --mlx-path DST -q --q-bits 4        (q4)

and writes `mlx_vlm_convert.json`: for each, key -> [dtype, shape, crc32 of the bytes], and the
config.json and file names it left. Nothing of fastvlm_mlx is imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import source_folders
import sources

HERE = Path(__file__).parent
RUNS: dict[str, list[str]] = {
    "bf16": [],
    "f32": ["--dtype", "float32"],
    "q4": ["-q", "--q-bits", "4"],
}


def inventory(folder: Path) -> dict[str, Any]:
    """Return key -> [dtype, shape, crc32] of every safetensors file, read by its own header."""
    rows: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for key, entry in header.items():
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                crc = zlib.crc32(file.read(end - start))
                rows[key] = [entry["dtype"], entry["shape"], crc]
    return dict(sorted(rows.items()))


def one_line_a_tensor(report: dict[str, Any]) -> str:
    """Return JSON that a person can compare line by line."""
    tables = {}
    for name, run in report["runs"].items():
        rows = (f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in run["tensors"].items())
        tables[json.dumps(f"@{name}")] = "{\n" + ",\n".join(rows) + "\n }"
        run["tensors"] = f"@{name}"
    text = json.dumps(report, indent=1)
    for mark, table in tables.items():
        text = text.replace(mark, table)
    return text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=HERE.parents[1] / "fastvlm_mlx" / "demo")
    tokenizer = parser.parse_args().tokenizer
    shapes = json.loads((HERE / "keys_timm_fused.json").read_text())
    report: dict[str, Any] = {"mlx_vlm": version("mlx-vlm"), "mlx": version("mlx"), "runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source_folders.write_apple(source, sources.frozen_source(shapes, tokenizer), "BF16")
        config = json.loads((source / "config.json").read_text())
        del config["vision_config"]  # a real checkpoint of Apple's has none
        (source / "config.json").write_text(json.dumps(config))
        for name, options in RUNS.items():
            target = Path(temporary) / name
            command = [sys.executable, "-m", "mlx_vlm", "convert", "--hf-path", str(source)]
            subprocess.run([*command, "--mlx-path", str(target), *options], check=True)
            report["runs"][name] = {
                "options": options,
                "files": sorted(path.name for path in target.iterdir()),
                "config": json.loads((target / "config.json").read_text()),
                "tensors": inventory(target),
            }
    (HERE / "mlx_vlm_convert.json").write_text(one_line_a_tensor(report))


if __name__ == "__main__":
    main()
