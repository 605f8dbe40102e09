"""`fastvlm preview`: the file holds exactly what the tower is given, and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.model.fastvlm import pixel_digest
from fastvlm_mlx.prompt.image import fit, open_image
from tests.cli.command import Run, edit_json


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with transparency, noise and a phone's rotation."""
    values = np.random.default_rng(0).integers(0, 256, (90, 140, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("background", ["white", "#0000ff"])
def test_it_writes_the_pixels_the_tower_is_given(
    run: Run, photo: Path, tmp_path: Path, mode: str, background: str
) -> None:
    out = tmp_path / "seen.png"
    ran = run(
        "preview", photo, "-o", out, "--model", "demo", "--image-mode", mode,
        "--background", background,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    colour = (255, 255, 255) if background == "white" else (0, 0, 255)
    seen = fv.load("demo").encode(photo, image_mode=mode, background=colour)  # type: ignore[arg-type]
    assert pixel_digest(pixels(out)) == seen.digest


def test_it_says_what_it_did(run: Run, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    ran = run("preview", photo, "-o", out, "--model", "demo")
    assert ran.out == f"{out}: 256x256, padded from 90x140\n"  # upright


def test_size_and_fitting_come_from_the_models_config_alone(
    run: Run, photo: Path, tmp_path: Path
) -> None:
    model = tmp_path / "apple"
    model.mkdir()
    config = '{"model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_1024"}'
    (model / "config.json").write_text(config)
    run("preview", photo, "-o", tmp_path / "pad.png", "--model", model)
    assert np.array_equal(pixels(tmp_path / "pad.png"), fit(open_image(photo), 1024, "pad"))
    edit_json(model / "config.json", image_aspect_ratio="square")
    run("preview", photo, "-o", tmp_path / "crop.png", "--model", model)
    assert np.array_equal(pixels(tmp_path / "crop.png"), fit(open_image(photo), 1024, "crop"))


def test_with_size_and_fitting_given_no_model_is_looked_at(
    run: Run, photo: Path, tmp_path: Path
) -> None:
    words = ("--resolution", 512, "--image-mode", "crop", "--model", "/no/such/folder")
    ran = run("preview", photo, "-o", tmp_path / "a.png", *words)
    assert (ran.code, ran.err) == (0, "")
    assert pixels(tmp_path / "a.png").shape == (512, 512, 3)


def test_the_default_model_is_the_demo_and_says_so(run: Run, photo: Path, tmp_path: Path) -> None:
    ran = run("preview", photo, "-o", tmp_path / "a.png")
    assert ran.code == 0 and "demo model" in ran.err
    assert pixels(tmp_path / "a.png").shape == (256, 256, 3)


def test_an_existing_file_is_kept_unless_told_otherwise(
    run: Run, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "seen.png"
    out.write_bytes(b"mine")
    words = ("preview", photo, "-o", out, "--model", "demo")
    assert run(*words).refused() == f"{out} exists: --overwrite replaces it"
    assert out.read_bytes() == b"mine"
    assert run(*words, "--overwrite").code == 0
    assert pixels(out).shape == (256, 256, 3)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "seen.png"
    out.parent.mkdir()
    out.write_bytes(b"mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    ran = run("preview", photo, "-o", out, "--model", "demo", "--overwrite")
    assert ran.refused() == f"{out} cannot be written: No space left on device"
    assert out.read_bytes() == b"mine" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seen.jpg", "would be a PNG: name it seen.png"),
        ("seen", "would be a PNG: name it seen.png"),
        ("nowhere/seen.png", "there is no folder"),
        ("folder.png", "is a folder: name a file"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    run: Run, photo: Path, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert words in run("preview", photo, "-o", tmp_path / name, "--model", "demo").refused()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_one_line(run: Run, photo: Path) -> None:
    ran = run("preview", photo, "-o", "/proc/seen.png", "--model", "demo")
    assert ran.refused().startswith("/proc/seen.png cannot be written: ")


def test_preview_loads_no_model(photo: Path, tmp_path: Path) -> None:
    import json
    import subprocess

    code = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "from fastvlm_mlx.cli.main import main; sys.exit(main())"
    )
    words = ["preview", str(photo), "-o", str(tmp_path / "a.png"), "--model", "demo"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert done.returncode == 0
    assert not loaded & {"fastvlm_mlx.engine", "fastvlm_mlx.model.fastvlm", "mlx_lm"}
