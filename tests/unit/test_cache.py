"""What is kept is bounded in bytes, and what is restored is what was held."""

from __future__ import annotations

import mlx.core as mx
import pytest

from fastvlm_mlx.engine import load
from fastvlm_mlx.generate.cache import FeatureCache, KVPrefix
from fastvlm_mlx.generate.loop import prefill
from fastvlm_mlx.model.decoder import Decoder


def features(value: float, tokens: int = 4) -> mx.array:
    return mx.full((tokens, 8), value)


SIZE = features(0).nbytes


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(max_bytes=2 * SIZE)
    cache.put("a", features(1), b"")
    cache.put("b", features(2), b"")
    assert cache.get("a") is not None
    cache.put("c", features(3), b"")
    assert [name in cache for name in "abc"] == [True, False, True]
    assert (cache.nbytes, len(cache), cache.evictions) == (2 * SIZE, 2, 1)
    assert cache.get("b") is None
    assert (cache.hits, cache.misses) == (1, 1)


def test_what_is_put_again_is_counted_once() -> None:
    cache = FeatureCache(max_bytes=2 * SIZE)
    cache.put("a", features(1), b"")
    cache.put("a", features(1, tokens=8), b"")
    assert (cache.nbytes, len(cache), cache.evictions) == (2 * SIZE, 1, 0)
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_features_that_cannot_be_computed_are_not_kept() -> None:
    """They failed again in every answer about that picture."""
    import threading

    cache = FeatureCache()
    cache.put("whole", features(1), b"")

    def make() -> None:
        cache.put("failed", features(2) + 1, b"")  # lazy, of a stream that ends with this thread
        mx.clear_streams()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    cache.drop_failed()
    assert ("whole" in cache, "failed" in cache) == (True, False)
    assert cache.nbytes == SIZE


def test_features_larger_than_the_bound_empty_nothing() -> None:
    cache = FeatureCache(max_bytes=SIZE)
    cache.put("a", features(1), b"")
    cache.put("b", features(2, tokens=5), b"")
    assert ("a" in cache, "b" in cache) == (True, False)
    off = FeatureCache(max_bytes=0)
    off.put("a", features(1), b"")
    assert len(off) == 0


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load("demo").pipeline.model.decoder


IDS = (5, 9, 2, 7, 1, 3)


def filled(decoder: Decoder, bits: int | None) -> KVPrefix:
    kv = KVPrefix(decoder, bits)
    mx.eval(prefill(decoder, decoder.embed(mx.array([IDS])), kv.layers))
    kv.hold(IDS)
    return kv


def last_state(decoder: Decoder, kv: KVPrefix) -> list[float]:
    return decoder.hidden(decoder.embed(mx.array([[4]])), kv.layers)[0, 0].tolist()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_is_exported_is_restored_bit_for_bit(decoder: Decoder, bits: int | None) -> None:
    kv = filled(decoder, bits)
    twin = KVPrefix(decoder, bits).restore(kv.export(), kv.positions)
    assert twin.positions == IDS
    assert last_state(decoder, twin) == last_state(decoder, kv)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_copy_and_its_original_never_write_into_each_other(
    decoder: Decoder, bits: int | None
) -> None:
    kv = filled(decoder, bits)
    kv.hold(IDS[:-1])
    twin = kv.copy()
    before = [dict(layer) for layer in twin.export()]
    last_state(decoder, kv)
    after = twin.export()
    for old, new in zip(before, after, strict=True):
        assert all(mx.array_equal(old[name], new[name]).item() for name in old)


def test_arrays_of_another_form_are_refused(decoder: Decoder) -> None:
    layers = filled(decoder, None).export()
    kv = KVPrefix(decoder)
    with pytest.raises(ValueError, match="layers of KV"):
        kv.restore(layers[:-1], IDS)
    with pytest.raises(ValueError, match="not of this model's form"):
        kv.restore(layers, IDS[:-1])
    with pytest.raises(ValueError, match="not of this model's form"):
        KVPrefix(decoder, 8).restore(layers, IDS)
    assert KVPrefix(decoder).restore([], ()).positions == ()


def test_a_prefix_ends_before_a_picture_or_after_it_never_within(decoder: Decoder) -> None:
    kv = filled(decoder, None)
    picture = [("x", row) for row in range(3)]
    kv.hold([5, *picture, 1, 3])
    assert kv.keep_common([5, *picture, 1, 8]) == 5
    kv.hold([5, *picture, 1])
    # All that is shared would leave nothing to prefill, and its last position is the picture's.
    assert kv.keep_common([5, *picture]) == 1
    with pytest.raises(ValueError, match="holds 1 positions"):
        kv.hold(IDS)
