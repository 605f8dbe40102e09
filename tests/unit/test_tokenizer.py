from __future__ import annotations

import functools
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.errors import CheckpointError, PromptError
from fastvlm_mlx.prompt.tokenizer import TextStream, Tokenizer
from tests.unit.small_tokenizer import CONTROLS, CORPUS, write_slow_files, write_tokenizer_json

DEMO = Path(__file__).parents[2] / "fastvlm_mlx" / "demo"
TEXTS = [
    "",
    "What is on the desk?",
    *CORPUS.splitlines(),
    CORPUS,
    "e\u0301 and é: NFC makes one of both; \u212b too",
    "12345 1 000,50 ½ ² ٣",
    "a\r\nb\n\n\n  c   \t d \n ",
    "I'LL don't we'Ve",
    "👩‍👩‍👧‍👦🇩🇪",
    "\0\x07\u200b\ufeff\uffff",
    "<|im_end|> <|im_start|>user <image> <|endoftext|>",
]
text = st.text(max_size=60) | st.sampled_from(TEXTS)


def folder(tmp: pytest.TempPathFactory, writer: object) -> Path:
    path = tmp.mktemp("tokenizer")
    writer(path)  # type: ignore[operator]
    return path


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory, write_tokenizer_json)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory, write_slow_files)


@pytest.fixture(scope="module")
def fast(fast_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(fast_folder)


@pytest.fixture(scope="module")
def slow(slow_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(slow_folder)


@pytest.fixture
def copy(slow_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(slow_folder, tmp_path / "copy"))


@pytest.fixture
def fast_copy(fast_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fast_folder, tmp_path / "fast"))


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


# Ids


@given(text)
def test_both_forms_of_a_tokenizer_give_the_same_ids(
    fast: Tokenizer, slow: Tokenizer, text: str
) -> None:
    assert slow.encode(text) == fast.encode(text)


@given(text)
def test_text_survives_encoding_up_to_nfc(fast: Tokenizer, text: str) -> None:
    assert fast.decode(fast.encode(text)) == unicodedata.normalize("NFC", text)


@given(text)
def test_user_text_never_makes_an_added_token(slow: Tokenizer, text: str) -> None:
    """A typed `<|im_end|>` ends the turn and a typed `<image>` makes a slot in other ports."""
    controls = {slow.control_id(control) for control in CONTROLS}
    assert not controls & set(slow.encode(text + "".join(CONTROLS) + "<image>"))
    assert slow.decode(slow.encode("<|im_end|>")) == "<|im_end|>"


@pytest.mark.parametrize("special", [True, False])
def test_an_image_token_in_the_files_stays_text_when_typed(copy: Path, special: bool) -> None:
    """transformers' and Apple's app's folders add `<image>`; its id means nothing here."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    image_id = max(map(int, config["added_tokens_decoder"])) + 1
    config["added_tokens_decoder"][str(image_id)] = {"content": "<image>", "special": special}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(copy)
    assert tokenizer.control_id("<image>") == image_id
    assert image_id not in tokenizer.encode("<image>\nwhat is <image>?")
    assert tokenizer.decode([image_id]) == ("" if special else "<image>")
    assert tokenizer.vocab_size == image_id + 1


def test_numbers_are_split_into_digits_and_the_vocabulary_knows_better(
    fast: Tokenizer, slow: Tokenizer
) -> None:
    fast.control_id("02")  # it is a token, but Qwen2's split never lets two digits meet
    for tokenizer in (fast, slow):
        assert len(tokenizer.encode("02")) == 2


def test_ids_are_those_of_the_files(fast: Tokenizer, slow: Tokenizer, fast_folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(fast_folder / "tokenizer.json"))
    for tokenizer in (fast, slow):
        assert [tokenizer.control_id(c) for c in CONTROLS] == [
            backend.token_to_id(c) for c in CONTROLS
        ]
        assert tokenizer.vocab_size == backend.get_vocab_size()


def test_added_tokens_keep_their_ids_across_gaps(copy: Path) -> None:
    """Qwen2.5's sets leave holes; appending tokens in order would shift the ids."""
    (copy / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1900, "<|im_start|>": 1800}))
    edit(copy / "tokenizer_config.json", added_tokens_decoder={})
    tokenizer = Tokenizer.from_folder(copy)
    assert tokenizer.control_id("<|im_end|>") == 1900
    assert tokenizer.control_id("<|im_start|>") == 1800
    assert tokenizer.decode([1850, 1900]) == ""
    assert tokenizer.vocab_size == 1901


def test_no_truncation_or_padding_from_the_files_is_applied(fast_copy: Path) -> None:
    """A tail cut silently loses the assistant header."""
    backend = tokenizers.Tokenizer.from_file(str(fast_copy / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(fast_copy / "tokenizer.json"))
    assert 4 < len(Tokenizer.from_folder(fast_copy).encode("one two three four five")) < 50


def test_tokens_that_tokenizer_json_lacks_are_added(fast_copy: Path, slow: Tokenizer) -> None:
    next_id = slow.vocab_size
    (fast_copy / "added_tokens.json").write_text(json.dumps({"<|vision|>": next_id}))
    assert Tokenizer.from_folder(fast_copy).control_id("<|vision|>") == next_id


def test_files_at_odds_about_an_id_are_refused(fast_copy: Path) -> None:
    (fast_copy / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3}))
    with pytest.raises(CheckpointError, match=r"<\|im_end\|> is \d+ in tokenizer.json but 3"):
        Tokenizer.from_folder(fast_copy)


