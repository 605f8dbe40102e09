"""What is shipped: the linked folders as real files, the demo model, and nothing top-level besides.

Builds call setuptools' own build hooks in this environment, so no network is needed.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.tree import copy_repository

pytestmark = pytest.mark.slow


def build(tree: Path, hook: str, out: Path) -> Path:
    """Run a PEP 517 hook (`build_wheel`, `build_sdist`) in `tree`; return the file it made."""
    out.mkdir(exist_ok=True)
    code = f"import sys, setuptools.build_meta as b; b.{hook}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, check=True, capture_output=True
    )
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_repository(tmp_path_factory.mktemp("built") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build(tree, "build_wheel", tree.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return build(tree, "build_sdist", tree.parent / "sdist")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_one_top_level_package(wheel: Path) -> None:
    """A top-level `convert` or `quantize` would collide with everybody else's."""
    top = {name.partition("/")[0] for name in names_in(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastvlm_mlx"}


def test_the_wheel_holds_every_module_of_the_package_once(wheel: Path, tree: Path) -> None:
    """Also those behind the links, as real files."""
    linked = {"convert": tree / "convert", "quantize": tree / "quantize"}
    expected = {
        f"fastvlm_mlx/{folder}/{path.relative_to(root)}"
        for folder, root in linked.items()
        for path in root.rglob("*.py")
    }
    package = tree / "fastvlm_mlx"
    for path in package.rglob("*.py"):  # rglob does not go through links
        expected.add(f"fastvlm_mlx/{path.relative_to(package)}")
    assert "fastvlm_mlx/convert/__init__.py" in expected
    assert {name for name in names_in(wheel) if name.endswith(".py")} == expected


def test_the_wheel_holds_no_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        kinds = {info.external_attr >> 28 for info in archive.infolist()}
    assert 0o12 not in kinds


def test_the_wheel_holds_types_and_the_demo_model(wheel: Path, tree: Path) -> None:
    names = names_in(wheel)
    assert "fastvlm_mlx/py.typed" in names
    demo = {f"fastvlm_mlx/demo/{path.name}" for path in (tree / "fastvlm_mlx/demo").iterdir()}
    assert "fastvlm_mlx/demo/config.json" in demo
    assert any(name.endswith(".safetensors") for name in demo)
    assert demo <= names


def test_the_wheel_holds_the_report_s_pictures(wheel: Path, tree: Path) -> None:
    folder = tree / "quantize/picture_set"
    pictures = {f"fastvlm_mlx/quantize/picture_set/{path.name}" for path in folder.iterdir()}
    assert "fastvlm_mlx/quantize/picture_set/answers.json" in pictures
    assert pictures <= names_in(wheel)


def test_the_wheel_holds_what_each_consumer_requires(wheel: Path) -> None:
    """`fastvlm verify` reads data files that lie behind a link."""
    from fastvlm_mlx.cli.verify import CONSUMERS

    required = {f"fastvlm_mlx/convert/consumers/{name}.json" for name in CONSUMERS}
    assert required <= names_in(wheel)


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, "build_wheel", tmp_path / "again")
    assert names_in(again) == names_in(wheel)


def bare_environment(folder: Path) -> Path:
    """A virtual environment that has this one's dependencies but not this project; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    # A folder named in a .pth file has its own .pth files left alone: an editable install of this
    # project in the outer environment stays out.
    (site / "outer.pth").write_text(dependencies + "\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_an_install_finds_the_linked_packages_and_the_command(
    tmp_path: Path, wheel: Path, editable: bool
) -> None:
    python = bare_environment(tmp_path / "venv")
    source = ["--editable", str(copy_repository(tmp_path / "tree"))] if editable else [str(wheel)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index",
         "--no-deps", "--no-build-isolation", "--ignore-installed", *source],
        check=True, capture_output=True,
    )  # fmt: skip
    code = (
        "import fastvlm_mlx.convert, fastvlm_mlx.quantize, importlib.util as u\n"
        "print(fastvlm_mlx.convert.__file__)\n"
        "print(u.find_spec('convert'), u.find_spec('quantize'))"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, top_level = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path), "imported from elsewhere: the test proves nothing"
    assert Path(where).parts[-3:] == ("fastvlm_mlx", "convert", "__init__.py")
    assert top_level == "None None"
    told = subprocess.run(
        [python.parent / "fastvlm", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "generate" in told.stdout
