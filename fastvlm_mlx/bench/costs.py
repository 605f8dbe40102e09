"""What each stage of an answer must at least do, from the model's sizes alone: operations, bytes.

Operations are those of convolutions, matrix products and attention, a multiply-add counted as two;
what is added or activated element by element is not counted. Bytes are memory that must move once:
the stage's weights as they are stored, what it reads and what it writes, the KV cache. What lies
between a stage's layers could stay in a cache, so it is not counted.

Counts only: no chip, no time, no MLX. The tests compare them with the traced graph, one to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastvlm_mlx.config import DecoderConfig, ModelConfig, VisionConfig

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_GROUP_SIZE = 64
_CODE_BYTES = 4  # token ids and argmax results are int32


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations, and bytes moved: `weight_bytes` read, `other_bytes` read and written."""

    flops: int
    weight_bytes: int
    other_bytes: int

    @property
    def bytes(self) -> int:
        """All that moves."""
        return self.weight_bytes + self.other_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a model lies in memory: dtype of activations and float weights, packing, KV cache.

    `bits`: of the decoder's and its embeddings' matrices, 16 (or 32) means that they are float, of
    `dtype`; fewer that they are packed in affine groups of `group_size` with a scale and a bias of
    `dtype` each. `kv_bits` likewise of the KV cache, None is float.
    """

    dtype: DType = "bfloat16"
    bits: int = 16
    group_size: int = DEFAULT_GROUP_SIZE
    kv_bits: int | None = None
    kv_group_size: int = DEFAULT_GROUP_SIZE

    @property
    def float_bytes(self) -> int:
        """Bytes of one float of `dtype`."""
        return DTYPE_BYTES[self.dtype]

    @property
    def tail_bytes(self) -> int:
        """Bytes of one float in the tower's end, which a float16 tower keeps in float32."""
        return 4 if self.dtype == "float16" else self.float_bytes

    def matrix(self, rows: int, columns: int) -> int:
        """Bytes of a decoder's matrix; one whose columns no group divides stays float."""
        if self.bits >= 16 or columns % self.group_size:
            return rows * columns * self.float_bytes
        return rows * _packed(columns, self.bits, self.group_size, self.float_bytes)

    def kv(self, positions: int, config: DecoderConfig) -> int:
        """Bytes of keys and values of so many positions, in all layers."""
        head_dim = config.hidden_size // config.num_heads
        head = (
            head_dim * self.float_bytes
            if self.kv_bits is None
            else _packed(head_dim, self.kv_bits, self.kv_group_size, self.float_bytes)
        )
        return 2 * config.num_layers * config.num_kv_heads * positions * head


def _packed(columns: int, bits: int, group_size: int, float_bytes: int) -> int:
    """Bytes of one packed row: codes, and a scale and a bias a group."""
    return columns * bits // 8 + 2 * (columns // group_size) * float_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's weights by the stage that reads them; `table` is a tied head's too."""

    vision: int
    projector: int
    layers: int
    head: int
    table: int

    @property
    def total(self) -> int:
        """All that is held in memory: an untied head and the embedding table are two."""
        return self.vision + self.projector + self.layers + (self.head or 0) + self.table


