"""Names and shapes of a tower in the form checkpoints are exchanged in, from its config alone.

Knows the names that `checkpoint/fuse.py` reads, one convolution a unit: the 7x7's BatchNorm,
LayerNorm and layer scales stand apart. Knows no values.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastvlm_mlx.config import VisionConfig

Shaped = Iterator[tuple[str, tuple[int, ...]]]


def tower_shapes(config: VisionConfig) -> Shaped:
    """Yield (canonical name without "vision.", shape) of every tensor; kernels are OHWI."""
    dims = config.embed_dims
    yield from _unit("stem.0", (dims[0], 3, 3, 3))
    yield from _unit("stem.1", (dims[0], 3, 3, 1))
    yield from _unit("stem.2", (dims[0], 1, 1, dims[0]))
    for s, dim in enumerate(dims):
        stage = f"stages.{s}"
        if s > 0:
            yield from _unit(f"{stage}.downsample.0", (dim, 7, 7, 1))
            yield from _unit(f"{stage}.downsample.1", (dim, 1, 1, dim))
        if config.pos_embs[s]:
            yield from _unit(f"{stage}.pos_emb", (dim, 7, 7, 1))
        block = _repmixer_block if config.token_mixers[s] == "repmixer" else _attention_block
        hidden = int(dim * config.mlp_ratios[s])
        for j in range(config.layers[s]):
            yield from block(f"{stage}.blocks.{j}", dim, hidden)
    yield from _unit("expansion.conv", (config.out_dim, 3, 3, 1))
    yield from _unit("expansion.se.reduce", (config.se_dim, config.out_dim))
    yield from _unit("expansion.se.expand", (config.out_dim, config.se_dim))


def _unit(path: str, shape: tuple[int, ...]) -> Shaped:
    yield f"{path}.weight", shape
    yield f"{path}.bias", shape[:1]


def _repmixer_block(path: str, dim: int, hidden: int) -> Shaped:
    yield from _unit(f"{path}.mixer", (dim, 3, 3, 1))
    yield f"{path}.layer_scale", (dim,)
    yield from _ffn(f"{path}.ffn", dim, hidden)


def _attention_block(path: str, dim: int, hidden: int) -> Shaped:
    yield from _unit(f"{path}.norm", (dim,))
    yield f"{path}.qkv.weight", (3 * dim, dim)
    yield from _unit(f"{path}.proj", (dim, dim))
    for branch in (1, 2):
        yield f"{path}.layer_scale_{branch}", (dim,)
    yield from _ffn(f"{path}.ffn", dim, hidden)


def _ffn(path: str, dim: int, hidden: int) -> Shaped:
    yield f"{path}.conv.conv.weight", (dim, 7, 7, 1)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{path}.conv.bn.{leaf}", (dim,)
    yield from _unit(f"{path}.fc1", (hidden, dim))
    yield from _unit(f"{path}.fc2", (dim, hidden))
