"""Pictures of any origin to the square uint8 pixels the tower takes.

Knows encodings, orientation, transparency and the reference's padding and resizing. Refuses to
know where bytes come from (`sources`), tensors, means and scales (the model folds 1/255 into its
first layer), prompts and MLX.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvlm_mlx.config import ImageMode
from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.prompt.sources import printable, read_bytes, source_name

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

MAX_PIXELS = 178_956_970
"""Most pixels decoded, since a few kilobytes can claim gigabytes: Pillow's own default refusal."""
MAX_SIDE = 65_535
"""Longest side resized, which bounds the padded strip at 65,535 x the model's size."""

# Only formats that are pixels: Pillow would also start Ghostscript for an EPS file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "MPO", "AVIF", "JPEG2000", "ICO")
_JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with more behind it, as phones write
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1")

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BAND = 256
_WARNINGS_LOCK = threading.Lock()


def open_image(
    source: ImageSource,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    name: str | None = None,
    reduced_to: int | None = None,
) -> Image.Image:
    """Return the picture as RGB: EXIF orientation applied, then transparency laid on `background`.

    `source` is a path (`~` is expanded), an http(s) URL, a `data:` URI, "-" for standard input,
    encoded bytes, a PIL image (its current frame) or an array: uint8, or floating point in [0, 1],
    of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Of an animation the first frame is taken.
    A PIL image that is RGB already is returned itself, not copied.

    `name` is what errors call the source, by default its path, URL or kind. `reduced_to` lets an
    encoded JPEG be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep that many
    pixels or the picture's own: some three times as fast, but the pixels are others (the reference
    decodes all of them, then resizes).
    Raises ImageError, naming the source, if it cannot be read or decoded; FetchError for a
    download that fails.
    """
    name = name or picture_name(source)
    if isinstance(source, np.ndarray):
        return _flatten(_from_array(source, name), background, name)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = _decode(source, name)
    elif isinstance(source, (str, os.PathLike)):
        image = _decode(read_bytes(source), name)
    else:
        raise ImageError(f"{name} is no picture: give a path, URL, bytes, PIL image or numpy array")
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels")
    if reduced_to is not None and image is not source and image.format in _JPEGS:
        image.draft(None, (reduced_to, reduced_to))
    try:
        image.load()
        return _flatten(_upright(image), background, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error
        raise _broken(name, error) from error


def is_source(value: object) -> bool:
    """Whether `value` is of a kind `open_image` takes, so one picture rather than several."""
    return isinstance(value, (str, os.PathLike, bytes, Image.Image, np.ndarray))


def fit(image: Image.Image, size: int, mode: ImageMode) -> np.ndarray:
    """Return uint8 [size, size, 3] of an RGB image, bit-equal to the PIL-backed reference.

    "pad" pastes it in the middle of a black square (offset floor((max - min) / 2) on the short
    axis) and resizes: LLaVA's `expand2square` and CLIPImageProcessor in apple/ml-fastvlm's
    mm_utils.py. "crop" resizes the short side to `size` and cuts the middle out of the long one:
    CLIPImageProcessor alone. Resizing is Pillow's antialiased bicubic, uint8 throughout.

    Raises ImageError if a side is longer than MAX_SIDE or a crop would build a giant picture.
    """
    if image.mode != "RGB":
        raise ValueError(f"fit takes an RGB image, not {image.mode}")
    if max(image.size) > MAX_SIDE:
        raise ImageError(
            f"a picture of {image.width}x{image.height} pixels is too long: "
            f"the limit is {MAX_SIDE} a side"
        )
    if mode == "pad":
        return np.asarray(_pad(image, size))
    if mode == "crop":
        return np.asarray(_crop(image, size))
    raise ValueError(f"image mode {mode!r} is not pad or crop")


def _pad(image: Image.Image, size: int) -> Image.Image:
    """Resize as if pasted on a black square, without building that square.

    Pillow resizes rows first, rounds to uint8, then columns. Rows of padding stay black in the
    first pass, so a wide picture is padded after it. A tall one gets its padding left and right,
    which the first pass must see: it goes through in bands.
    """
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if width == height:
        return image.resize((size, size), bicubic)
    offset = abs(width - height) // 2
    columns = Image.new("RGB", (size, max(width, height)))
    if width > height:
        columns.paste(image.resize((size, height), bicubic), (0, offset))
        return columns.resize((size, size), bicubic)
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        band = Image.new("RGB", (height, bottom - top))
        band.paste(image.crop((0, top, width, bottom)), (offset, 0))
        columns.paste(band.resize((size, bottom - top), bicubic), (0, top))
    return columns.resize((size, size), bicubic)


def _crop(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    new_long = int(size * long / short)  # truncated, as transformers' get_resize_output_image_size
    if size * new_long > MAX_PIXELS:
        raise ImageError(
            f"a picture of {image.width}x{image.height} pixels is too narrow to crop: use pad"
        )
    wide = image.width > image.height
    resized = image.resize((new_long, size) if wide else (size, new_long), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _decode(data: bytes, name: str) -> Image.Image:
    """Open encoded bytes, lazily: the size is checked before any pixel is decoded."""
    if not data:
        raise ImageError(f"{name} is empty")
    try:
        heif: Any = None
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[:64]:
            import pillow_heif  # only for HEIC: 30 ms and a large library

            heif = pillow_heif.open_heif(io.BytesIO(data))
            size = heif.size
        else:
            with _quiet():
                image: Image.Image = Image.open(io.BytesIO(data), formats=_formats(data))
            size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise _bomb(name, f"is {size[0]}x{size[1]} pixels")
        return image if heif is None else heif.to_pillow()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _bomb(name, "is a giant") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a known format") from error
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        raise _broken(name, error) from error


def _formats(data: bytes) -> tuple[str, ...]:
    if data.startswith(b"\xff\xd8"):
        return ("JPEG",)
    if data.startswith(b"\x89PNG"):
        return ("PNG",)
    Image.init()  # imports every plugin, so not for the two formats that nearly all pictures have
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings (large picture, odd metadata) off the user's terminal.

    Warning filters are one list for the whole process: the lock keeps our own threads from
    restoring each other's.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    try:
        with _quiet():
            orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # unreadable EXIF is common and says nothing: shown as stored, as viewers do
        return image
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _flatten(image: Image.Image, background: tuple[int, int, int], name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, background)
        canvas.paste(rgba, mask=rgba)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale by the type's range, never by content; the high byte, as Pillow does for 16-bit RGB."""
    values = np.asarray(image)
    if image.mode == "F":
        return _from_array(values, name)
    if values.min() < 0 or values.max() > 65_535:  # "I" is Pillow's container for 16-bit files
        raise ImageError(f"{name} has values beyond 16 bits: convert it to 8 bits first")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ImageError(f"{name} is no picture: its shape must be [H, W], [H, W, 1|3|4]")
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails too
            raise ImageError(f"{name} has floating-point values outside [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{name} must be uint8, or floating point in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _bomb(name: str, size: str) -> ImageError:
    limit = MAX_PIXELS // 10**6
    return ImageError(f"{name} {size}, over the limit of {limit} megapixels: make it smaller")


def _broken(name: str, error: Exception) -> ImageError:
    reason = printable(str(error)) or type(error).__name__
    return ImageError(f"{name} is a damaged picture: {reason}")


def picture_name(source: object) -> str:
    """Name a picture for people: its path or URL, or what kind of object it is."""
    if isinstance(source, (str, os.PathLike)):
        return source_name(source)
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image ({source.width}x{source.height}, {source.mode})"
    if isinstance(source, np.ndarray):
        return f"array {list(source.shape)} {source.dtype}"
    return f"a {type(source).__name__}"
