"""A Core ML package as a file: the same bytes each time, nothing beside it, one line when it fails.

What it computes is `tests/parity/test_coreml.py`'s.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import fastvlm_mlx
from fastvlm_mlx.checkpoint.store import Checkpoint, MappedTensor, open_checkpoint
from fastvlm_mlx.checkpoint.tensors import TensorReader
from fastvlm_mlx.convert.coreml import require_coremltools, write_tower_package
from fastvlm_mlx.errors import BackendError, CheckpointError, CheckpointMismatch

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

DEMO = Path(fastvlm_mlx.__file__).parent / "demo"
needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None,
    reason="coremltools has no release for this Python here",
)
WRITE = """
import sys
from pathlib import Path
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.convert.coreml import write_tower_package
write_tower_package(Path(sys.argv[1]), open_checkpoint(Path(sys.argv[2])))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
# One MiB a file, which the demo's weights are five times over.
WRITE_LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, -1))
try:
    exec({WRITE!r})
except OSError as error:
    sys.exit(f"{{error.errno}} {{error.filename}}")
"""


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def damaged(checkpoint: Checkpoint, name: str, tensor: MappedTensor | None) -> Checkpoint:
    """The checkpoint with another tensor under this name, or none."""
    tensors = {key: value for key, value in checkpoint.tensors.items() if key != name}
    return dataclasses.replace(
        checkpoint, tensors=tensors | ({name: tensor} if tensor is not None else {})
    )


@pytest.mark.slow
@needs_coremltools
def test_same_weights_give_the_same_bytes_without_torch_or_noise(
    demo: Checkpoint, tmp_path: Path
) -> None:
    """All three files: coremltools' ids are random, its maps unordered, its metadata has a date.

    It also imports torch and transformers where they are, and warns on Linux that it cannot run
    what it writes. Here in two processes with unlike hash seeds, one with a torch that complains.
    """
    planted = tmp_path / "planted/torch"
    planted.mkdir(parents=True)
    (planted / "__init__.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(planted.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "one.mlpackage"), str(DEMO)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"torch", "transformers", "tensorflow", "sklearn"} & set(done.stdout.split())
    write_tower_package(tmp_path / "two.mlpackage", demo)
    one, two = (contents(tmp_path / f"{name}.mlpackage") for name in ("one", "two"))
    assert set(one) == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }
    assert one == two
    manifest = json.loads(one["Manifest.json"])
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    assert root["path"] == "com.apple.CoreML/model.mlmodel"


@needs_coremltools
def test_a_failure_changes_nothing_for_the_next(demo: Checkpoint, tmp_path: Path) -> None:
    """coremltools counts names in a global; a tensor that is not finite ends a build half-way."""
    name = "vision.stages.3.blocks.0.norm.weight"

    class NotFinite(MappedTensor):
        def read(self, reader: TensorReader) -> mx.array:
            return mx.full(self.shape, float("nan"))

    stored = demo.tensors[name]
    broken = damaged(demo, name, NotFinite(stored.stored, stored.transform))
    write_tower_package(tmp_path / "one.mlpackage", demo)
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        write_tower_package(tmp_path / "none.mlpackage", broken)
    write_tower_package(tmp_path / "two.mlpackage", demo)
    assert contents(tmp_path / "one.mlpackage") == contents(tmp_path / "two.mlpackage")
    assert {path.name for path in tmp_path.iterdir()} == {"one.mlpackage", "two.mlpackage"}


@pytest.mark.slow
@needs_coremltools
def test_a_disk_that_refuses_is_an_os_error(tmp_path: Path) -> None:
    """coremltools' writers are C++ and say RuntimeError. A file size limit stands for the disk."""
    package = tmp_path / "fastvithd.mlpackage"
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LIMITED, str(package), str(DEMO)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.split() == [str(errno.EIO), str(package)]
    assert not list(tmp_path.glob("tmp*")), "copies of the weights are left"


def test_a_missing_tensor_is_named_before_anything_is_written(
    demo: Checkpoint, tmp_path: Path
) -> None:
    package = tmp_path / "fastvithd.mlpackage"
    with pytest.raises(CheckpointMismatch, match=r"vision\.expansion\.se\.expand\.bias is missing"):
        write_tower_package(package, damaged(demo, "vision.expansion.se.expand.bias", None))
    assert not package.exists()


def test_what_exists_is_not_replaced(demo: Checkpoint, tmp_path: Path) -> None:
    package = tmp_path / "fastvithd.mlpackage"
    package.mkdir()
    with pytest.raises(FileExistsError):
        write_tower_package(package, demo)
    assert not any(package.iterdir())


@pytest.mark.parametrize("library", ["coremltools", "coremltools.libmilstoragepython"])
def test_without_coremltools_one_line_says_so(
    library: str, demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source distribution installs anywhere, but lacks the compiled writer of weights."""
    monkeypatch.setitem(sys.modules, library, None)  # what makes an import fail
    with pytest.raises(BackendError, match="needs coremltools") as caught:
        require_coremltools()
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError):
        write_tower_package(tmp_path / "fastvithd.mlpackage", demo)
    assert not list(tmp_path.iterdir())
