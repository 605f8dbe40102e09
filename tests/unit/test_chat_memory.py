"""What a long chat holds is bounded, in bytes counted: KV, features, pixels. No clock, no rss.

`benchmarks/chat_memory.py` has the long runs, and what the system sees of them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from benchmarks import chat_memory
from fastvlm_mlx.generate.cache import FeatureCache

LIMIT = 128
SIDE, POSITIONS = 128, 4  # of a picture: smaller than the demo's own, for its tower's sake
FEATURE_BYTES = POSITIONS * 128 * 4
ROOM_FOR = 3


@pytest.fixture
def engine() -> fv.Engine:
    """The demo model with a context of LIMIT positions, room for the features of three pictures."""
    engine = fv.load("demo", feature_cache_bytes=ROOM_FOR * FEATURE_BYTES)
    config = engine.config
    engine.pipeline.model.config = replace(
        config,
        decoder=replace(config.decoder, max_positions=LIMIT),
        vision=replace(config.vision, image_size=SIDE),
    )
    return engine


def entry(rows: int) -> mx.array:
    return mx.zeros((rows, 8))


def test_features_in_the_cache_never_take_more_than_their_bytes() -> None:
    cache = FeatureCache(max_bytes=10 * 32)
    held: dict[str, int] = {}
    rng = np.random.default_rng(1)
    for number in range(300):
        digest, rows = str(rng.integers(40)), int(rng.integers(1, 13))
        if cache.get(digest) is None:
            cache.put(digest, entry(rows), b"")
            held[digest] = rows * 32
        held = {digest: size for digest, size in held.items() if digest in cache}
        assert cache.nbytes == sum(held.values()) <= cache.max_bytes, number
        assert len(cache) == len(held)
    assert cache.evictions > 50


def test_the_least_recently_used_features_go_first() -> None:
    cache = FeatureCache(max_bytes=3 * 32)
    for digest in "abc":
        cache.put(digest, entry(1), b"")
    cache.get("a")
    cache.put("d", entry(1), b"")
    assert [digest for digest in "abcd" if digest in cache] == ["a", "c", "d"]
    cache.put("e", entry(2), b"")
    assert [digest for digest in "abcde" if digest in cache] == ["d", "e"]
    cache.put("too large", entry(4), b"")
    assert "too large" not in cache
    assert [digest for digest in "abcde" if digest in cache] == ["d", "e"]
    cache.put("d", entry(1), b"")
    assert (cache.nbytes, len(cache)) == (3 * 32, 2)


def test_a_picture_goes_through_the_tower_again_only_after_it_was_forgotten(
    engine: fv.Engine,
) -> None:
    def runs(number: int) -> int:
        picture = chat_memory.picture(number)
        return engine.chat().ask("What is this?", [picture], max_tokens=2).stats.encoded_images

    assert [runs(number) for number in (0, 1, 2, 0, 1, 2)] == [1, 1, 1, 0, 0, 0]
    assert [runs(number) for number in (3, 1, 2, 3, 0)] == [1, 0, 0, 0, 1]
    assert len(engine.image_features) == ROOM_FOR
    assert engine.image_features.nbytes == engine.image_features.max_bytes


def turns(engine: fv.Engine, count: int) -> Iterator[fv.ChatSession]:
    chat = engine.chat(overflow="drop")
    for number in range(count):
        chat.ask("What is this?", [chat_memory.picture(number)], max_tokens=3)
        yield chat


def test_a_long_chat_holds_no_more_after_its_context_was_full(engine: fv.Engine) -> None:
    """Other ports keep every picture's features and every conversation's cache."""
    sizes = engine.config.decoder
    head_dim = sizes.hidden_size // sizes.num_heads
    position = sizes.num_layers * 2 * sizes.num_kv_heads * head_dim * 4
    mx.eval(engine.pipeline.model.parameters())
    before = mx.get_active_memory()
    dropped = 0
    for chat in turns(engine, 30):
        assert chat.positions <= LIMIT
        assert chat.kv_bytes <= position * (LIMIT + 256)
        pixels = sum(i.pixels.nbytes for i in chat.images if i.pixels is not None)
        assert pixels == POSITIONS * chat_memory.PIXEL_BYTES * len(chat.images)
        assert engine.image_features.nbytes <= ROOM_FOR * FEATURE_BYTES
        own = len(chat.images) + ROOM_FOR
        assert mx.get_active_memory() - before <= chat.kv_bytes + own * FEATURE_BYTES + 4096
        dropped = max(dropped, 1 + 30 - chat.turn_count)
    assert dropped > 20


def test_a_chat_that_is_left_leaves_nothing(engine: fv.Engine) -> None:
    assert list(turns(engine, 2))
    engine.image_features.clear()
    gc.collect()
    before = mx.get_active_memory()
    chat = engine.chat()
    chat.ask("What is this?", [chat_memory.picture(7)], max_tokens=3)
    fork = chat.fork()
    fork.ask("And?", max_tokens=3)
    engine.image_features.clear()
    assert mx.get_active_memory() > before
    del chat, fork
    gc.collect()
    assert mx.get_active_memory() <= before


def pixels_of(chat: fv.ChatSession) -> list[weakref.ref[np.ndarray]]:
    return [weakref.ref(image.pixels) for image in chat.images if image.pixels is not None]


def alive(pixels: list[weakref.ref[np.ndarray]]) -> int:
    return sum(reference() is not None for reference in pixels)


def test_pictures_of_turns_that_went_are_let_go(engine: fv.Engine) -> None:
    """However they went: dropped for room, undone, edited, taken out."""
    seen: list[weakref.ref[np.ndarray]] = []
    for chat in turns(engine, 20):
        seen += pixels_of(chat)[-1:]
        assert alive(seen) == len(chat.images)
    assert len(seen) == 20 and len(chat.images) >= 3
    chat.rewind()
    assert alive(seen) == len(chat.images) >= 2
    chat.drop_image(0)
    assert alive(seen) == len(chat.images) >= 1
    for _ in chat.edit("Hello", [], max_tokens=2):
        pass
    assert alive(seen) == len(chat.images)


def test_a_fork_holds_the_same_pictures_not_copies(engine: fv.Engine) -> None:
    *_, chat = turns(engine, 2)
    fork = chat.fork()
    for ours, theirs in zip(chat.images, fork.images, strict=True):
        assert ours.pixels is theirs.pixels
        assert ours.features is theirs.features


@pytest.mark.slow
@pytest.mark.parametrize("name", chat_memory.SCENARIOS)
def test_the_benchmarks_scenarios_stay_in_their_bounds(name: str) -> None:
    rows, bound = chat_memory.run(name, 0.01)
    assert rows
    over = chat_memory.above(rows, bound)
    assert not {kind: by for kind, by in over.items() if kind != "resident"}


def test_the_benchmark_tells_what_is_above_its_bound() -> None:
    rows, bound = chat_memory.run("1,000 pictures, single calls", 0.003)
    lowered = replace(bound, features=rows[-1].features - 1)
    assert chat_memory.above(rows, lowered) == {"features": 1}
    assert set(asdict(bound)) == {"resident", "active", "pool", "kv", "features", "pixels"}