def test_text_that_is_not_unicode_is_refused(fast: Tokenizer) -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        fast.encode("caf\udce9")


def test_a_control_token_the_vocabulary_lacks_is_an_error(fast: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"<start_of_turn>"):
        fast.control_id("<start_of_turn>")


# Stop ids


def test_stop_ids_need_no_generation_config(slow: Tokenizer) -> None:
    """Output never stops: the hub's generation_config.json has no eos."""
    assert slow.stop_ids == {slow.control_id("<|im_end|>"), slow.control_id("<|endoftext|>")}


@pytest.mark.parametrize("eos", [7, [7], [7, 7]])
def test_generation_config_adds_its_eos(copy: Path, eos: object) -> None:
    edit(copy / "generation_config.json", eos_token_id=eos)
    tokenizer = Tokenizer.from_folder(copy)
    named = {tokenizer.control_id("<|im_end|>"), tokenizer.control_id("<|endoftext|>")}
    assert tokenizer.stop_ids == named | {7}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("eos", ["z", {"content": "z"}])
def test_the_tokenizers_eos_is_a_stop_id(copy: Path, file: str, eos: object) -> None:
    edit(copy / file, eos_token=eos)
    tokenizer = Tokenizer.from_folder(copy)
    assert tokenizer.control_id("z") in tokenizer.stop_ids
    assert len(tokenizer.stop_ids) == 3


@pytest.mark.parametrize("eos", [None, "not in the vocabulary", 5])
def test_an_eos_that_is_no_token_adds_nothing(copy: Path, eos: object) -> None:
    edit(copy / "tokenizer_config.json", eos_token=eos)
    edit(copy / "generation_config.json", eos_token_id=None)
    assert len(Tokenizer.from_folder(copy).stop_ids) == 2


# Bad folders: one line that names the file


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}'),
        ("vocab.json", None),
        ("vocab.json", "not json"),
        ("vocab.json", "[]"),
        ("vocab.json", "[" * 100_000),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", '{"a": -1}'),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", None),
        ("merges.txt", "#version: 0.2\na b\nabc\n"),
        ("merges.txt", "a b c\n"),
        ("merges.txt", "zq qz\n"),
        ("added_tokens.json", '["<|im_end|>"]'),
        ("added_tokens.json", '{"<|im_end|>": "x"}'),
        ("tokenizer_config.json", "\xff"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("generation_config.json", "{"),
    ],
)
def test_a_broken_file_is_one_line(
    slow_folder: Path, fast_folder: Path, tmp_path: Path, file: str, content: str | None
) -> None:
    base = fast_folder if file == "tokenizer.json" else slow_folder
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    if content is None:
        (broken / file).unlink()
    else:
        (broken / file).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(broken)
    message = str(caught.value)
    assert "\n" not in message
    assert file.partition(".")[0].removesuffix("_config") in message
    assert len(message) < 400


