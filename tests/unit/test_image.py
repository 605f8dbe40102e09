from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import urllib.parse
import warnings
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.prompt import image as image_module
from fastvlm_mlx.prompt import sources
from fastvlm_mlx.prompt.image import fit, open_image
from tests.parity import frozen, pictures

PIXELS = json.loads((Path(__file__).parents[1] / "parity" / "pixels.json").read_text())
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners() -> Image.Image:
    """40 x 20: red, green on top; blue, white below. Every orientation of it is different."""
    image = Image.new("RGB", (40, 20))
    for box, colour in zip(
        ((0, 0, 20, 10), (20, 0, 40, 10), (0, 10, 20, 20), (20, 10, 40, 20)),
        (RED, GREEN, BLUE, WHITE),
        strict=True,
    ):
        image.paste(colour, box)
    return image


def error_of(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


# Fitting


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("case", ["pad-1024", "pad-256", "crop-256"])
def test_pixels_are_bit_equal_to_the_pil_reference(name: str, case: str) -> None:
    """Others crop or stretch, or resize with torchvision, one level off on 0.26 % of values."""
    mode, size = case.split("-")
    pixels = fit(Image.fromarray(pictures.picture(name)), int(size), mode)  # type: ignore[arg-type]
    assert pixels.shape == (int(size), int(size), 3)
    assert pixels.dtype == np.uint8
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()
    assert digest == PIXELS[name][case]


def test_padding_is_black_and_centred_with_the_odd_pixel_after() -> None:
    pixels = fit(Image.new("RGB", (7, 4), WHITE), 7, "pad")
    assert [int(row.max()) for row in pixels] == [0, 255, 255, 255, 255, 0, 0]
    pixels = fit(Image.new("RGB", (4, 7), WHITE), 7, "pad")
    assert [int(column.max()) for column in pixels.transpose(1, 0, 2)] == [0, *[255] * 4, 0, 0]


def test_a_circle_stays_round_when_padded() -> None:
    """Some ports stretch the picture to the square."""
    y, x = np.mgrid[:100, :300]
    disc = (((x - 150) ** 2 + (y - 50) ** 2 < 40**2) * 255).astype(np.uint8)
    seen = fit(open_image(disc), 150, "pad")[:, :, 0] > 127
    height, width = np.ptp(np.nonzero(seen.any(1))), np.ptp(np.nonzero(seen.any(0)))
    assert abs(int(height) - int(width)) <= 1


def test_crop_shows_the_middle() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    assert (fit(image, 64, "crop")[:, 2:-2] == GREEN).all()


def test_extreme_shapes_are_refused_before_they_eat_the_memory() -> None:
    with pytest.raises(ImageError, match="too long: the limit is 65535"):
        fit(Image.new("RGB", (65_536, 1)), 64, "pad")
    with pytest.raises(ImageError, match="too narrow to crop: use pad"):
        fit(Image.new("RGB", (2, 60_000)), 1024, "crop")


# Orientation, transparency, modes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    """Phone photos come out sideways in most ports."""
    stored_as = {  # what a camera stores so that the tag's transposition shows `corners()`
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = corners() if stored_as is None else corners().transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    data = encoded(stored, kind, exif=exif, **options.get(kind, {}))
    shown = open_image(data)
    assert shown.size == (40, 20)
    assert np.abs(np.asarray(shown, int) - np.asarray(corners(), int)).max() <= 3


@pytest.mark.parametrize("orientation", [0, 9, 999])
def test_a_meaningless_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(encoded(corners(), exif=exif)).tobytes() == corners().tobytes()


def test_unreadable_exif_does_not_hide_the_picture(recwarn: pytest.WarningsRecorder) -> None:
    for junk in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"):
        assert open_image(encoded(corners(), "JPEG", exif=junk)).size == (40, 20)
    assert not list(recwarn)


def test_transparency_is_laid_on_white_or_the_background_asked_for() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    for source in (encoded(image), image, np.asarray(image), encoded(image, "WEBP", lossless=True)):
        assert np.asarray(open_image(source)).tolist() == [[[255] * 3, [0, 0, 255]]]
    assert open_image(image, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_half_transparency_mixes_with_the_background() -> None:
    assert open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204,) * 3


def test_orientation_comes_before_transparency() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = open_image(encoded(image, exif=exif))
    assert (shown.size, shown.getpixel((0, 0)), shown.getpixel((0, 1))) == ((1, 2), RED, WHITE)


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    if transparent:
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_and_without_transparency(kind: str) -> None:
    shown = np.asarray(open_image(encoded(palette(False), kind)))
    assert shown.tolist() == [[list(RED), list(BLUE)]]
    shown = np.asarray(open_image(encoded(palette(True), kind, transparency=0)))
    assert shown.tolist() == [[list(WHITE), list(BLUE)]]


def test_palette_with_an_alpha_for_each_colour(recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(palette(False), transparency=bytes([0, 255]))
    assert np.asarray(open_image(data)).tolist() == [[list(WHITE), list(BLUE)]]
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 9), (9, 9, 9)),
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("LA", (1, 1), (10, 255)), (10, 10, 10)),
        (Image.new("LA", (1, 1), (10, 0)), WHITE),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
        (Image.new("YCbCr", (1, 1), (255, 128, 128)), WHITE),
        (Image.new("I;16", (1, 1), 65_535), WHITE),
        (Image.new("I;16", (1, 1), 0x1234), (0x12,) * 3),
        (Image.new("I;16B", (1, 1), 0x1234), (0x12,) * 3),
        (Image.new("I", (1, 1), 0x1234), (0x12,) * 3),
        (Image.new("F", (1, 1), 0.2), (51,) * 3),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, ...]) -> None:
    shown = open_image(image)
    assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", expected)


