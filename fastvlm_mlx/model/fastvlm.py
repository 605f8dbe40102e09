"""FastVLM: tower, projector and decoder joined, and the splice of pictures into a prompt.

Arrays in, arrays out. A prompt is a list of parts, each token ids or an encoded image; splicing is
concatenation, so no sentinel id exists here and no position is ever computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.model import cpu_decoder, cpu_tower
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.projector import Projector
from fastvlm_mlx.model.vision import FastViTHD


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EncodedImage:
    """A picture after tower and projector, reusable in any prompt of the same model.

    `features` [tokens, hidden] in the model's dtype; `digest` names the pixels they came from.
    `pixels`, uint8 [H,W,3] as given to the tower, is what a saved session keeps of a picture;
    `name` is for people. `origin` stands for the loaded model that made it: another refuses it.
    """

    features: mx.array
    digest: str
    pixels: np.ndarray | None = None
    name: str = ""
    origin: object = None

    def __repr__(self) -> str:
        return f"EncodedImage({self.name!r}, {self.positions} positions, {self.digest})"

    @property
    def positions(self) -> int:
        """Embedding positions the picture takes up."""
        return int(self.features.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """A picture of a resumed conversation, by its pixels: encoded when it is looked at again."""

    pixels: np.ndarray
    digest: str
    name: str
    positions: int


ShownImage: TypeAlias = EncodedImage | StoredImage
"""A picture in a transcript: its digest, name, pixels and positions, and perhaps its features."""


def features_digest(features: mx.array) -> str:
    """Return blake2b of features that came from elsewhere; evaluates them."""
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{features.shape} {features.dtype}".encode())
    state.update(np.asarray(features.astype(mx.float32)).data)
    return state.hexdigest()


def pixel_digest(pixels: np.ndarray) -> str:
    """Return blake2b of a uint8 picture [H,W,3] as given to the tower, and of its shape."""
    state = hashlib.blake2b(digest_size=16)
    state.update(repr(pixels.shape).encode())
    state.update(np.ascontiguousarray(pixels).data)
    return state.hexdigest()


# Pixels between those that are looked at first; prime, so as not to follow a pattern.
_SAMPLE_STEP = 61


def pixel_sample(pixels: np.ndarray) -> bytes:
    """Return a few of the pixels [H,W,3] and their shape: equal for equal pictures, cheap."""
    return repr(pixels.shape).encode() + pixels[::_SAMPLE_STEP, ::_SAMPLE_STEP].tobytes()


class FastVLM(nn.Module):
    """The whole network. `dtype` is what activations and embeddings are computed in.

    `paired_heads` and `low_memory` are the tower's (`FastViTHD`).
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: mx.Dtype,
        *,
        paired_heads: bool = False,
        low_memory: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.vision = FastViTHD(config.vision, paired_heads=paired_heads, low_memory=low_memory)
        self.projector = Projector(config.projector)
        self.decoder = Decoder(config.decoder, dtype=dtype)

    def use_cpu_forms(self) -> None:
        """Run tower and decoding as a CPU likes them in float32: the same weights, within 1e-6."""
        self.vision.form = cpu_tower.features
        cpu_decoder.use_row_products(self.decoder)

    def encode_image(self, pixels: mx.array) -> mx.array:
        """Return projected features [B, tokens, hidden] of `pixels` [B,H,W,3] uint8."""
        return self.project(self.vision(pixels))

    def project(self, features: mx.array) -> mx.array:
        """Return embeddings [B, tokens, hidden] of tower features [B, tokens, 2C]."""
        return self.projector(features.astype(self.dtype)).astype(self.dtype)

    def embed(self, parts: Sequence[Sequence[int] | mx.array]) -> mx.array:
        """Return embeddings [1, n, hidden] of token ids and features [tokens, hidden], in order."""
        rows = [
            # Squeezed, not indexed: an integer index gathers, which copies.
            part if isinstance(part, mx.array) else self.decoder.embed(mx.array([part])).squeeze(0)
            for part in parts
            if len(part)
        ]
        return mx.concatenate([row.astype(self.dtype) for row in rows])[None]
