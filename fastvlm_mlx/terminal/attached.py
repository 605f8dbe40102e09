"""Pictures on their way into a question: read and decoded at once, so that errors come at once.

Knows files and Pillow; knows no model. Pillow and numpy are imported with the first picture.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from fastvlm_mlx.config import ImageMode

if TYPE_CHECKING:
    from PIL import Image

# Largest side of the copy kept for the preview.
_THUMBNAIL_PIXELS = 1280
_keys = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureForm:
    """How pictures become pixels; None takes the model's own size in pixels and mode."""

    resolution: int | None = None
    image_mode: ImageMode | None = None
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """A picture that decodes: its encoded bytes, its size in pixels, and a small copy to show."""

    name: str
    data: bytes
    width: int
    height: int
    thumbnail: Image.Image
    key: int = field(default_factory=lambda: next(_keys))


def attach(source: str | bytes, form: PictureForm, *, name: str | None = None) -> Attached:
    """Read a path, an http(s) or `data:` URL, or encoded bytes, and decode it once.

    Raises ImageError, naming the source, or FetchError.
    """
    from fastvlm_mlx.prompt.image import open_image
    from fastvlm_mlx.prompt.sources import read_bytes, source_name

    if isinstance(source, bytes):
        data, shown = source, name or "picture"
        image = open_image(data, background=form.background, name=shown)
    else:
        data, shown = read_bytes(source), name or _short_name(source)
        image = open_image(data, background=form.background, name=source_name(source))
    width, height = image.size
    thumbnail = image.copy() if max(image.size) <= _THUMBNAIL_PIXELS else image
    thumbnail.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return Attached(shown, data, width, height, thumbnail)


def _short_name(source: str) -> str:
    """Return the last part of a path or URL, fit for one line."""
    from fastvlm_mlx.prompt.sources import source_name

    if source[:5].lower() == "data:":
        return source_name(source)
    if source[:8].lower().startswith(("http://", "https://")):
        source = unquote(urlsplit(source).path) or source
    return source_name(PurePosixPath(source).name or source)
