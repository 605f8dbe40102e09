"""A conversation in one file: transcript, the pictures' pixels, and the KV cache if it is held.

The file is safetensors (`tensor_file.py`): transcript and positions are JSON in the header, which
comes first, so a file cut short keeps its words. Every picture and every KV array has a digest;
what does not match is left out and named in `damage`, and the words stay.

Knows what is in the file. Refuses to know whether a KV cache fits a model (fingerprint, form), and
computes nothing. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvlm_mlx import __version__
from fastvlm_mlx.checkpoint.safetensors_format import dtype_name, stored_bits
from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate.saved_kv import (
    SavedKV,
    kv_arrays,
    kv_json,
    read_kv,
)
from fastvlm_mlx.generate.tensor_file import TensorFile, write_tensor_file
from fastvlm_mlx.generate.whole_file import printed
from fastvlm_mlx.model.fastvlm import pixel_digest
from fastvlm_mlx.prompt.sources import source_name
from fastvlm_mlx.prompt.template import ImageMark, Message

KIND = "fastvlm-session"
VERSION = 1

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class SavedImage:
    """One picture given: `pixels` uint8 [H,W,3], None if they are lost; `digest` names them."""

    digest: str
    name: str
    pixels: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class SavedSession:
    """What a file holds: the system message and whole turns, a picture for each IMAGE in them.

    `model` is its name, for people. `damage` has one line for each thing that was lost.
    """

    messages: tuple[Message, ...]
    images: tuple[SavedImage, ...]
    model: str
    kv: SavedKV | None = None
    damage: tuple[str, ...] = ()


def write_session(path: str | os.PathLike[str], session: SavedSession) -> None:
    """Write `session`, `damage` apart, to `path`: whole, mode 0600, or what was there stays.

    Replaces nothing but a session of this version and an empty file. A picture without pixels is
    kept by name, a KV cache of no positions left out. Raises SessionError, naming `path`, and
    ValueError for a session whose parts do not fit together.
    """
    fields: dict[str, Any] = {
        "messages": _messages_json(session),
        "model": session.model,
        "fastvlm": __version__,
        "kv": None,
    }
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    pictures: dict[str, np.ndarray] = {}
    for image in session.images:
        if image.pixels is not None and image.digest not in pictures:
            _require_pixels(image, image.pixels)
            pictures[image.digest] = np.ascontiguousarray(image.pixels)
            specs[f"image.{image.digest}"] = ("uint8", image.pixels.shape)
    kv = session.kv if session.kv is not None and session.kv.positions else None
    if kv is not None:
        fields["kv"] = kv_json(kv)
        for name, array in kv_arrays(kv):
            specs[name] = (dtype_name(array), tuple(array.shape))
    text = json.dumps(fields, separators=(",", ":"))

    def values() -> Iterator[np.ndarray]:
        yield from pictures.values()
        if kv is not None:
            yield from (stored_bits(array) for _, array in kv_arrays(kv))

    write_tensor_file(
        path,
        kind=KIND,
        version=VERSION,
        metadata={"session_digest": _text_digest(text), "session": text},
        specs=specs,
        values=values(),
    )


def read_session(path: str | os.PathLike[str]) -> SavedSession:
    """Read a session; arrays are evaluated and belong to this thread.

    What is damaged after the transcript is left out and named in `damage`. Raises SessionError,
    naming `path`, for what is no session, is a newer fastvlm's, or has lost its transcript.
    """
    with TensorFile(path, kind=KIND, version=VERSION) as file:
        text = file.metadata.get("session", "")
        fields = _parsed(text)
        damage: list[str] = []
        altered = _text_digest(text) != file.metadata.get("session_digest")
        if altered:
            damage.append("the transcript is not as it was saved: it may have been altered")
        try:
            messages, given = _messages(fields.get("messages"))
        except ValueError as error:
            raise SessionError(
                f"{printed(path)} has a damaged transcript ({error}): restore a copy, or use "
                "another name (it is left as it is)"
            ) from error
        images = _read_images(file, given, damage)
        kv = read_kv(file, fields.get("kv"), altered, damage)
    model = fields.get("model")
    return SavedSession(
        messages, images, model if isinstance(model, str) else "", kv, tuple(damage)
    )


def _messages_json(session: SavedSession) -> list[dict[str, Any]]:
    messages, images = [], iter(session.images)
    for index, message in enumerate(session.messages):
        content: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, ImageMark):
                image = next(images, None)
                if image is None:
                    raise ValueError("there are fewer pictures than IMAGE marks")
                content.append({"image": {"digest": image.digest, "name": image.name}})
            else:
                content.append({"text": part})
        if message.role != _role_at(index):
            raise ValueError(f"message {index} is the {message.role}'s")
        messages.append({"role": message.role, "content": content})
    if len(messages) % 2 != 1 or next(images, None) is not None:
        raise ValueError("there are more pictures than IMAGE marks, or a question has no answer")
    return messages


def _role_at(index: int) -> str:
    return "system" if index == 0 else ("assistant", "user")[index % 2]


def _messages(values: object) -> tuple[tuple[Message, ...], list[tuple[str, str]]]:
    """Return the transcript, and digest and name of each picture. Raises ValueError: what is odd.

    Half a pair of surrogates, which no tokenizer takes, becomes U+FFFD in a text.
    """
    if not isinstance(values, list) or len(values) % 2 == 0:
        raise ValueError("it has no system message with whole turns after it")
    messages: list[Message] = []
    value: Any
    given: list[tuple[str, str]] = []
    for index, value in enumerate(values):
        role = _role_at(index)
        if not isinstance(value, dict) or value.get("role") != role:
            raise ValueError(f"message {index + 1} is not the {role}'s")
        content = value.get("content")
        parts: list[str | ImageMark] = []
        for part in content if isinstance(content, list) else [None]:
            match part:
                case {"text": str(text)}:
                    parts.append(_LONE_SURROGATE.sub("\ufffd", text))
                case {"image": {"digest": str(digest), "name": str(name)}} if role == "user":
                    parts.append(ImageMark())
                    given.append((digest, name))
                case _:
                    raise ValueError(f"message {index + 1} has something other than text")
        messages.append(Message(role, tuple(parts)))  # type: ignore[arg-type]
    return tuple(messages), given


def _read_images(
    file: TensorFile, given: Sequence[tuple[str, str]], damage: list[str]
) -> tuple[SavedImage, ...]:
    """Return each picture given; those that share a digest share their pixels."""
    digests = dict.fromkeys(digest for digest, _ in given)
    pixels = {digest: _read_pixels(file, digest) for digest in digests}
    for number, (digest, name) in enumerate(given, start=1):
        if pixels[digest] is None:
            damage.append(f"picture {number} ({source_name(name)}) is damaged and lost")
    return tuple(SavedImage(digest, name, pixels[digest]) for digest, name in given)


def _read_pixels(file: TensorFile, digest: str) -> np.ndarray | None:
    """Return a picture's pixels; None if they are not there or not the ones of that digest."""
    entry = file.entry(f"image.{digest}")
    if entry is None or entry.dtype != "U8" or not _is_picture(entry.shape):
        return None
    data = file.read(entry)
    pixels = None if data is None else data.reshape(entry.shape)
    return pixels if pixels is not None and pixel_digest(pixels) == digest else None


def _is_picture(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[2] == 3 and min(shape) > 0


def _require_pixels(image: SavedImage, pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or not _is_picture(pixels.shape):
        raise ValueError(f"{image.name}: pixels are {pixels.dtype} {pixels.shape}")
    if pixel_digest(pixels) != image.digest:
        raise ValueError(f"{image.name}: the digest is of other pixels")


def _parsed(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
