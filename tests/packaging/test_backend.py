"""A missing, doubled or mismatched MLX backend is one line with the fix, not a loader's traceback.

Each case is real: distributions are `.dist-info` folders that importlib.metadata finds, and MLX
without its backend is a copy of the mlx package without `libmlx.so`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.backend import require_backend, select_device
from fastvlm_mlx.errors import BackendError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="backends are extras on Linux only")

PROBE = """
import sys
from fastvlm_mlx.backend import require_backend
from fastvlm_mlx.errors import BackendError
try:
    require_backend()
except BackendError as error:
    print(error)
"""


def message(site: Path, *, isolated: bool = False) -> str:
    """What `require_backend` says in a fresh interpreter with `site` first on its path.

    `isolated` leaves out the real site-packages (and with them the real backend).
    """
    repository = Path(__file__).parents[2]
    flags = ["-I", "-S"] if isolated else ["-I"]
    insert = f"import sys; sys.path[:0] = [{str(site)!r}, {str(repository)!r}]\n"
    done = subprocess.run(
        [sys.executable, *flags, "-c", insert + PROBE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") <= 1, "the message is one line"
    return done.stdout.strip()


def add_distribution(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def add_mlx_without_library(site: Path) -> None:
    """The mlx package as `pip install mlx` leaves it on Linux: its extension, no libmlx.so."""
    spec = importlib.util.find_spec("mlx.core")
    assert spec is not None and spec.origin is not None
    extension = Path(spec.origin)
    (site / "mlx").mkdir(parents=True)
    (site / "mlx" / extension.name).write_bytes(extension.read_bytes())


def test_the_installed_backend_is_accepted() -> None:
    require_backend()


@linux_only
@pytest.mark.parametrize("cuda", ["12", "13"])
def test_cpu_and_cuda_backends_together_are_refused_with_the_fix(tmp_path: Path, cuda: str) -> None:
    """Both ship libmlx.so; the last one installed silently wins, until an upgrade swaps them."""
    add_distribution(tmp_path, "mlx-cpu", "0.32.4")
    add_distribution(tmp_path, f"mlx-cuda-{cuda}", "0.32.4")
    said = message(tmp_path)
    assert f"mlx-cpu and mlx-cuda-{cuda} are installed together" in said
    assert f"pip uninstall -y mlx-cpu mlx-cuda-{cuda} && pip install" in said
    assert f"'fastvlm-mlx[cuda{cuda}]'" in said


@linux_only
def test_two_cuda_backends_together_are_refused(tmp_path: Path) -> None:
    add_distribution(tmp_path, "mlx-cuda-12", "0.32.4")
    add_distribution(tmp_path, "mlx-cuda-13", "0.32.4")
    assert "pip uninstall -y mlx-cuda-12 mlx-cuda-13" in message(tmp_path, isolated=True)


@linux_only
def test_mlx_without_a_backend_names_the_extra(tmp_path: Path) -> None:
    """Other ports end in `ImportError: libmlx.so: cannot open shared object file`."""
    add_mlx_without_library(tmp_path)
    add_distribution(tmp_path, "mlx", "0.32.4")
    said = message(tmp_path, isolated=True)
    assert said.startswith("MLX has no backend")
    assert "pip install 'fastvlm-mlx[cpu]'" in said


@linux_only
def test_a_backend_left_behind_by_an_upgrade_is_named(tmp_path: Path) -> None:
    """`pip install -U mlx` upgrades mlx alone: pip was not asked for the extra again."""
    add_mlx_without_library(tmp_path)
    add_distribution(tmp_path, "mlx", "0.32.4")
    add_distribution(tmp_path, "mlx-cpu", "0.32.2")
    said = message(tmp_path, isolated=True)
    assert said == "mlx 0.32.4 and mlx-cpu 0.32.2 do not match; run: pip install mlx-cpu==0.32.4"


@linux_only
def test_a_cuda_backend_that_does_not_load_points_at_the_driver(tmp_path: Path) -> None:
    add_mlx_without_library(tmp_path)
    add_distribution(tmp_path, "mlx", "0.32.4")
    add_distribution(tmp_path, "mlx-cuda-12", "0.32.4")
    said = message(tmp_path, isolated=True)
    assert "NVIDIA driver" in said and "libmlx.so" in said
    assert "pip uninstall -y mlx-cuda-12 && pip install 'fastvlm-mlx[cpu]'" in said


def test_no_mlx_at_all_names_the_install(tmp_path: Path) -> None:
    assert message(tmp_path, isolated=True).startswith("MLX is not installed; run: pip install")


def select_in_fresh_process(body: str, env: dict[str, str] | None = None) -> str:
    """Run `body` after imports in a new process: device and compile switches are global."""
    code = "import mlx.core as mx\nfrom fastvlm_mlx.backend import select_device\n" + body
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_selecting_the_cpu_stops_mlx_from_compiling(tmp_path: Path) -> None:
    """On a CPU `mx.compile` runs g++ for each new chain of operations, at the user's first picture.

    A g++ that only notes its arguments shows it: MLX may look whether there is one, not more.
    """
    calls = tmp_path / "calls"
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    compiler.chmod(0o755)
    body = (
        "select_device('cpu')\n"
        "f = mx.compile(lambda x: mx.exp(x) * x + x)\n"
        "mx.eval(f(mx.ones((4,))))\n"
    )
    env = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    select_in_fresh_process(body, env)
    noted = calls.read_text() if calls.exists() else ""
    assert "-shared" not in noted


def test_the_default_device_is_mlx_own() -> None:
    body = "before = mx.default_device(); print(select_device() == before == select_device(None))"
    assert select_in_fresh_process(body) == "True"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(BackendError, match="unknown device 'tpu': use cpu or gpu"):
        select_device("tpu")


def test_asking_for_a_gpu_where_there_is_none_is_one_line() -> None:
    body = (
        "from fastvlm_mlx.errors import BackendError\n"
        "try:\n    print(select_device('gpu').type == mx.DeviceType.gpu)\n"
        "except BackendError as error:\n    print(mx.is_available(mx.gpu), error)\n"
    )
    said = select_in_fresh_process(body)
    assert said == "True" or said.startswith("False no GPU is usable here")


@linux_only
@pytest.mark.parametrize("words", [["generate", "-p", "Hello"], ["inspect", "demo"]])
def test_the_command_says_so_too(tmp_path: Path, words: list[str]) -> None:
    """`pip install .` without an extra, the likeliest slip, was reported as a bug of ours."""
    add_mlx_without_library(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        f"from fastvlm_mlx.cli.main import main; sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("fastvlm: error: MLX ")
    assert "bug" not in done.stderr
