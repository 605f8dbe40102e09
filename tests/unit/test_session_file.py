"""What a session file gives back, and what is said when it cannot."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from saved_sessions import (
    FORMS,
    edit_session,
    header_of,
    kv,
    picture,
    same_image,
    same_kv,
    session,
    write_header,
)

import fastvlm_mlx
from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate.session_file import (
    SavedImage,
    SavedSession,
    read_session,
    write_session,
)
from fastvlm_mlx.prompt.template import IMAGE, Message, user_message

DEMO = Path(fastvlm_mlx.__file__).parent / "demo"
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EMPTY = SavedSession((Message("system", ("",)),), (), "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


@pytest.fixture
def saved(path: Path) -> Path:
    write_session(path, session())
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(SessionError) as raised:
        read_session(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What comes back


@pytest.mark.parametrize(("dtype", "bits"), FORMS)
def test_everything_comes_back_bit_for_bit(path: Path, dtype: mx.Dtype, bits: int | None) -> None:
    given = session(dtype, bits)
    write_session(path, given)
    got = read_session(path)
    assert (got.messages, got.model, got.damage) == (given.messages, given.model, ())
    assert len(got.images) == 3 and all(map(same_image, got.images, given.images))
    assert same_kv(got.kv, given.kv)


def test_a_picture_given_twice_is_stored_and_read_once(path: Path) -> None:
    given = session()
    write_session(path, given)
    header, _ = header_of(path)
    assert sum(name.startswith("image.") for name in header) == 2
    got = read_session(path)
    assert got.images[0].pixels is got.images[2].pixels


def test_one_picture_may_have_two_names(path: Path) -> None:
    one = picture(1, "desk.jpg")
    other = SavedImage(one.digest, "copy of desk.jpg", one.pixels)
    write_session(path, twice(one, other))
    assert [image.name for image in read_session(path).images] == ["desk.jpg", "copy of desk.jpg"]


def twice(one: SavedImage, other: SavedImage) -> SavedSession:
    messages = (
        Message("system", ("x",)),
        user_message("What?", 2),
        Message("assistant", ("That.",)),
    )
    return SavedSession(messages, (one, other), "demo")


def test_an_empty_conversation_is_a_session(path: Path) -> None:
    write_session(path, EMPTY)
    got = read_session(path)
    assert (got.messages, got.images, got.kv, got.damage) == (EMPTY.messages, (), None, ())


def test_a_cache_of_no_positions_is_left_out(path: Path) -> None:
    write_session(path, SavedSession(EMPTY.messages, (), "", kv(())))
    assert read_session(path).kv is None


def test_a_lost_picture_is_kept_by_name(path: Path) -> None:
    lost = SavedImage("00" * 16, "gone.jpg", None)
    write_session(path, twice(lost, picture(2)))
    got = read_session(path)
    assert same_image(got.images[0], lost) and got.images[1].pixels is not None
    assert got.damage == ("picture 1 (gone.jpg) is damaged and lost",)
    write_session(path, got)
    assert read_session(path).messages == got.messages


@pytest.mark.parametrize("name", ["\udcff.jpg", "a\nb\x1b[2J.jpg", "", "x" * 5000, "机 \u202e"])
def test_any_name_survives_and_is_harmless_in_a_line(path: Path, name: str) -> None:
    """os.fsdecode gives half surrogates for names that are not UTF-8: no JSON in UTF-8 has them."""
    image = picture(1)
    write_session(path, twice(SavedImage(image.digest, name, image.pixels), picture(2)))
    assert read_session(path).images[0].name == name
    path.write_bytes(path.read_bytes()[:-570])
    (line, *_) = read_session(path).damage
    assert line.isprintable() and len(line) < 300


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_any_transcript_and_positions_come_back(path: Path, data: st.DataObject) -> None:
    pool = [picture(seed, data.draw(st.text(max_size=9)), 2, 3) for seed in range(3)]
    messages, images = [Message("system", tuple(data.draw(st.lists(texts, max_size=2))))], []
    for _ in range(data.draw(st.integers(0, 4))):
        content = data.draw(st.lists(texts | st.just(IMAGE), max_size=5))
        images += [data.draw(st.sampled_from(pool)) for part in content if part is IMAGE]
        messages += [Message("user", tuple(content)), Message("assistant", (data.draw(texts),))]
    rows = st.tuples(st.sampled_from([p.digest for p in pool]), st.integers(0, 3))
    positions = tuple(data.draw(st.lists(st.integers(0, 151_935) | rows, max_size=12)))
    cache = kv(positions, layers=1) if positions else None
    given = SavedSession(tuple(messages), tuple(images), data.draw(texts), cache)
    write_session(path, given)
    got = read_session(path)
    assert (got.messages, got.model, got.damage) == (given.messages, given.model, ())
    assert len(got.images) == len(images) and all(map(same_image, got.images, images))
    assert same_kv(got.kv, given.kv)


def test_other_tools_open_the_file(saved: Path) -> None:
    given = session()
    with safe_open(saved, framework="np") as opened:
        assert opened.metadata()["format"] == "fastvlm-session"
        pixels = opened.get_tensor(f"image.{given.images[0].digest}")
    assert (pixels == given.images[0].pixels).all()
    loaded: Any = mx.load(str(saved), format="safetensors")
    assert given.kv is not None
    assert mx.array_equal(loaded["kv.1.values"], given.kv.layers[1]["values"])


def test_reading_and_writing_hold_little_more_than_the_cache(path: Path) -> None:
    positions = tuple(range(20_000))
    given = SavedSession(EMPTY.messages, (), "", kv(positions, layers=3))
    assert given.kv is not None
    one = max(array.nbytes for array in given.kv.layers[0].values())  # 10 MB, of 61
    tracemalloc.start()
    write_session(path, given)
    del given
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    got = read_session(path)
    _, host_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got.kv is not None and len(got.kv.positions) == 20_000
    assert mx.get_peak_memory() - before < 7.5 * one
    assert host_peak < 2 * one


# What is damaged


def whole_or_named(path: Path) -> SavedSession | None:
    """Read a damaged copy of `session()`: None if refused, otherwise nothing wrong is unnamed."""
    original = session()
    try:
        got = read_session(path)
    except SessionError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return None
    for message in got.messages:
        assert all(isinstance(part, str) or part == IMAGE for part in message.content)
    assert sum(part == IMAGE for m in got.messages for part in m.content) == len(got.images)
    assert all(line.isprintable() for line in got.damage)
    lost = [image for image in got.images if image.pixels is None]
    assert len([line for line in got.damage if line.startswith("picture")]) == len(lost)
    if not any("altered" in line for line in got.damage):
        assert (got.messages, got.model) == (original.messages, original.model)
        assert [image.digest for image in got.images] == [i.digest for i in original.images]
    if got.kv is None:
        assert any("KV" in line for line in got.damage) or any("alter" in x for x in got.damage)
    else:
        assert same_kv(got.kv, original.kv)
    by_digest = {image.digest: image for image in original.images}
    for image in got.images:
        if image.pixels is not None:
            assert (image.pixels == by_digest[image.digest].pixels).all()
    return got


def test_a_file_cut_anywhere_after_its_header_keeps_the_transcript(saved: Path) -> None:
    whole = saved.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    cuts = {*range(0, 40), *range(0, len(whole), 61), end - 1, end, end + 1, len(whole) - 1}
    for cut in sorted(cuts):
        saved.write_bytes(whole[:cut])
        got = whole_or_named(saved)
        assert (got is None) == (cut < end), cut
        if got is not None:
            assert got.messages == session().messages and got.kv is None
            assert got.damage[-1] == "the saved KV cache is damaged: it is computed again"
    saved.write_bytes(whole[:end])
    assert read_session(saved).damage == (
        "picture 1 (Schreibtisch ü 机.jpg) is damaged and lost",
        "picture 2 (desk 2.jpg) is damaged and lost",
        "picture 3 (Schreibtisch ü 机.jpg) is damaged and lost",
        "the saved KV cache is damaged: it is computed again",
    )


def test_a_file_with_bytes_after_its_end_is_whole(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 100)
    assert read_session(saved).damage == ()


_ORIGINAL: list[bytes] = []


def original_bytes(saved: Path) -> bytes:
    """The file of `session()`: hypothesis runs a test many times on one fixture."""
    if not _ORIGINAL:
        write_session(saved, session())
        _ORIGINAL.append(saved.read_bytes())
    return _ORIGINAL[0]


@FUZZ
@given(data=st.data())
def test_changed_bytes_after_the_header_are_always_found(saved: Path, data: st.DataObject) -> None:
    whole = bytearray(original_bytes(saved))
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(end, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    # Two flips of one byte may undo each other.
    changed = bytes(whole) != original_bytes(saved)
    saved.write_bytes(whole)
    got = whole_or_named(saved)
    assert got is not None and got.messages == session().messages
    assert bool(got.damage) == changed


@FUZZ
@given(data=st.data())
def test_changed_bytes_in_the_header_never_pass_unsaid(saved: Path, data: st.DataObject) -> None:
    whole = bytearray(original_bytes(saved))
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    saved.write_bytes(whole)
    whole_or_named(saved)


def test_a_wrong_bit_in_a_text_costs_no_more_than_that_character(saved: Path) -> None:
    """A strict reading of UTF-8 and JSON would lose a conversation for one bit of one letter."""
    whole = saved.read_bytes()
    begin = whole.index(b"Was ist das")
    for at in range(begin, begin + 11):
        for bit in range(8):
            changed = whole[at] ^ (1 << bit)
            if chr(changed) not in '"\\':  # which end a string, or begin an escape
                saved.write_bytes(whole[:at] + bytes([changed]) + whole[at + 1 :])
                got = read_session(saved)
                assert got.messages[::2] == session().messages[::2]
                assert "altered" in got.damage[0] and len(got.damage) == 2
                text = str(got.messages[1].content[-1])
                assert len(text) == len(str(session().messages[1].content[-1]))


@pytest.mark.parametrize("bits", [0, 3, 16, True, 4.0, "8", [8], -8])
def test_bits_that_no_cache_has_are_damage(saved: Path, bits: Any) -> None:
    write_session(saved, session(mx.bfloat16, 8))
    edit_session(saved, lambda v: v | {"kv": v["kv"] | {"bits": bits}}, resign=True)
    got = read_session(saved)
    assert got.kv is None
    assert got.damage == ("the saved KV cache is damaged: it is computed again",)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**53, 10**30, -1, 0])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def edited(data: st.DataObject, values: Any) -> Any:
    """The JSON with one value somewhere in it replaced, removed or doubled."""
    if not isinstance(values, (dict, list)) or not values or data.draw(st.integers(0, 5)) == 0:
        return data.draw(json_values)
    key = data.draw(
        st.sampled_from(sorted(values) if isinstance(values, dict) else range(len(values)))
    )
    values = dict(values) if isinstance(values, dict) else list(values)
    match data.draw(st.sampled_from(["inside"] * 6 + ["remove", "double"])):
        case "remove":
            del values[key]
        case "double" if isinstance(values, list):
            values.insert(key, values[key])
        case _:
            values[key] = edited(data, values[key])
    return values


@FUZZ
@given(data=st.data(), resign=st.booleans())
def test_an_edited_transcript_is_read_or_refused_in_one_line(
    saved: Path, data: st.DataObject, resign: bool
) -> None:
    """Whoever knows the format can make the digest match: then everything else must still hold."""
    saved.write_bytes(original_bytes(saved))
    edit_session(saved, lambda values: edited(data, values), resign=resign)
    if not resign:
        whole_or_named(saved)
        return
    try:
        got = read_session(saved)
    except SessionError as error:
        assert str(error).isprintable()
        return
    assert all(type(image.digest) is str and type(image.name) is str for image in got.images)
    if got.kv is not None:
        length = len(got.kv.positions)
        assert all(a.shape[2] == length for layer in got.kv.layers for a in layer.values())
        assert all(isinstance(p, int) or type(p[1]) is int for p in got.kv.positions)


@FUZZ
@given(data=st.data())
def test_an_edited_tensor_table_never_gives_wrong_values(saved: Path, data: st.DataObject) -> None:
    saved.write_bytes(original_bytes(saved))
    header, rest = header_of(saved)
    names = sorted(set(header) - {"__metadata__"})
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(names))
        header[name] = edited(data, header[name])
    write_header(saved, header, rest)
    got = whole_or_named(saved)
    assert got is not None and got.messages == session().messages


@pytest.mark.parametrize("pair", [("kv.0.keys", "kv.1.keys"), ("kv.0.keys", "kv.0.values")])
def test_exchanged_layers_are_no_cache(saved: Path, pair: tuple[str, str]) -> None:
    header, rest = header_of(saved)
    header[pair[0]], header[pair[1]] = header[pair[1]], header[pair[0]]
    write_header(saved, header, rest)
    got = read_session(saved)
    assert got.kv is None
    assert got.damage == ("the saved KV cache is damaged: it is computed again",)


def test_exchanged_pictures_are_lost(saved: Path) -> None:
    """By their shapes alone they could be taken for one another."""
    one, two = picture(1), picture(2)
    write_session(saved, twice(one, two))
    header, rest = header_of(saved)
    names = [f"image.{image.digest}" for image in (one, two)]
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]
    write_header(saved, header, rest)
    got = read_session(saved)
    assert [image.pixels for image in got.images] == [None, None] and len(got.damage) == 2


def test_an_altered_transcript_is_kept_without_its_cache(saved: Path) -> None:
    """Its positions stand in the same text: a cache of other ids would answer for these."""

    def edit(values: Any) -> Any:
        values["messages"][2]["content"][0]["text"] = "changed"
        return values

    edit_session(saved, edit, resign=False)
    got = read_session(saved)
    assert got.messages[2].content == ("changed",) and got.kv is None
    assert got.damage == (
        "the transcript is not as it was saved: it may have been altered",
        "the saved KV cache is not used for an altered transcript: computed again",
    )
    assert all(image.pixels is not None for image in got.images)


def test_half_a_surrogate_pair_in_a_text_is_replaced(saved: Path) -> None:
    """No tokenizer takes one: every later question of the conversation would be refused."""

    def edit(values: Any) -> Any:
        values["messages"][2]["content"][0]["text"] = "a\ud83d"
        return values

    edit_session(saved, edit, resign=True)
    assert read_session(saved).messages[2].content == ("a\ufffd",)


# What is claimed


def test_nothing_is_allocated_for_a_claim(saved: Path) -> None:
    header, rest = header_of(saved)
    image = next(name for name in header if name.startswith("image."))
    claims: list[dict[str, Any]] = [
        {"dtype": "U8", "shape": [1 << 20, 1 << 20, 3], "data_offsets": [0, 3 << 40]},
        {"dtype": "U8", "shape": [1 << 40, 1 << 40, 3], "data_offsets": [0, 10]},
        {"dtype": "U8", "shape": [0, 1 << 47, 3], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [4, 4, 3], "data_offsets": [len(rest), len(rest) + 48]},
        {"dtype": "U8", "shape": [4, 4, 3], "data_offsets": [48, 0]},
        {"dtype": "U8", "shape": [4, 4, 3], "data_offsets": [-48, 0]},
    ]
    tracemalloc.start()
    for claim in claims:
        write_header(saved, header | {image: claim}, rest)
        assert len(read_session(saved).damage) in (1, 2)  # given twice, or once
    runs = [{"image": "d", "first": 0, "rows": 1 << 60}]
    for positions in (runs, [{"image": "d", "first": 0, "rows": 1 << 18}] * 9):
        write_session(saved, session())
        edit_session(
            saved,
            lambda v, p=positions: v | {"kv": v["kv"] | {"positions": p}},  # type: ignore[misc]
            resign=True,
        )
        assert read_session(saved).kv is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def test_many_names_for_the_same_bytes_are_read_once(saved: Path) -> None:
    """Each shape of the same bytes has a digest of its own: a small file of a thousand of them
    would fill the memory."""
    data = np.zeros(3 * 720_720, np.uint8)
    header: dict[str, Any] = {}
    content = []
    for height in (n for n in range(1, 200) if 720_720 % n == 0):
        image = data.reshape(height, -1, 3)
        digest = fastvlm_mlx.model.fastvlm.pixel_digest(image)
        content.append({"image": {"digest": digest, "name": "x"}})
        header[f"image.{digest}"] = {
            "dtype": "U8",
            "shape": list(image.shape),
            "data_offsets": [0, data.size],
        }
    write_session(saved, twice(picture(1), picture(2)))
    metadata = header_of(saved)[0]["__metadata__"]
    write_header(saved, {"__metadata__": metadata} | header, data.tobytes())

    def edit(values: Any) -> Any:
        values["messages"][1]["content"] = content
        return values

    edit_session(saved, edit, resign=True)
    got = read_session(saved)
    assert len(content) > 40 and sum(image.pixels is not None for image in got.images) == 1


def with_text(path: Path, text: bytes) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    "inner",
    ["[" * 200_000, '{"messages":' * 100_000, "9" * 10_000, "", "null", "[]", "{}", "NaN"],
)
def test_a_transcript_that_no_parser_should_be_given(saved: Path, inner: str) -> None:
    """Python's own limits (recursion, digits) raise what is no ValueError of ours."""
    header, rest = header_of(saved)
    header["__metadata__"]["session"] = inner
    write_header(saved, header, rest)
    assert "has a damaged transcript" in refusal(saved)
    start = b'{"__metadata__":{"format":"fastvlm-session","version":"1","session":'
    assert "beginning is damaged" in refusal(with_text(saved, start + inner.encode()))