def test_sixteen_bit_files_keep_their_brightness() -> None:
    """Pillow's own conversion clips 16-bit grey to white."""
    grey = Image.fromarray(np.full((3, 3), 0x8000, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert open_image(encoded(grey, kind)).getpixel((1, 1)) == (128, 128, 128)


def test_values_no_type_explains_are_refused() -> None:
    assert "beyond 16 bits" in error_of(Image.new("I", (1, 1), 70_000))
    assert "outside [0, 1]" in error_of(Image.new("F", (1, 1), 200.0))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((4, 4)) == RED


def test_heic_is_read_and_turned_once(tmp_path: Path) -> None:
    """Every iPhone photo is HEIC, and Pillow alone can't open it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.heic"
    stored = corners().resize((400, 200)).transpose(Image.Transpose.ROTATE_90)
    pillow_heif.from_pillow(stored).save(path, quality=-1, exif=exif.tobytes())
    shown = np.asarray(open_image(path), int)
    assert shown.shape == (200, 400, 3)
    for (y, x), colour in zip(
        ((20, 20), (20, 380), (180, 20), (180, 380)), (RED, GREEN, BLUE, WHITE), strict=True
    ):
        assert np.abs(shown[y, x] - colour).max() <= 8
    plain = tmp_path / "plain.heic"
    pillow_heif.from_pillow(corners().resize((400, 200))).save(plain, quality=-1)
    assert open_image(plain.read_bytes()).size == (400, 200)


# Arrays


def test_arrays_are_scaled_by_type_never_by_content() -> None:
    """`image.max() > 1` as the test for "already scaled" turns a near-black frame into noise."""
    dark = np.array([[[0, 1, 0]]], np.uint8)
    assert np.asarray(open_image(dark)).tolist() == dark.tolist()
    assert np.asarray(open_image(dark.astype(np.float32))).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_to_the_nearest_level(dtype: type) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scaled = (levels / 255).astype(dtype)
    assert (np.asarray(open_image(scaled))[:, :, 0] == levels).all()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 255, np.uint8)
    assert open_image(array).size == (6, 4)


def test_a_strided_array_is_read_in_its_order() -> None:
    array = np.asarray(corners())[::-1, ::2]
    assert (np.asarray(open_image(array)) == array).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4), bool),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), 1.5),
        np.full((4, 4), -0.1),
        np.full((4, 4), np.nan),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4), np.uint8)[:, :, :0],
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    assert str(array.dtype) in error_of(array)


# Sources


def test_every_source_of_one_picture_gives_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(corners())
    path = tmp_path / "corners.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    base64_text = base64.b64encode(data).decode()
    all_sources = [
        path,
        str(path),
        "~/corners.png",
        "-",
        data,
        corners(),
        np.asarray(corners()),
        f"data:image/png;base64,{base64_text}",
        f"DATA:;base64,{base64_text.rstrip('=')}",
        f"data:image/png;base64,{urllib.parse.quote(base64_text, safe='')}",
        f"data:image/png,{urllib.parse.quote(data)}",
    ]
    for source in all_sources:
        assert open_image(source).tobytes() == corners().tobytes(), source


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    """`fastvlm generate <(curl …)`: a pipe can't seek, which Pillow alone requires."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(encoded(corners()),))
    writer.start()
    assert open_image(path).size == (40, 20)
    writer.join()


def test_a_file_named_like_a_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-here.png").write_bytes(encoded(corners()))
    assert open_image("~nobody-here.png").size == (40, 20)


def test_an_rgb_pil_image_is_left_untouched() -> None:
    image = corners()
    before = image.tobytes()
    fit(open_image(image), 64, "pad")
    assert image.tobytes() == before


# Bad sources: one line each


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.jpg").endswith("none.jpg: no such file")


def test_a_folder_is_named(tmp_path: Path) -> None:
    assert "is a folder" in error_of(tmp_path)


def test_a_path_through_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    assert "Not a directory" in error_of(tmp_path / "a.png" / "b.png")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "zero.png"
    path.touch()
    assert error_of(path).endswith("zero.png is empty")


def test_a_text_file_named_jpg_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("Dear diary")
    assert error_of(path).endswith("notes.jpg is not a picture in a known format")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(corners()))
    path.chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "permission" in error_of(path)
    finally:
        os.seteuid(was)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("keep", [0.03, 0.3, 0.7])
def test_a_truncated_picture_is_an_error(kind: str, keep: float) -> None:
    data = encoded(Image.fromarray(pictures.picture("landscape")), kind)
    assert "picture" in error_of(data[: int(len(data) * keep)])


def test_a_truncated_heic_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.heic"
    pillow_heif.from_pillow(Image.fromarray(pictures.picture("square"))).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert "damaged" in error_of(path)


def test_corrupt_pixels_are_an_error() -> None:
    data = bytearray(encoded(Image.fromarray(pictures.picture("square"))))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    assert "damaged" in error_of(bytes(data))


def chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + kind + body + check


def png_claiming(width: int, height: int) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_500, 60_000])
def test_a_giant_picture_is_refused_before_decoding(
    side: int, recwarn: pytest.WarningsRecorder
) -> None:
    assert "over the limit of 178 megapixels" in error_of(png_claiming(side, side))
    assert not list(recwarn)


