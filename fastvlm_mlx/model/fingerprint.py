"""A name for the network as it is loaded, so that what it computed is never given to another.

Knows parameters, sizes and dtypes; reads every byte of the weights, on the device, at about the
speed of its memory. Refuses to know files, and the tokenizer: positions are kept as token ids, so
a KV cache fits whichever text they were made from. Nor the device: another one rounds otherwise,
as it does from one version of MLX to the next, and is no other network.

Not proof against someone who looks for two networks of one name: a guard, no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.fused_qwen2 import source_weights

# Raised when the same weights come to compute something else: old caches are then not taken.
_VERSION = 1
# Part of what a fingerprint is, since weightings begin anew with each piece. It stays in a CPU's
# cache, and is still much for a GPU.
_PIECE_BYTES = 2 << 20
_PIECES_AT_ONCE = 8
_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(model: FastVLM) -> str:
    """Return 32 hex digits that name `model`'s sizes, activation dtype and every parameter.

    Each parameter counts with its name, shape, dtype and all its bytes. They are summed as uint32
    words, modulo 2^32, in two weightings by pseudo-random odd numbers: one changed word always
    shows, two exchanged ones all but always. Only integers, so that order, threads and devices
    change nothing; nor do matrices that were joined to compute faster. Temporary memory is some
    40 MiB, and as much may stay in MLX's buffer cache.
    """
    config = model.config
    parts = (config.vision, config.projector, config.decoder, config.quant)
    head = [_VERSION, _spelled(model.dtype), [part.to_json() if part else None for part in parts]]
    state = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
    parameters = sorted(source_weights(model).items())
    longest = max((array.nbytes for _, array in parameters), default=0)
    weightings = _weightings(min(longest, _PIECE_BYTES) // 4 + 1)
    sums: list[mx.array] = []
    pending_bytes = 0
    for name, array in parameters:
        state.update(json.dumps([name, list(array.shape), _spelled(array.dtype)]).encode())
        for piece in _pieces(array):
            words = _words(piece)
            sums += [(words * weighting[: words.size]).sum() for weighting in weightings]
            pending_bytes += piece.nbytes
            if pending_bytes >= _PIECES_AT_ONCE * _PIECE_BYTES:
                _take(state, sums)
                sums, pending_bytes = [], 0
    _take(state, sums)
    return state.hexdigest()


def _take(state: hashlib.blake2b, sums: list[mx.array]) -> None:
    """Evaluate the sums together and hash them in order."""
    if sums:
        state.update(np.asarray(mx.stack(sums)).astype("<u4").tobytes())


def _pieces(array: mx.array) -> Iterator[mx.array]:
    """Yield the values in order, flat, in pieces of at most `_PIECE_BYTES`.

    Cut along the first axis, since flattening a tensor that does not lie in order copies it.
    """
    if array.nbytes <= _PIECE_BYTES:
        if array.size:
            yield array.reshape(-1)
        return
    row_bytes = array.nbytes // array.shape[0]
    if row_bytes > _PIECE_BYTES:
        for row in array:
            yield from _pieces(row)
        return
    step = _PIECE_BYTES // row_bytes
    for begin in range(0, array.shape[0], step):
        yield array[begin : begin + step].reshape(-1)


def _words(piece: mx.array) -> mx.array:
    """Return a flat piece's bytes as uint32, zeros after its end if they do not come out even."""
    if piece.nbytes % 4:
        octets = piece.view(mx.uint8)
        piece = mx.concatenate([octets, mx.zeros(-piece.nbytes % 4, dtype=mx.uint8)])
    return piece.view(mx.uint32)


def _weightings(size: int) -> tuple[mx.array, ...]:
    """Return two lists of pseudo-random odd uint32 numbers, the same on every device.

    The mixing is MurmurHash3's finalizer (Austin Appleby, public domain).
    """
    mixed = []
    for seed in _SEEDS:
        words = mx.arange(size, dtype=mx.uint32) + mx.array(seed, dtype=mx.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            words = (words ^ (words >> shift)) * mx.array(factor, dtype=mx.uint32)
        mixed.append((words ^ (words >> 16)) | 1)
    mx.eval(mixed)
    return tuple(mixed)


def _spelled(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
