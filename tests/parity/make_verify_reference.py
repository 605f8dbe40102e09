"""What mlx-vlm itself says of the verifier's folders, each with a fault planted in it.

    python -m venv vlm && vlm/bin/pip install mlx-vlm==0.7.10 "mlx[cpu]==0.32.4"
    PYTHONPATH=.:tests/unit vlm/bin/python tests/parity/make_verify_reference.py    # 1 minute

Writes the folders of `tests/unit/header_folders.py` in a temporary folder, plants every fault of
`planted_faults.py` that fits, has mlx-vlm load each one (lazily: the weights are holes), and writes
`verify_mlx_vlm.json`: folder -> fault -> null, or the error's first words. Nothing of fastvlm_mlx
is imported.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import header_folders
from mlx_vlm.utils import load_model
from planted_faults import FAULTS

HERE = Path(__file__).parent


def load_error(folder: Path) -> str | None:
    """The type and first words of what mlx-vlm raises, None if it loads the folder."""
    try:
        load_model(folder, lazy=True)
    except Exception as error:  # whatever it raises is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return None


def main() -> None:
    report = {"mlx_vlm": version("mlx-vlm"), "folders": {}}
    for run in ("bf16", "q4"):
        said: dict[str, str | None] = {}
        with tempfile.TemporaryDirectory() as temporary:
            good = header_folders.write_native(Path(temporary) / "good", run)
            said["nothing"] = load_error(good)
            for name, plant in FAULTS.items():
                folder = header_folders.copy_folder(good, Path(temporary) / "bad")
                try:
                    plant(folder)
                    said[name] = load_error(folder)
                except (KeyError, AssertionError, FileNotFoundError):
                    pass  # a fault of other folders than this
                shutil.rmtree(folder)
        report["folders"][run] = said
    (HERE / "verify_mlx_vlm.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