def test_the_limit_holds_where_pillow_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "20000x20000 pixels, over the limit" in error_of(png_claiming(20_000, 20_000))


def test_pillows_warning_about_large_pictures_does_not_leak() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "damaged" in error_of(png_claiming(10_000, 10_000))  # 100 MP: opened, then cut short


def test_a_file_over_the_byte_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    path = tmp_path / "big.png"
    path.write_bytes(bytes(2**20 + 1))
    assert "larger than 1 MiB" in error_of(path)


def test_a_postscript_file_starts_no_interpreter() -> None:
    assert "not a picture" in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "valid base64"),
        ("data:image/png;base64,A", "valid base64"),
        ("data:image/png;base64,é", "valid base64"),
        ("data:,", "is empty"),
        ("data:image/png;base64," + "AAAA" * 100_000, "not a picture"),
    ],
)
def test_a_bad_data_uri_is_named_but_not_printed(uri: str, reason: str) -> None:
    text = error_of(uri)
    assert text.startswith("data: URI (")
    assert reason in text


@pytest.mark.parametrize("source", [None, 3, ["a.png"], object()])
def test_other_types_are_refused(source: object) -> None:
    assert type(source).__name__ in error_of(source)


@pytest.mark.parametrize("name", ["a\nb.png", "nul\0.png", "x" * 5000, "\udcff.png", ""])
def test_odd_names_stay_one_printable_line(name: str) -> None:
    assert error_of(name).isprintable()


def test_empty_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert error_of("-") == "standard input is empty"


def test_an_image_without_pixels_is_refused() -> None:
    assert "no pixels" in error_of(Image.new("RGB", (0, 5)))


def test_opening_leaves_pillows_openers_as_they_were() -> None:
    open_image(encoded(corners()))
    assert "HEIF" not in Image.OPEN


def test_fit_takes_no_other_mode() -> None:
    with pytest.raises(ValueError, match="RGB"):
        fit(Image.new("L", (2, 2)), 64, "pad")
    with pytest.raises(ValueError, match="pad or crop"):
        fit(Image.new("RGB", (2, 2)), 64, "stretch")  # type: ignore[arg-type]


def test_the_module_is_light_to_import() -> None:
    assert image_module.__file__ is not None
    probe = "import sys, fastvlm_mlx.prompt.image; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"mlx", "mlx.core", "pillow_heif", "urllib.request", "PIL.JpegImagePlugin", "torch"}
    assert not heavy & set(loaded)


def test_a_reduced_jpeg_keeps_enough_pixels_and_the_full_one_is_the_default() -> None:
    """Pillow's draft mode changes pixels, so nothing may use it unasked."""
    photo = Image.fromarray(frozen.picture(600, 800, 5))
    jpeg = encoded(photo, "JPEG", quality=95)
    for reduced_to, size in ((None, (800, 600)), (256, (400, 300)), (128, (200, 150))):
        assert open_image(jpeg, reduced_to=reduced_to).size == size
    assert open_image(jpeg, reduced_to=700).size == (800, 600)
    assert open_image(encoded(photo), reduced_to=128).size == (800, 600)
    whole, reduced = (
        np.asarray(fit(open_image(jpeg, reduced_to=to), 128, "pad"), np.float64)
        for to in (None, 128)
    )
    assert 0 < np.abs(whole - reduced).mean() < 8
