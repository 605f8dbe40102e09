"""A fingerprint changes with every change of the network, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import fastvlm_mlx
from fastvlm_mlx.checkpoint.store import open_checkpoint
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model import fingerprint as module
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.fingerprint import fingerprint

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

DEMO = Path(fastvlm_mlx.__file__).parent / "demo"
# Written down once: a file saved today must still find its model tomorrow, on any machine.
FROZEN = "d46b1c14156ab6120489646d77040d51"


def make_model(dtype: mx.Dtype = mx.float32) -> FastVLM:
    """The demo's sizes on numbers that every machine makes alike: a folded tower's do not."""
    model = FastVLM(open_checkpoint(DEMO).config, dtype)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        random = np.random.RandomState(zlib.crc32(name.encode()))
        values = random.random_sample(array.shape).astype(np.float32) - np.float32(0.5)
        weights.append((name, mx.array(values).astype(dtype)))
    model.load_weights(weights, strict=True)
    mx.eval(model.parameters())
    return model


@pytest.fixture
def model() -> FastVLM:
    return make_model()


def changed(model: FastVLM, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> str:
    """The fingerprint with one parameter edited; the model itself stays."""
    before = dict(tree_flatten(model.parameters()))
    edited = before | {name: mx.array(edit(np.array(before[name])))}
    model.load_weights(list(edited.items()), strict=False)  # all: a list's items come together
    try:
        return fingerprint(model)
    finally:
        model.load_weights(list(before.items()), strict=False)


def names(model: FastVLM) -> list[str]:
    return [name for name, array in tree_flatten(model.parameters()) if array.size > 1]


def test_it_is_the_same_in_every_process_and_on_every_machine(model: FastVLM) -> None:
    code = (
        "from tests.unit import test_fingerprint as t\nprint(t.fingerprint(t.make_model()), end='')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == (FROZEN, 0), ran.stderr
    assert fingerprint(model) == fingerprint(model) == FROZEN


def test_it_is_the_sum_that_the_docstring_says() -> None:
    """Against numpy's integers: what wraps, in which order, must not depend on the device."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    for weighting in module._weightings(5000):
        factors = np.array(weighting)
        assert (factors % 2 == 1).all() and len(np.unique(factors)) > 4990
        expected = int((words.astype(object) * factors.astype(object)).sum()) % 2**32
        got = (mx.array(words) * weighting).sum()
        assert got.dtype == mx.uint32 and got.item() == expected


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_one_changed_element_changes_it(data: st.DataObject) -> None:
    model = shared_model()
    name = data.draw(st.sampled_from(names(model)))

    def nudge(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1).view(np.uint32)
        flat[data.draw(st.integers(0, flat.size - 1))] ^= 1 << data.draw(st.integers(0, 31))
        return values

    assert changed(model, name, nudge) != fingerprint(model)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_two_exchanged_elements_change_it(data: st.DataObject) -> None:
    """A plain sum, or one weighted by the position, would not see elements 2^16 apart."""
    model = shared_model()
    name = data.draw(st.sampled_from(names(model)))

    def exchange(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1)
        one = data.draw(st.integers(0, flat.size - 1))
        others = np.flatnonzero(flat != flat[one])
        if others.size == 0:
            flat[one] += 1
            return values
        other = data.draw(st.sampled_from(others.tolist()))
        flat[[one, other]] = flat[[other, one]]
        return values

    assert changed(model, name, exchange) != fingerprint(model)


_SHARED: list[FastVLM] = []


def shared_model() -> FastVLM:
    if not _SHARED:
        _SHARED.append(make_model())
    return _SHARED[0]


@pytest.fixture(scope="module", autouse=True)
def _let_go() -> Iterator[None]:
    yield
    _SHARED.clear()


def test_exchanged_elements_of_bfloat16_precision_change_it(model: FastVLM) -> None:
    """Float32 made from bfloat16 has 16 zero bits a word: where weightings differ by a multiple of
    2^16 an exchange cancels, as it does all along a tensor when they are 1, 3, 5 …"""
    name = "decoder.qwen2.model.embed_tokens.weight"

    def halve(values: np.ndarray) -> np.ndarray:
        values.view(np.uint32)[...] &= 0xFFFF0000
        return values

    def exchange(one: int, other: int) -> Callable[[np.ndarray], np.ndarray]:
        def edit(values: np.ndarray) -> np.ndarray:
            flat = halve(values).reshape(-1)
            flat[[one, other]] = flat[[other, one]]
            return values

        return edit

    flat = halve(np.array(dict(tree_flatten(model.parameters()))[name])).reshape(-1)
    pairs = [(i, i + (1 << 15)) for i in range(40) if flat[i] != flat[i + (1 << 15)]]
    seen = {changed(model, name, exchange(*pair)) for pair in pairs}
    assert len(seen) == len(pairs) and changed(model, name, halve) not in seen