def test_a_session_that_could_not_be_read_again_is_not_written(saved: Path) -> None:
    before = saved.read_bytes()
    long = (Message("system", ("x" * (17 << 20),)),)
    with pytest.raises(SessionError, match="longer than the 16 MiB"):
        write_session(saved, SavedSession(long, (), ""))
    assert saved.read_bytes() == before


# What is no session


def test_a_newer_version_is_named(saved: Path) -> None:
    header, rest = header_of(saved)
    header["__metadata__"]["version"] = "2"
    write_header(saved, header, rest)
    before = saved.read_bytes()
    assert refusal(saved) == (
        f"{saved} was written by a newer fastvlm (session version 2, this one reads 1): "
        "update fastvlm-mlx (the file is left as it is)"
    )
    with pytest.raises(SessionError, match="newer fastvlm"):
        write_session(saved, EMPTY)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("version", ["0", "-1", "", "²", "9" * 5000, None, 1, ["1"]])
def test_an_odd_version_is_damage(saved: Path, version: Any) -> None:
    header, rest = header_of(saved)
    header["__metadata__"]["version"] = version
    write_header(saved, header, rest)
    assert "does not say which version" in refusal(saved)


def test_foreign_files_are_refused_and_never_replaced(tmp_path: Path) -> None:
    """`--session photo.jpg` is soon typed, and a photo is not soon taken again."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (50, 50), "red").save(photo)
    model = tmp_path / "model.safetensors"
    model.write_bytes((DEMO / "model.safetensors").read_bytes())
    note = tmp_path / "note.txt"
    note.write_text("fastvlm-session")
    cut = tmp_path / "cut.session"
    write_session(cut, session())
    cut.write_bytes(cut.read_bytes()[:300])
    nothing = with_text(tmp_path / "nothing", b"")
    lines = {
        photo: "is no session file: give another name",
        model: "is a safetensors file, perhaps a model's, but no session",
        note: "is no session file",
        cut: "is a session whose beginning is damaged or cut off",
        nothing: "is no session file",
    }
    for path, line in lines.items():
        before = path.read_bytes()
        assert line in refusal(path) and "left as it is" in refusal(path)
        with pytest.raises(SessionError, match="left as it is"):
            write_session(path, session())
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == len(lines)


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("is a folder, not a session file")
    assert refusal(tmp_path / "no").endswith("no: no such session file")
    assert refusal(f"{tmp_path}/a\0b").count("cannot be read") == 1
    (tmp_path / "empty").touch()
    assert "is empty" in refusal(tmp_path / "empty")
    (tmp_path / "round").symlink_to("round")
    assert "cannot be read" in refusal(tmp_path / "round")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    """Opening a FIFO to read waits until someone writes to it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines: list[str] = []

    def try_both() -> None:
        lines.append(refusal(pipe))
        with pytest.raises(SessionError) as raised:
            write_session(pipe, EMPTY)
        lines.append(str(raised.value))

    thread = threading.Thread(target=try_both, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert [line.split(": ")[-1] for line in lines] == ["is no file but a device or pipe"] * 2
    assert pipe.is_fifo()


# What the caller got wrong


def test_parts_that_do_not_fit_together_are_a_bug_and_write_nothing(path: Path) -> None:
    good = session()
    cache = good.kv
    assert cache is not None
    lame = [{**cache.layers[0], "values": cache.layers[0]["values"][..., 1:, :]}]
    bad: list[SavedSession] = [
        SavedSession(good.messages, good.images[:2], ""),
        SavedSession(good.messages, (*good.images, good.images[0]), ""),
        SavedSession(good.messages[1:], good.images, ""),
        SavedSession(good.messages[:2], good.images[:2], ""),
        SavedSession((), (), ""),
        twice(SavedImage("00" * 16, "x", good.images[0].pixels), good.images[1]),
        twice(SavedImage("00" * 16, "x", np.zeros((4, 4), np.uint8)), good.images[1]),
        SavedSession(good.messages, good.images, "", kv(cache.positions[1:], bits=4)),
    ]
    for wrong in bad[:-1]:
        with pytest.raises(ValueError):
            write_session(path, wrong)
    for layers, bits in ((tuple(lame), None), (cache.layers, 8)):
        wrong_kv = type(cache)(cache.fingerprint, bits, None, cache.positions, layers)
        with pytest.raises(ValueError):
            write_session(path, SavedSession(good.messages, good.images, "", wrong_kv))
    assert not path.exists()


def test_the_header_is_plain_json_that_begins_with_what_it_is(saved: Path) -> None:
    """A reader in another language needs no more than safetensors and JSON."""
    assert saved.read_bytes()[8:].startswith(b'{"__metadata__":{"format":"fastvlm-session"')
    said = json.loads(header_of(saved)[0]["__metadata__"]["session"])
    assert list(said) == ["messages", "model", "fastvlm", "kv"]
    assert said["fastvlm"] == fastvlm_mlx.__version__
