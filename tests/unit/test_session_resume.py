"""A conversation goes on from its file as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate.context import lay_out
from fastvlm_mlx.generate.session import ChatSession, collect
from fastvlm_mlx.generate.session_file import read_session
from tests.cli.command import copy_of_demo
from tests.unit.patchwork import picture


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo")


def talk(chat: ChatSession) -> ChatSession:
    chat.ask("What is this?", [picture(1)], max_tokens=5)
    chat.ask("Compare.", [picture(2), picture(1)], max_tokens=5)
    return chat


def other_model(folder: Path) -> fv.Engine:
    """The demo model with one weight changed."""
    from safetensors.numpy import load_file, save_file

    copy_of_demo(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][0] += np.float16(0.5)
    save_file(weights, folder / "model.safetensors")
    return fv.load(folder)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_resumed_conversation_computes_only_what_is_new(
    engine: fv.Engine, tmp_path: Path, bits: int | None
) -> None:
    chat = talk(engine.chat(kv_bits=bits))
    chat.save(tmp_path / "talk")
    said: list[str] = []
    resumed = engine.resume(tmp_path / "talk", say=said.append)
    assert said == []
    assert resumed.messages == chat.messages
    assert [i.digest for i in resumed.images] == [i.digest for i in chat.images]
    assert resumed.kv_bits == bits
    went_on, stayed = (c.ask("Which colour?", max_tokens=8) for c in (resumed, chat))
    assert went_on.token_ids == stayed.token_ids
    assert went_on.stats.reused_tokens == stayed.stats.reused_tokens > 60


def test_pictures_of_a_resumed_conversation_are_encoded_only_if_they_must_be(
    tmp_path: Path,
) -> None:
    """They were unevaluated graphs in the engine's cache: uncounted, unbounded, of one thread."""
    talk(fv.load("demo").chat()).save(tmp_path / "talk")
    fresh = fv.load("demo")
    resumed = fresh.resume(tmp_path / "talk")
    assert resumed.ask("Which colour?", max_tokens=4).stats.encoded_images == 0
    assert collect(resumed.retry(max_tokens=4)).stats.encoded_images == 0
    assert len(fresh.image_features) == 0
    resumed.drop_image(0)
    # The two that are left, once each though both are asked for twice.
    assert resumed.ask("Where?", max_tokens=4).stats.encoded_images == 2
    assert resumed.ask("How many?", resumed.images[:1], max_tokens=4).stats.encoded_images == 0


def test_cancelling_is_asked_before_each_picture_of_a_resumed_conversation(
    engine: fv.Engine, tmp_path: Path
) -> None:
    talk(engine.chat()).save(tmp_path / "talk")
    fresh = fv.load("demo")
    resumed = fresh.resume(tmp_path / "talk", kv_bits=8, say=lambda _: None)
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 2

    end = collect(resumed.stream("Where?", cancelled=cancelled))
    assert (end.finish_reason, end.stats.encoded_images) == ("cancelled", 1)


def test_nothing_that_was_taken_back_is_in_the_file(engine: fv.Engine, tmp_path: Path) -> None:
    """The KV cache still held it: token ids, digest and values of an undone question."""
    chat = talk(engine.chat())
    chat.ask("My number is 4711.", [picture(7)], max_tokens=4)
    chat.prepare([picture(8)])
    chat.rewind()
    chat.save(tmp_path / "after")
    kv = read_session(tmp_path / "after").kv
    assert kv is not None
    said = lay_out(engine.pipeline.processor, chat._transcript.turns, generation_prompt=False)
    assert list(kv.positions) == said.positions[: len(kv.positions)]
    assert len(kv.positions) > 60
    text = (tmp_path / "after").read_bytes()
    for seed in (7, 8):
        assert engine.encode(picture(seed)).digest.encode() not in text
    chat.rewind(2)
    chat.save(tmp_path / "after")
    kv = read_session(tmp_path / "after").kv
    assert kv is None or len(kv.positions) < 16  # the system message


def test_another_models_kv_is_computed_again_and_said(engine: fv.Engine, tmp_path: Path) -> None:
    """KV of one model under another answers fluently, and wrong."""
    talk(engine.chat()).save(tmp_path / "talk")
    other = other_model(tmp_path / "other")
    said: list[str] = []
    resumed = other.resume(tmp_path / "talk", say=said.append)
    assert len(said) == 1
    assert "saved with another model or precision (demo): its KV cache is computed again" in said[0]
    assert resumed.turn_count == 2
    answer = resumed.ask("Which colour?", max_tokens=8)
    assert answer.stats.reused_tokens == 0
    same = other.chat()
    same._transcript = resumed._transcript.without_last(1)
    assert answer.token_ids == same.ask("Which colour?", max_tokens=8).token_ids


def test_other_bits_are_packed_again_and_said(engine: fv.Engine, tmp_path: Path) -> None:
    talk(engine.chat()).save(tmp_path / "talk")
    said: list[str] = []
    resumed = engine.resume(tmp_path / "talk", kv_bits=8, say=said.append)
    assert said == ["the saved KV cache has floats, not 8 bits: it is computed again"]
    assert resumed.ask("Which colour?", max_tokens=4).stats.reused_tokens == 0


def test_a_lost_picture_leaves_its_question_and_is_said(engine: fv.Engine, tmp_path: Path) -> None:
    chat = talk(engine.chat())
    path = tmp_path / "talk"
    chat.save(path)
    data = bytearray(path.read_bytes())
    pixels = chat.images[1].pixels
    assert pixels is not None
    data[data.index(pixels.tobytes())] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    resumed = engine.resume(path, say=said.append)
    assert len(said) == 1
    assert "picture 2 (array [96, 128, 3] uint8) is damaged and lost" in said[0]
    assert [i.digest for i in resumed.images] == [chat.images[0].digest] * 2
    assert resumed.last_question == "Compare."
    resumed.ask("Which colour?", max_tokens=4)


def test_a_session_is_never_half_saved(engine: fv.Engine, tmp_path: Path) -> None:
    chat = talk(engine.chat())
    chat.save(tmp_path / "talk")
    before = (tmp_path / "talk").read_bytes()
    bare = fv.EncodedImage(engine.encode(picture(3)).features, "features only")
    chat.ask("And this?", [bare], max_tokens=4)
    with pytest.raises(SessionError, match="picture 4 was given as features"):
        chat.save(tmp_path / "talk")
    assert (tmp_path / "talk").read_bytes() == before
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8 no session")
    chat.rewind()
    with pytest.raises(SessionError):
        chat.save(tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_bytes() == b"\xff\xd8 no session"