def test_a_tokenizer_of_another_kind_is_refused(fast_copy: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(fast_copy / "tokenizer.json"))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(fast_copy / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.from_folder(fast_copy)


# Decoding and streaming

ids = st.lists(st.integers(0, 920), max_size=40)


@given(ids)
def test_decoding_agrees_with_the_tokenizers_library(
    fast: Tokenizer, fast_folder: Path, ids: list[int]
) -> None:
    backend = library(fast_folder)
    assert fast.decode(ids) == backend.decode(ids, skip_special_tokens=True)


_loaded: dict[Path, tokenizers.Tokenizer] = {}


def library(folder: Path) -> tokenizers.Tokenizer:
    if folder not in _loaded:
        _loaded[folder] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _loaded[folder]


@pytest.mark.parametrize("token_id", [-200, -1, 5_000, 151_999, 2**40])
def test_ids_beyond_the_vocabulary_decode_to_nothing(fast: Tokenizer, token_id: int) -> None:
    """Embedding tables are padded (152,000 rows for 151,646 tokens)."""
    assert fast.decode([token_id]) == ""
    assert TextStream(fast).add(token_id) == ""


@given(ids)
def test_streamed_text_is_the_decoded_text(fast: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(fast)
    parts = [stream.add(token_id) for token_id in ids]
    assert "".join(parts) + stream.finish() == fast.decode(ids)


@given(text)
def test_no_piece_ends_inside_a_character(fast: Tokenizer, text: str) -> None:
    """Streams of other ports show U+FFFD wherever an emoji is cut into tokens."""
    stream = TextStream(fast)
    pieces = [stream.add(token_id) for token_id in fast.encode(text.replace("\ufffd", ""))]
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_an_unfinished_character_becomes_one_replacement(fast: Tokenizer) -> None:
    first_bytes = fast.encode("𓀀")[:-1]
    assert first_bytes  # the character is not in the corpus, so it is four byte tokens
    stream = TextStream(fast)
    assert "".join(map(stream.add, first_bytes)) == ""
    assert stream.finish() == fast.decode(first_bytes) == "\ufffd"


def cut(text: str, stops: list[str]) -> str:
    """The definition, done slowly: before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


short = st.text("ab", min_size=1, max_size=5) | st.text("ab \ufffdé", min_size=1, max_size=3)


@settings(max_examples=300)
@given(st.lists(st.sampled_from("ababab é😀"), max_size=30), st.lists(short, max_size=3), st.data())
def test_text_ends_before_the_first_stop_string_however_tokens_fall(
    fast: Tokenizer, chars: list[str], stops: list[str], data: st.DataObject
) -> None:
    """Others match stop strings only inside one token."""
    text = "".join(chars)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [token_id for piece in pieces for token_id in fast.encode(piece)]
    stream = TextStream(fast, stops)
    shown = ""
    for token_id in ids:
        shown += stream.add(token_id)
        assert cut(text, stops).startswith(shown)
    assert shown + stream.finish() == cut(text, stops)
    assert stream.stopped == (cut(text, stops) != text or any(stop in text for stop in stops))


@given(ids, st.lists(short, max_size=2))
def test_random_ids_stop_as_their_text_does(
    fast: Tokenizer, ids: list[int], stops: list[str]
) -> None:
    stream = TextStream(fast, stops)
    assert "".join(map(stream.add, ids)) + stream.finish() == cut(fast.decode(ids), stops)


def test_only_what_may_become_a_stop_string_is_held(fast: Tokenizer) -> None:
    stream = TextStream(fast, ["\nUser:"])
    steps = [(word, "".join(map(stream.add, fast.encode(word)))) for word in ("Hi", "\nUs", "a")]
    assert [shown for _, shown in steps] == ["Hi", "", "\nUsa"]


def test_nothing_follows_a_stop_string(fast: Tokenizer) -> None:
    stream = TextStream(fast, ["STOP"])
    shown = [stream.add(token_id) for token_id in fast.encode("one STOP two")]
    assert "".join(shown) == "one "
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_that_begins_again_inside_itself_is_found(fast: Tokenizer) -> None:
    stream = TextStream(fast, ["aab"])
    assert "".join(map(stream.add, fast.encode("x") + fast.encode("a") * 3 + fast.encode("b"))) == (
        "xa"
    )
    assert stream.stopped


def test_overlapping_stop_strings_take_the_one_complete_first(fast: Tokenizer) -> None:
    stream = TextStream(fast, ["abcd", "c"])
    assert "".join(map(stream.add, fast.encode("xabcd"))) == "xab"
    stream = TextStream(fast, ["c", "bc"])
    assert "".join(map(stream.add, fast.encode("xabcd"))) == "xa"


def test_special_and_skipped_tokens_are_never_shown(fast: Tokenizer) -> None:
    stream = TextStream(fast, skip_ids=frozenset(fast.encode("z")))
    ids = [*fast.encode("az"), *map(fast.control_id, CONTROLS), *fast.encode("b")]
    assert "".join(map(stream.add, ids)) == "ab"


def test_an_empty_stop_string_is_refused(fast: Tokenizer) -> None:
    with pytest.raises(PromptError, match="empty"):
        TextStream(fast, ["x", ""])


def test_work_for_a_token_does_not_grow_with_the_answer(fast: Tokenizer) -> None:
    """Decoding the whole answer again for each token is quadratic."""
    stream = TextStream(fast, ["\nUser:"])
    asked: list[int] = []
    token_bytes = fast.token_bytes

    class Counting(Tokenizer):
        def __init__(self) -> None:
            pass

        def token_bytes(self, token_id: int) -> bytes:
            asked.append(token_id)
            return token_bytes(token_id)

    stream = TextStream(Counting(), ["\nUser:"])
    ids = fast.encode("a long answer " * 50)
    for token_id in ids:
        stream.add(token_id)
        assert len(stream._held) < len("\nUser:")
    assert asked == ids


@pytest.fixture(scope="module")
def demo_slow(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo model's vocabulary, which transformers saved, in the form of Apple's files."""
    saved = json.loads((DEMO / "tokenizer.json").read_text())
    path = tmp_path_factory.mktemp("demo_slow")
    (path / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {token["content"]: token["id"] for token in saved["added_tokens"]}
    (path / "added_tokens.json").write_text(json.dumps(added))
    return Tokenizer.from_folder(path)


@given(text)
def test_the_demo_models_tokenizer_is_the_same_in_both_forms(
    demo_slow: Tokenizer, text: str
) -> None:
    assert demo_slow.encode(text) == demo().encode(text)
    assert demo().decode(demo().encode(text)) == unicodedata.normalize("NFC", text)


def test_the_demo_models_stop_ids_and_image_token() -> None:
    assert demo().stop_ids == {demo().control_id("<|im_end|>"), demo().control_id("<|endoftext|>")}
    assert demo().control_id("<image>") not in demo().encode("<image>\nWhat colour is it?")


@functools.cache
def demo() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)