def test_exchanged_tensors_of_one_shape_change_it(model: FastVLM) -> None:
    for kind in ("q_proj.weight", "o_proj.weight"):
        paths = [f"decoder.qwen2.model.layers.{i}.self_attn.{kind}" for i in (0, 1)]
        arrays = dict(tree_flatten(model.parameters()))
        pairs = [(paths[0], arrays[paths[1]]), (paths[1], arrays[paths[0]])]
        before = fingerprint(model)
        model.load_weights(pairs, strict=False)
        assert fingerprint(model) != before
        model.load_weights([(path, arrays[path]) for path in paths], strict=False)
        assert fingerprint(model) == before


@pytest.mark.parametrize("edit", ["reshape", "bits"])
def test_the_same_bytes_of_another_shape_or_dtype_change_it(model: FastVLM, edit: str) -> None:
    layer = model.decoder.qwen2.model.layers[0].self_attn.q_proj
    name, weight = fingerprint(model), layer.weight
    layer.weight = weight.reshape(-1, 2) if edit == "reshape" else weight.view(mx.uint32)
    assert fingerprint(model) != name


def test_dtype_packing_and_sizes_change_it(model: FastVLM) -> None:
    seen = {
        fingerprint(model),
        fingerprint(make_model(mx.float16)),
        fingerprint(make_model(mx.bfloat16)),
    }
    model.dtype = mx.bfloat16  # activations alone
    seen.add(fingerprint(model))
    model.dtype = mx.float32
    rope = dataclasses.replace(model.config.decoder, rope_theta=10_000.0)  # no parameter shows it
    before = model.config
    model.config = dataclasses.replace(before, decoder=rope)
    seen.add(fingerprint(model))
    model.config = before
    for bits, group_size in ((8, 64), (4, 64), (4, 32)):
        packed = make_model()
        nn.quantize(packed.decoder, group_size=group_size, bits=bits)
        seen.add(fingerprint(packed))
    assert len(seen) == 8


def test_how_tensors_lie_in_memory_changes_nothing(model: FastVLM) -> None:
    """A folded tower's weights are transposed views of what was on the disk."""
    layer = model.decoder.qwen2.model.layers[0].mlp.up_proj
    name = fingerprint(model)
    layer.weight = mx.contiguous(layer.weight.T).T
    assert fingerprint(model) == name


def test_pieces_are_bounded_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 256)
    rng = np.random.default_rng(0)
    for shape in ((7,), (1000,), (3, 1000), (1, 1, 999), (5, 3, 70), (300, 2), ()):
        values = rng.integers(0, 255, shape, dtype=np.uint8)
        pieces = [np.array(piece) for piece in module._pieces(mx.array(values))]
        assert all(0 < piece.nbytes <= 256 for piece in pieces)
        assert (np.concatenate(pieces) == values.reshape(-1)).all()
    assert list(module._pieces(mx.zeros((0, 4)))) == []


def test_exchanged_pieces_change_it(model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of pieces that are themselves summed would not see two rows exchanged."""
    monkeypatch.setattr(module, "_PIECE_BYTES", 16 << 10)  # cut as a 7B's tensors are
    name = "decoder.qwen2.model.layers.0.mlp.up_proj.weight"
    same = changed(model, name, lambda values: values)
    flipped = changed(model, name, lambda values: np.ascontiguousarray(values[::-1]))
    tail = changed(model, name, lambda values: np.concatenate([values[:-2], values[:-3:-1]]))
    assert len({same, flipped, tail}) == 3


def test_bytes_that_fill_no_word_count_too() -> None:
    for dtype, count in ((mx.uint8, 5), (mx.uint8, 7), (mx.bfloat16, 3)):
        values = mx.arange(count).astype(dtype)
        words = np.array(module._words(values)).view(np.uint8)
        raw = np.array(values.view(mx.uint8))
        assert words.size % 4 == 0 and (words[: raw.size] == raw).all()
        assert not words[raw.size :].any()


def test_it_keeps_no_memory_and_takes_little(model: FastVLM) -> None:
    rows = mx.random.normal((40_000, 1024))  # 164 MB
    mx.eval(rows)
    model.decoder.qwen2.model.embed_tokens.weight = rows
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fingerprint(model)
    assert mx.get_active_memory() <= before
    assert mx.get_peak_memory() - before <= 64 << 20


def test_a_whole_number_and_a_fraction_are_one_config_in_json_too() -> None:
    """A converted folder spells 4.0 as 4; its model had another fingerprint than its source."""
    whole, fraction = VisionConfig(mlp_ratios=(4,) * 5), VisionConfig(mlp_ratios=(4.0,) * 5)
    assert json.dumps(whole.to_json()) == json.dumps(fraction.to_json())