def vision_parts(
    config: VisionConfig, storage: Storage, *, height: int, width: int, images: int = 1
) -> dict[str, Cost]:
    """Return what each part of the tower costs for `images` pictures of `height` x `width` pixels.

    "stem", "stage 1" to "stage 5" without their downsamplings, "downsample 2" to "downsample 5",
    "expansion". A part reads its input and writes its output. Raises ConfigError off the grid.
    """
    config.tokens(height, width)
    dims, pixels = config.embed_dims, height * width * images
    positions = [height * width * images // 16 // 4**i for i in range(len(dims))]
    first = dims[0]
    here = storage.float_bytes
    parts = {
        "stem": Cost(
            2 * 27 * first * (pixels // 4) + 2 * (9 + first) * first * positions[0],
            ((27 + 1) + (9 + 1) + (first + 1)) * first * here,
            3 * pixels + first * positions[0] * here,
        )
    }
    for i, (dim, p) in enumerate(zip(dims, positions, strict=True)):
        last = i == len(dims) - 1
        if i > 0:
            before = dims[i - 1] * positions[i - 1]
            # One depthwise 7x7 and one 1x1 for each multiple of the channels before.
            parts[f"downsample {i + 1}"] = Cost(
                2 * (49 + dim) * dim * p,
                ((49 + 1) + (dim + 1)) * dim * here,
                (before + dim * p) * here,
            )
        size = storage.tail_bytes if last else here
        parts[f"stage {i + 1}"] = Cost(
            _stage_flops(config, i, p, images), _stage_weights(config, i) * size, 2 * dim * p * size
        )
    out, p, size = config.out_dim, positions[-1], storage.tail_bytes
    parts["expansion"] = Cost(
        2 * 9 * out * p + 2 * 2 * out * config.se_dim * images,
        ((9 + 1) * out + 2 * out * config.se_dim + config.se_dim + out) * size,
        (dims[-1] + out) * p * size,
    )
    return parts


def _stage_flops(config: VisionConfig, index: int, positions: int, images: int) -> int:
    """Operations of a stage's position encoding and blocks over all pictures' positions."""
    dim = config.embed_dims[index]
    hidden = int(dim * config.mlp_ratios[index])
    encoding = 2 * 49 * dim * positions if config.pos_embs[index] else 0
    block = 2 * (49 * dim + 2 * dim * hidden) * positions
    if config.token_mixers[index] == "repmixer":
        block += 2 * 9 * dim * positions
    else:
        # Every position looks at all of its own picture.
        block += 2 * 4 * dim * dim * positions + 4 * dim * positions * (positions // images)
    return encoding + config.layers[index] * block


def _stage_weights(config: VisionConfig, index: int) -> int:
    """Numbers held by a stage's position encoding and blocks."""
    dim = config.embed_dims[index]
    hidden = int(dim * config.mlp_ratios[index])
    encoding = (49 + 1) * dim if config.pos_embs[index] else 0
    block = 49 * dim + 2 * dim * hidden + hidden + dim
    if config.token_mixers[index] == "repmixer":
        block += (9 + 1) * dim
    else:
        block += 3 * dim * (dim + 1) + dim * (dim + 1)
    return encoding + config.layers[index] * block


def vision_cost(
    config: VisionConfig, storage: Storage, *, height: int, width: int, images: int = 1
) -> Cost:
    """Return what the whole tower costs: uint8 pixels in, features out, weights once."""
    parts = vision_parts(config, storage, height=height, width=width, images=images).values()
    tokens = config.tokens(height, width) * images
    return Cost(
        sum(part.flops for part in parts),
        sum(part.weight_bytes for part in parts),
        3 * height * width * images + tokens * config.out_dim * storage.tail_bytes,
    )


def projector_cost(config: ModelConfig, storage: Storage, *, tokens: int) -> Cost:
    """Return what `tokens` features cost on their way to embeddings."""
    inner, outer = config.projector.in_dim, config.projector.out_dim
    second = outer if config.projector.kind == "mlp2x_gelu" else 0
    numbers = inner * outer + outer + second * (outer + 1)
    return Cost(
        2 * tokens * (inner * outer + second * outer),
        numbers * storage.float_bytes,
        tokens * (inner * storage.tail_bytes + outer * storage.float_bytes),
    )


def _layer_products(config: DecoderConfig) -> list[tuple[int, int]]:
    """(rows, columns) of one layer's matrices: q, k, v, o, gate, up, down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_heads * config.num_kv_heads
    return [
        *((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)),
        *((inner, hidden), (inner, hidden), (hidden, inner)),
    ]


def _layer_weights(config: DecoderConfig, storage: Storage) -> int:
    """Bytes of one layer: matrices, the biases of q, k and v, two norms."""
    hidden = config.hidden_size
    kv = hidden // config.num_heads * config.num_kv_heads
    matrices = sum(storage.matrix(rows, columns) for rows, columns in _layer_products(config))
    return matrices + (hidden + 2 * kv + 2 * hidden) * storage.float_bytes


def layers_cost(config: DecoderConfig, storage: Storage, *, tokens: int, cached: int = 0) -> Cost:
    """Return what the layers cost for `tokens` new positions after `cached` ones in the KV cache.

    A position attends to itself and all before it, and to none after. Embeddings are read, all
    keys and values read or written once, the last position's state is written.
    """
    products = sum(rows * columns for rows, columns in _layer_products(config))
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    hidden = config.hidden_size
    return Cost(
        config.num_layers * (2 * tokens * products + 4 * hidden * pairs),
        config.num_layers * _layer_weights(config, storage) + hidden * storage.float_bytes,
        storage.kv(cached + tokens, config) + (tokens + 1) * hidden * storage.float_bytes,
    )


def prefill_cost(config: DecoderConfig, storage: Storage, *, tokens: int, cached: int = 0) -> Cost:
    """Return what the layers cost if only the last of `tokens` new positions is asked for.

    Of the others the last layer needs keys and values, which are made with the queries.
    """
    whole = layers_cost(config, storage, tokens=tokens, cached=cached)
    spared = sum(rows * columns for rows, columns in _layer_products(config)[3:])
    pairs = (tokens - 1) * cached + tokens * (tokens - 1) // 2
    flops = 2 * (tokens - 1) * spared + 4 * config.hidden_size * pairs
    return Cost(whole.flops - flops, whole.weight_bytes, whole.other_bytes)


def head_cost(config: DecoderConfig, storage: Storage) -> Cost:
    """Return what the logits of one position cost."""
    vocab, hidden = config.vocab_size, config.hidden_size
    return Cost(
        2 * vocab * hidden,
        storage.matrix(vocab, hidden),
        (hidden + vocab) * storage.float_bytes,
    )


def decode_cost(config: DecoderConfig, storage: Storage, *, context: int) -> Cost:
    """Return what one more token costs with `context` positions in the cache, its own not yet."""
    layers = layers_cost(config, storage, tokens=1, cached=context)
    head = head_cost(config, storage)
    row = storage.matrix(1, config.hidden_size)
    return Cost(
        layers.flops + head.flops,
        layers.weight_bytes + head.weight_bytes + row,
        layers.other_bytes + head.other_bytes + _CODE_BYTES,
    )


def weight_bytes(config: ModelConfig, storage: Storage) -> WeightBytes:
    """Return the bytes of the model's weights in memory, by formula."""
    side = config.vision.image_size
    vision = vision_cost(config.vision, storage, height=side, width=side)
    decoder = config.decoder
    table = storage.matrix(decoder.vocab_size, decoder.hidden_size)
    return WeightBytes(
        vision=vision.weight_bytes,
        projector=projector_cost(config, storage, tokens=1).weight_bytes,
        layers=layers_cost(decoder, storage, tokens=1).weight_bytes,
        head=0 if decoder.tied else table,
        table=table,
    )


def held_weight_bytes(sizes: Mapping[str, int]) -> WeightBytes:
    """Return the bytes of weights that are really held, from bytes by canonical name.

    Raises ValueError for a name of no stage.
    """
    found = dict.fromkeys(("vision", "projector", "layers", "head", "table"), 0)
    places = {
        "vision.": "vision",
        "projector.": "projector",
        "decoder.qwen2.model.embed_tokens.": "table",
        "decoder.qwen2.lm_head.": "head",
        "decoder.": "layers",
    }
    for name, size in sizes.items():
        place = next((place for start, place in places.items() if name.startswith(start)), None)
        if place is None:
            raise ValueError(f"{name} is a weight of no stage")
        found[place] += size
    return WeightBytes(**found)
