"""Sizes of a FastVLM: frozen, validated, JSON in and out. Knows no source spelling and no files.

Field names are ours; `checkpoint/layouts.py` translates each source's config.json into them.
Sizes of the presets: apple/ml-fastvlm's mobileclip_l_1024.json and mci.py, Qwen2's config.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from fastvlm_mlx.errors import ConfigError

TokenMixer = Literal["repmixer", "attention"]
ProjectorKind = Literal["mlp2x_gelu", "linear"]
ImageMode = Literal["pad", "crop"]

# What `mx.quantize` takes (measured on mlx 0.32.4): mode → (bits, group sizes).
QUANT_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


class _JsonConfig:
    """`to_json` / `from_json` for a frozen dataclass; unknown or missing keys raise ConfigError."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, tuples as lists."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build from `to_json`'s output; raises ConfigError on unknown, missing or odd keys."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown keys {', '.join(unknown)}")
        hints = typing.get_type_hints(cls)
        try:
            return cls(**{key: _decode(hints[key], value) for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error


def _decode(hint: Any, value: Any) -> Any:
    """Turn JSON lists into tuples and objects into nested configs, as the annotation says."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict) and isinstance(hint, type) and issubclass(hint, _JsonConfig):
        return hint.from_json(value)
    return value


def _check_types(config: _JsonConfig) -> None:
    """Raise ConfigError for a field whose value is not of its annotation's type.

    Every number in these configs counts or scales something, so zero and less are wrong too. Whole
    numbers where a fraction may stand become fractions: 4 and 4.0 are one config, in JSON too.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        many = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if many else hint
        if kind not in (int, float, bool):
            continue
        if many and not isinstance(value, tuple):
            raise ConfigError(f"{name} must be a list of {kind.__name__}, not {value!r}")
        for item in value if many else (value,):
            if not is_kind(kind, item):
                raise ConfigError(f"{name} must be {KINDS[kind]}, not {item!r}")
        if kind is float:
            object.__setattr__(config, name, tuple(map(float, value)) if many else float(value))


KINDS: dict[type, str] = {
    int: "a whole number above 0",
    float: "a number above 0",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}


def is_kind(kind: type, value: object) -> bool:
    """Whether a JSON value is what `KINDS` calls its kind; numbers are sizes, so above 0."""
    if isinstance(value, bool) or kind not in (int, float):
        return isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
    return isinstance(value, int if kind is int else (int, float)) and 0 < value < 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig(_JsonConfig):
    """FastViTHD: a stem (stride 4), five stages (each but the first halves the size), an expansion.

    `layers`, `embed_dims`, `mlp_ratios`, `token_mixers`, `pos_embs` have one entry a stage.
    `image_size` is the default square input in pixels; any multiple of 64 works at run time.
    The output has 2 x `embed_dims[-1]` channels and (height/64) x (width/64) tokens.
    """

    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0, 4.0)
    token_mixers: tuple[TokenMixer, ...] = (
        "repmixer",
        "repmixer",
        "repmixer",
        "attention",
        "attention",
    )
    pos_embs: tuple[bool, ...] = (False, False, False, True, True)
    head_dim: int = 32
    se_ratio: float = 1 / 16
    image_size: int = 1024

    def __post_init__(self) -> None:
        _check_types(self)
        stages = len(self.layers)
        for name in ("embed_dims", "mlp_ratios", "token_mixers", "pos_embs"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(f"vision {name} needs {stages} entries, one a stage")
        if stages != 5:
            raise ConfigError(f"FastViTHD has five stages, not {stages}")
        if any(mixer not in typing.get_args(TokenMixer) for mixer in self.token_mixers):
            raise ConfigError(f"unknown token mixer in {self.token_mixers}")
        for narrow, wide in itertools.pairwise(self.embed_dims):
            if wide % narrow:
                raise ConfigError(f"stage width {wide} is no multiple of the one before, {narrow}")
        for mixer, dim in zip(self.token_mixers, self.embed_dims, strict=True):
            if mixer == "attention" and dim % self.head_dim:
                raise ConfigError(f"attention width {dim} is no multiple of {self.head_dim}")
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ConfigError(f"image_size {self.image_size} is no multiple of {self.stride}")

    @property
    def stride(self) -> int:
        """Input pixels a side of one output token."""
        return 4 * 2 ** (len(self.layers) - 1)

    @property
    def out_dim(self) -> int:
        """Channels of the output features."""
        return 2 * self.embed_dims[-1]

    @property
    def se_dim(self) -> int:
        """Hidden channels of the squeeze-and-excite block in the expansion."""
        return int(self.out_dim * self.se_ratio)

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an input of this size in pixels. Raises ConfigError off the grid."""
        if height % self.stride or width % self.stride or min(height, width) <= 0:
            raise ConfigError(
                f"image size {width}x{height} is no multiple of {self.stride} pixels a side"
            )
        return (height // self.stride) * (width // self.stride)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig(_JsonConfig):
    """Vision features to decoder embeddings: two linear layers with GELU between, or one."""

    in_dim: int
    out_dim: int
    kind: ProjectorKind = "mlp2x_gelu"

    def __post_init__(self) -> None:
        _check_types(self)
        if self.kind not in typing.get_args(ProjectorKind):
            raise ConfigError(f"projector {self.kind!r} is not mlp2x_gelu or linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(_JsonConfig):
    """Qwen2 sizes. `max_positions` is the longest prompt plus answer, in embedding positions."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 8192

    def __post_init__(self) -> None:
        _check_types(self)
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"decoder heads do not divide: hidden {self.hidden_size}, "
                f"heads {self.num_heads}, kv heads {self.num_kv_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig(_JsonConfig):
    """How quantized modules were packed; which they are is decided by their `.scales` tensors.

    `overrides` maps a canonical module path to its own (bits, group_size, mode).
    """

    bits: int
    group_size: int
    mode: str = "affine"
    overrides: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = {"": (self.bits, self.group_size, self.mode), **self.overrides}
        for path, (bits, group_size, mode) in settings.items():
            known = QUANT_MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
            whole = is_kind(int, bits) and is_kind(int, group_size)
            if not (whole and bits in known[0] and group_size in known[1]):
                raise ConfigError(
                    f"quantization {f'of {path} ' if path else ''}is not supported: "
                    f"{bits!r} bits, groups of {group_size!r}, {mode!r}"
                )

    def of(self, path: str) -> tuple[int, int, str]:
        """Return (bits, group_size, mode) of the module at this canonical path."""
        bits, group_size, mode = self.overrides.get(path, (self.bits, self.group_size, self.mode))
        return bits, group_size, mode


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(_JsonConfig):
    """The whole model. `eos_ids` are the stop ids its own config names, possibly none."""

    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    quant: QuantConfig | None = None
    eos_ids: tuple[int, ...] = ()
    image_mode: ImageMode = "pad"

    def __post_init__(self) -> None:
        if self.projector.in_dim != self.vision.out_dim:
            raise ConfigError(
                f"projector takes {self.projector.in_dim} channels, "
                f"the tower gives {self.vision.out_dim}"
            )
        if self.projector.out_dim != self.decoder.hidden_size:
            raise ConfigError(
                f"projector gives {self.projector.out_dim} channels, "
                f"the decoder takes {self.decoder.hidden_size}"
            )


def _preset(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> ModelConfig:
    vision = VisionConfig()
    return ModelConfig(
        vision=vision,
        projector=ProjectorConfig(in_dim=vision.out_dim, out_dim=hidden),
        decoder=DecoderConfig(
            hidden_size=hidden,
            num_layers=layers,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            vocab_size=vocab,
            tied=tied,
        ),
        eos_ids=(151645,),
    )


PRESETS: dict[str, ModelConfig] = {
    "0.5b": _preset(896, 24, 4864, 14, 2, 151936, True),
    "1.5b": _preset(1536, 28, 8960, 12, 2, 151936, True),
    "7b": _preset(3584, 28, 18944, 28, 4, 152064, False),
}
