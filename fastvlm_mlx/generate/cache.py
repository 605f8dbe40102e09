"""What is kept so as not to be computed again: pictures' features, and one conversation's KV.

Knows sizes in bytes, which picture was used least lately, and what each KV position stands for.
Knows no prompts and no turns: whether a prefix is right to reuse is decided by comparing
positions, never by counting tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import mlx.core as mx

from fastvlm_mlx.generate.loop import rewind
from fastvlm_mlx.model.decoder import Decoder, KVLayer

Position: TypeAlias = int | tuple[str, int]
"""What one embedding position is: a token id, or (digest, row) of a picture."""

DEFAULT_FEATURE_BYTES = 256 * 2**20

_PARTS = ("keys", "values")
# Positions by which mlx-lm's buffers grow.
_GROWTH = 256


class FeatureCache:
    """Features by digest, at most `max_bytes` of them; the least recently used go first.

    One belongs to one loaded model, so a digest of pixels is the whole key. Features that a
    conversation or a caller also holds are not freed by leaving here.
    """

    def __init__(self, max_bytes: int = DEFAULT_FEATURE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = self.misses = self.evictions = 0
        self._features: OrderedDict[str, mx.array] = OrderedDict()
        self._samples: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, digest: str) -> bool:
        return digest in self._features

    def may_hold(self, sample: bytes) -> bool:
        """Whether a picture remembered has these few pixels; if not, `get` need not be asked."""
        if sample in self._samples.values():
            return True
        self.misses += 1
        return False

    def get(self, digest: str) -> mx.array | None:
        """Return the features [tokens, hidden] of a picture, which is then the latest used."""
        features = self._features.get(digest)
        if features is None:
            self.misses += 1
        else:
            self.hits += 1
            self._features.move_to_end(digest)
        return features

    def put(self, digest: str, features: mx.array, sample: bytes) -> None:
        """Keep features, if all of them fit, in place of the least recently used.

        `sample` is `pixel_sample` of the same picture.
        """
        self._drop(digest)
        if features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self._samples[digest] = sample
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._features)))
            self.evictions += 1

    def drop_failed(self) -> None:
        """Forget what could not be computed after all: it would fail again wherever it is used."""
        for digest, features in list(self._features.items()):
            try:
                mx.eval(features)
            except Exception:  # whatever MLX raises; the answer that met it raised it too
                self._drop(digest)

    def clear(self) -> None:
        """Forget everything but the counts."""
        self._features.clear()
        self._samples.clear()
        self.nbytes = 0

    def _drop(self, digest: str) -> None:
        features = self._features.pop(digest, None)
        if features is not None:
            self.nbytes -= features.nbytes
            del self._samples[digest]


class KVPrefix:
    """The KV of a conversation's beginning, and what each of its positions is.

    `layers` go to the loop, which advances them; `keep_common` before and `hold` after say what
    they contain. Buffers grow by 256 positions, and are kept when positions are forgotten until
    they have to grow again.
    """

    def __init__(self, decoder: Decoder, kv_bits: int | None = None) -> None:
        self.layers: list[KVLayer] = decoder.make_cache(kv_bits)
        self.kv_bits = kv_bits
        self._held: list[Position] = []
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._held)

    @property
    def positions(self) -> tuple[Position, ...]:
        """What each position held is, in order."""
        return tuple(self._held)

    @property
    def group_size(self) -> int | None:
        """Values that share a scale in a packed cache; None in one of floats."""
        return None if self.kv_bits is None else self.layers[0].group_size

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' buffers, the room they have grown to included."""
        return sum(array.nbytes for layer in self.layers for _, array in _arrays(layer))

    def common(self, positions: Sequence[Position]) -> int:
        """Return the length of the longest prefix that `positions` share, short of the last.

        At least one position is left to prefill, for its logits, and never a part of a picture,
        which is spliced whole.
        """
        shared = 0
        for held, wanted in zip(self._held, positions[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        while _inside_picture(positions[shared]):
            shared -= 1
        return shared

    def keep_common(self, positions: Sequence[Position]) -> int:
        """Cut to the common prefix and return its length."""
        shared = self.common(positions)
        self.hold(self._held[:shared])
        return shared

    def hold(self, positions: Sequence[Position]) -> None:
        """Say what the layers hold: `positions`; anything after them is forgotten.

        Raises ValueError if a layer holds fewer.
        """
        if len(positions) < len(self._held) and len(positions) % _GROWTH == 0:
            self._cut(len(positions))
        rewind(self.layers, len(positions))
        self._held = list(positions)

    def _cut(self, length: int) -> None:
        """Let go of the buffers behind `length`, which mlx-lm would keep below what it adds.

        It does so itself at any other length.
        """
        for layer in self.layers:
            for part in _PARTS:
                held = getattr(layer, part)
                if held is None:
                    continue
                whole = isinstance(held, mx.array)
                cut = tuple(a[..., :length, :] for a in ([held] if whole else held))
                setattr(layer, part, (cut[0] if whole else cut) if length else None)

    def is_sound(self) -> bool:
        """Whether every layer can be computed and holds what is said to be held.

        A failed evaluation would fail again, for ever; Ctrl-C may have come between the growth of
        keys and of values.
        """
        length = len(self._held)
        if any(layer.offset != length for layer in self.layers):
            return False
        for layer in self.layers:
            lengths = {array.shape[2] for _, array in _arrays(layer)}
            if len(lengths) > 1 or any(room < length for room in lengths):
                return False
        try:
            mx.eval([layer.state for layer in self.layers])
        except Exception:  # whatever MLX raises; the answer that met it raised it too
            return False
        return True

    def copy(self) -> KVPrefix:
        """Return a second prefix that shares this one's buffers until either is written to."""
        return self._with(self.export(), self._held)

    def export(self, length: int | None = None) -> list[dict[str, mx.array]]:
        """Return each layer's arrays, evaluated and cut to the first `length` positions held.

        "keys" and "values" are [1, heads, positions, head_dim]; packed layers have "keys.0" (uint32
        codes), "keys.1" (scales), "keys.2" (biases), and "values" alike. Empty if there are none.
        """
        length = len(self._held) if length is None else length
        if not length:
            return []
        layers = [
            {name: array[..., :length, :] for name, array in _arrays(layer)}
            for layer in self.layers
        ]
        mx.eval(layers)
        return layers

    def restore(
        self, layers: Sequence[Mapping[str, mx.array]], positions: Sequence[Position]
    ) -> KVPrefix:
        """Return a prefix like this one that holds what another one's `export` gave.

        Raises ValueError if names, shapes or dtypes are not what this model's layers would have.
        """
        if not positions:
            return self._with([], positions)
        if len(layers) != len(self.layers):
            raise ValueError(f"{len(layers)} layers of KV, the model has {len(self.layers)}")
        expected = self._expected(len(positions))
        for arrays in layers:
            if {name: (a.shape, a.dtype) for name, a in arrays.items()} != expected:
                raise ValueError("the KV arrays are not of this model's form")
        return self._with(layers, positions)

    def _with(
        self, layers: Sequence[Mapping[str, mx.array]], positions: Sequence[Position]
    ) -> KVPrefix:
        twin = KVPrefix(self._decoder, self.kv_bits)
        for layer, arrays in zip(twin.layers, layers, strict=False):
            for part in _PARTS:
                whole = arrays.get(part)
                packed = tuple(arrays[name] for name in sorted(arrays) if name[:-2] == part)
                setattr(layer, part, packed if whole is None else whole)
            layer.offset = len(positions)
        twin._held = list(positions)
        return twin

    def _expected(self, length: int) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Return the shape and dtype of each array of a layer that holds `length` positions."""
        config, dtype = self._decoder.config, self._decoder.dtype
        head_dim = config.hidden_size // config.num_heads
        rows = (1, config.num_kv_heads, length)
        if self.kv_bits is None:
            return dict.fromkeys(_PARTS, ((*rows, head_dim), dtype))
        groups = head_dim // self.layers[0].group_size
        forms = ((head_dim * self.kv_bits // 32, mx.uint32), (groups, dtype), (groups, dtype))
        return {
            f"{part}.{index}": ((*rows, width), kind)
            for part in _PARTS
            for index, (width, kind) in enumerate(forms)
        }


def _arrays(layer: KVLayer) -> list[tuple[str, mx.array]]:
    """Return a layer's buffers by name; none if it was never written to."""
    named = []
    for part in _PARTS:
        held = getattr(layer, part)
        if held is None:
            continue
        if isinstance(held, mx.array):
            named.append((part, held))
        else:
            named += [(f"{part}.{index}", array) for index, array in enumerate(held)]
    return named


def _inside_picture(position: Position) -> bool:
    return isinstance(position, tuple) and position[1] > 0
