"""torch files without torch: the values torch wrote, and nothing a hostile file asks for.

The files in data/ were written by torch (data/make_torch_files.py); the rest are put together
here by hand, byte by byte, independent of both torch and the reader.
"""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx.checkpoint import torch_pickle
from fastvlm_mlx.checkpoint.torch_file import TorchFile
from fastvlm_mlx.errors import CheckpointError

DATA = Path(__file__).parent / "data"


# ---- an independent writer: pickle operations and stored zip entries by hand


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: tuple[int, ...]) -> bytes:
    return many(*map(number, values))


HOOKS = name("collections", "OrderedDict") + b")R"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def storage(kind: str = "FloatStorage", key: str = "0", size: int = 6) -> bytes:
    return many(text("storage"), name("torch", kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(
    place: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    hooks: bytes = HOOKS,
) -> bytes:
    parts = (place or storage(), number(offset), numbers(shape), numbers(stride), b"\x89", hooks)
    return REBUILD + many(*parts) + b"R"


def state(value: bytes, *, before: bytes = b"") -> bytes:
    """{"w": value}, after operations that may leave their own mess."""
    return b"\x80\x02" + before + b"}" + text("w") + value + b"s."


SIX = np.arange(6, dtype="<f4").tobytes()


def stored_zip(entries: list[tuple[str, bytes]], **options: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:  # type: ignore[arg-type]
        for entry, raw in entries:
            archive.writestr(entry, raw)
    return buffer.getvalue()


def torch_zip(pickled: bytes, data: bytes = SIX, *, extra: tuple[tuple[str, bytes], ...] = ()):
    parts = [("m/data.pkl", pickled), ("m/byteorder", b"little"), ("m/data/0", data), *extra]
    return stored_zip(parts)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(raw: bytes) -> Path:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(raw)
        return path

    return write


def refusal(path: Path) -> str:
    """The one line a bad file is refused with."""
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400 + len(str(path))
    assert path.name in line
    return line


# ---- what torch wrote is what is read


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32) * np.float32(0.5)).reshape(shape)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


EXPECTED = {
    "whole": ramp(4, 6),
    "transposed": ramp(4, 6).T,
    "rows": ramp(4, 6)[1:3],
    "columns": ramp(4, 6)[:, 1::2],
    "permuted": ramp(2, 3, 4).transpose(2, 0, 1),
    "scalar": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([[True, False], [False, True]]),
    "parameter": bfloat16_bits(ramp(2, 2)),
    "bfloat16": bfloat16_bits(ramp(5)),
} | {
    kind: ramp(5).astype(kind)
    for kind in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
}


@pytest.mark.parametrize("file", ["views.bin", "views_protocol4.bin"])
def test_every_dtype_view_and_parameter_reads_as_torch_saved_it(file: str) -> None:
    tensors = TorchFile(DATA / file)
    assert set(tensors) == set(EXPECTED)
    for key, expected in EXPECTED.items():
        found = tensors[key]
        array = found.read()
        np.testing.assert_array_equal(array, expected, err_msg=key)
        assert array.dtype == expected.dtype and array.shape == found.shape == expected.shape
        assert array.flags.c_contiguous and found.nbytes == expected.nbytes
    assert tensors["bfloat16"].dtype == tensors["parameter"].dtype == "bfloat16"


def test_a_module_state_dict_keeps_its_order_and_tied_weights_share_a_storage() -> None:
    tensors = TorchFile(DATA / "module.bin")
    assert list(tensors) == [
        "embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked", "head.weight",
    ]  # fmt: skip
    assert tensors["embed.weight"].storage_key == tensors["head.weight"].storage_key
    np.testing.assert_array_equal(tensors["head.weight"].read(), ramp(4, 3))
    assert tensors["norm.num_batches_tracked"].read().item() == 0


def test_a_file_written_by_hand_reads(written: Callable[[bytes], Path]) -> None:
    tensors = TorchFile(written(torch_zip(state(tensor()))))
    np.testing.assert_array_equal(tensors["w"].read(), np.arange(6).reshape(2, 3))


def test_opening_reads_no_weights_and_reading_reads_one_tensor(
    written: Callable[[bytes], Path],
) -> None:
    """Data behind the tensor asked for may change or go: it is never looked at."""
    pickled = b"\x80\x02}(" + b"".join(
        text(f"w{i}") + tensor(storage(key=str(i))) for i in range(2)
    )
    path = written(torch_zip(pickled + b"u.", extra=(("m/data/1", SIX),)))
    tensors = TorchFile(path)
    raw = bytearray(path.read_bytes())
    first = raw.index(SIX)
    raw[first : first + len(SIX)] = np.full(6, 9, "<f4").tobytes()
    path.write_bytes(raw[: first + len(SIX)])
    assert (tensors["w0"].read() == 9).all()
    with pytest.raises(CheckpointError, match="cut short while 'w1'"):
        tensors["w1"].read()
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        tensors["w0"].read()


def test_a_module_that_imports_no_torch_reads_torch_files() -> None:
    TorchFile(DATA / "views.bin")
    assert "torch" not in sys.modules


# ---- hostile pickles: refused by name, nothing run


class Reduce:
    """A pickle that calls `function(*args)` when a plain unpickler meets it."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


class SetState:
    def __init__(self) -> None:
        self.loot = 1

    def __setstate__(self, values: dict) -> None:
        raise AssertionError("a checkpoint ran code")


def touch(marker: Path) -> str:
    return f"touch {marker}"


def bad_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """name: (pickle, words of the refusal). Each would make `marker` in a plain unpickler."""
    call = text(f"open({str(marker)!r}, 'w').close()")
    shell = text(touch(marker))
    mark_eval = name("builtins", "eval")
    getattr_chain = (
        name("builtins", "getattr")
        + many(name("builtins", "__import__") + many(text("os")) + b"R", text("system"))
        + b"R"
    )
    nested = Reduce(builtins.eval, Reduce(str, f"open({str(marker)!r}, 'w').close()"))
    return {
        "os.system": (pickle.dumps({"w": Reduce(os.system, touch(marker))}, 2), "system"),
        "os.system by its own name": (
            state(name("os", "system") + many(shell) + b"R"),
            "os.system",
        ),
        "posix.system": (state(name("posix", "system") + many(shell) + b"R"), "posix.system"),
        "builtins.eval": (state(mark_eval + many(call) + b"R"), "builtins.eval"),
        "__builtin__.eval": (state(name("__builtin__", "eval") + many(call) + b"R"), "eval"),
        "nested reduce": (pickle.dumps({"w": nested}, 2), "__builtin__.eval"),
        "reduce in a tensor's hooks": (state(tensor(hooks=mark_eval + many(call) + b"R")), "eval"),
        "reduce outside the dict": (
            state(tensor(), before=mark_eval + many(call) + b"R0"),
            "builtins.eval",
        ),
        "reduce in a persistent id": (state(mark_eval + many(call) + b"RQ"), "builtins.eval"),
        "protocol 4": (pickle.dumps({"w": Reduce(os.system, touch(marker))}, 4), "posix.system"),
        "getattr chain": (state(getattr_chain + many(shell) + b"R"), "builtins.getattr"),
        "dotted name": (
            state(text("os") + text("path.os.system") + b"\x93" + many(shell) + b"R"),
            "os.path.os.system",
        ),
        "dotted name under an allowed module": (
            state(text("collections") + text("abc.sys") + b"\x93"),
            "collections.abc.sys",
        ),
        "INST": (state(b"(" + shell + b"ios\nsystem\n"), "INST os system"),
        "OBJ": (state(b"(" + name("os", "popen") + shell + b"o"), "os.popen"),
        "OBJ of an allowed name": (state(b"(" + HOOKS[:-2] + b"o"), "OBJ"),
        "NEWOBJ": (state(name("subprocess", "Popen") + many(shell) + b"\x81"), "subprocess.Popen"),
        "NEWOBJ of an allowed name": (state(HOOKS[:-2] + b")\x81"), "NEWOBJ"),
        "NEWOBJ_EX": (state(HOOKS[:-2] + b")}\x92"), "NEWOBJ_EX"),
        "memo trick": (  # a harmless name's memo entry, made again as another's
            state(
                name("collections", "OrderedDict")
                + b"q\x05s"
                + text("v")
                + name("os", "system")
                + b"q\x05s"
                + text("x")
                + b"h\x05"
                + many(shell)
                + b"R"
            ),
            "os.system",
        ),
    }


@pytest.mark.parametrize("case", bad_pickles(Path("x")))
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(
    case: str, tmp_path: Path, written: Callable[[bytes], Path]
) -> None:
    marker = tmp_path / "ran"
    pickled, words = bad_pickles(marker)[case]
    assert words in refusal(written(torch_zip(pickled)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "case", ["os.system", "builtins.eval", "nested reduce", "getattr chain", "INST", "memo trick"]
)
def test_the_hostile_pickles_would_run_in_a_plain_unpickler(case: str, tmp_path: Path) -> None:
    """The control: without it the test above could pass on payloads that do nothing."""
    marker = tmp_path / "ran"
    pickle.loads(bad_pickles(marker)[case][0])
    assert marker.exists()


REFUSED_PICKLES = {
    "__setstate__ of a class": (pickle.dumps({"w": SetState()}, 2), "test_torch_file.SetState"),
    "BUILD on a plain dict": (state(b"}" + b"}b"), "BUILD"),
    "BUILD on a storage": (state(storage() + b"}b"), "BUILD"),
    "BUILD on a tensor": (state(tensor() + b"}" + text("dtype") + b"Nsb"), "BUILD"),
    "BUILD on an allowed name": (state(REBUILD + b"}" + text("__code__") + b"Nsb"), "BUILD"),
    "BUILD with slots": (state(HOOKS + b"}}\x86b"), "BUILD"),
    "EXT1": (state(b"\x82\xf0"), "EXT1"),
    "EXT4": (state(b"\x84\xf0\x00\x00\x00"), "EXT4"),
    "text persistent id": (state(b"Pmodule\n"), "PERSID"),
    "persistent id of a module": (state(many(text("module"), text("x")) + b"Q"), "refers"),
    "persistent id of another class": (
        state(many(text("storage"), HOOKS[:-2], text("0"), text("cpu"), number(6)) + b"Q"),
        "refers",
    ),
    "storage name called": (state(name("torch", "FloatStorage") + b")R"), "torch.FloatStorage"),
    "a tensor called": (state(tensor() + b")R"), "calls a tensor"),
    "OrderedDict of items": (state(HOOKS[:-2] + many(many()) + b"R"), "collections.OrderedDict"),
    "STACK_GLOBAL of an allowed name, odd arguments": (
        state(text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93" + many(number(1)) + b"R"),
        "_rebuild_tensor_v2 with arguments",
    ),
    "STACK_GLOBAL of numbers": (state(number(1) + number(2) + b"\x93"), "not text"),
    "a storage typed as a function": (state(storage("load")), "torch.load"),
    "numpy": (state(name("numpy.core.multiarray", "_reconstruct")), "numpy.core.multiarray"),
    "another rebuild function": (
        state(name("torch._utils", "_rebuild_parameter_with_state")),
        "_rebuild_parameter_with_state",
    ),
    "a sparse tensor": (state(name("torch._utils", "_rebuild_sparse_tensor")), "sparse"),
    "hooks that are not a dict": (state(tensor(hooks=b"N")), "hooks"),
    "hooks with something in": (state(tensor(hooks=HOOKS + text("a") + b"Ns")), "hooks"),
    "a memo entry never made": (state(b"h\x07"), "memo"),
    "memo of nothing": (b"\x80\x02q\x00.", "corrupt"),
    "a huge memo index": (state(b"r\xff\xff\xff\xffh\x01"), "memo"),
    "no mark": (b"\x80\x02t.", "mark"),
    "an open mark": (b"\x80\x02(}.", "left on the stack"),
    "values left over": (b"\x80\x02}}.", "left on the stack"),
    "empty": (b"", "corrupt"),
    "no STOP": (b"\x80\x02}", "corrupt"),
    "a second pickle behind": (state(tensor()) + b"cos\nsystem\n.", "followed by other data"),
    "an unknown operation": (b"\x80\x02\xff.", "corrupt"),
    "a length beyond the end": (b"\x80\x02X\xff\xff\xff\x7fabc.", "corrupt"),
    "a name with a line break and colours": (
        state(text("os\n\x1b[31m") + text("system") + b"\x93"),
        r"os\n\x1b[31m.system",
    ),
    "a list": (state(b"]"), "EMPTY_LIST"),
    "a number": (state(number(3)), "'w' is a number"),
    "a bare tensor": (b"\x80\x02" + tensor() + b".", "holds a tensor"),
    "number keys": (b"\x80\x02}" + number(1) + tensor() + b"s.", "a number, not text"),
    "a dict that holds itself": (b"\x80\x02}q\x00" + text("w") + b"h\x00s.", "is a dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_PICKLES)
def test_anything_but_a_plain_state_dict_is_refused_by_name(
    case: str, written: Callable[[bytes], Path]
) -> None:
    pickled, words = REFUSED_PICKLES[case]
    assert words in refusal(written(torch_zip(pickled)))


def test_an_extension_code_runs_nothing_even_when_registered(
    written: Callable[[bytes], Path],
) -> None:
    """copyreg keeps resolved extensions in a cache that skips an Unpickler's find_class."""
    copyreg.add_extension("os", "system", 0xF0)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system
        assert "EXT1" in refusal(written(torch_zip(state(b"\x82\xf0" + many(text("true")) + b"R"))))
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (tensor(storage(size=7)), "too few"),
        (tensor(storage(size=1 << 40)), "too few"),
        (tensor(storage(size=-6)), "refers"),
        (tensor(storage("DoubleStorage")), "too few"),
        (tensor(storage(key="1")), "missing"),
        (tensor(storage(key="../../data/0")), "missing"),
        (tensor(offset=1), "outside its storage"),
        (tensor(offset=-1), "impossible"),
        (tensor(offset=1 << 62), "impossible"),
        (tensor(shape=(2, -3)), "impossible"),
        (tensor(stride=(-3, 1)), "impossible"),
        (tensor(stride=(4, 1)), "outside its storage"),
        (tensor(stride=(3, 1 << 40)), "outside its storage"),
        (tensor(shape=(1 << 20, 1 << 20), stride=(0, 0)), "outside its storage"),
        (tensor(shape=(1 << 47, 0, 1 << 47), stride=(0, 0, 0)), "outside its storage"),
        (tensor(shape=(1 << 40, 1 << 40), stride=(1, 1)), "outside its storage"),
        (tensor(stride=(1,)), "do not fit"),
        (tensor(shape=(1,) * 40, stride=(1,) * 40), "do not fit"),
    ],
)
def test_a_tensor_must_lie_within_its_storage(
    view: bytes, words: str, written: Callable[[bytes], Path]
) -> None:
    assert words in refusal(written(torch_zip(state(view))))


def test_a_number_that_is_a_flag_is_no_offset(written: Callable[[bytes], Path]) -> None:
    parts = (storage(), b"\x88", numbers((2,)), numbers((1,)), b"\x89", HOOKS)
    assert "impossible" in refusal(written(torch_zip(state(REBUILD + many(*parts) + b"R"))))


def test_pickle_bombs_are_refused(
    written: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = b"\x80\x02" + b"N" * torch_pickle.MAX_PICKLE_BYTES
    assert "more than any" in refusal(written(torch_zip(huge)))
    monkeypatch.setattr(torch_pickle, "_MAX_OPERATIONS", 1000)
    assert "more operations" in refusal(written(torch_zip(b"\x80\x02" + b"N" * 1001)))


def test_deep_and_self_multiplying_values_are_refused_at_once(
    written: Callable[[bytes], Path],
) -> None:
    """A tuple of itself twice, 60 deep, never ends when hashed or printed."""
    doubled = b")" + b"q\x01h\x01\x86" * 60
    assert "is a tuple" in refusal(written(torch_zip(state(doubled))))
    assert "a tuple, not text" in refusal(written(torch_zip(b"\x80\x02}" + doubled + b"Ns.")))
    assert "is a tuple" in refusal(written(torch_zip(state(b")" + b"\x85" * 200_000))))


# ---- the archive around it


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("legacy.bin", "before 1.6; re-save it with torch.save of a current torch, or as safetens"),
        ("nested.bin", "'state_dict' is a dict, not a tensor"),
        ("script.bin", "TorchScript"),
        ("uint16.bin", "_rebuild_tensor_v3"),
        ("whole_module.bin", "torch.nn.modules.linear.Linear"),
    ],
)
def test_other_torch_files_are_refused_with_what_to_do(file: str, words: str) -> None:
    assert words in refusal(DATA / file)


GOOD = state(tensor())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a torch file"),
        (pickle.dumps({"w": 1}), "bare pickle"),
        (torch_zip(GOOD)[:-30], "truncated or corrupt"),
        (torch_zip(GOOD)[:200], "truncated or corrupt"),
        (stored_zip([("a.txt", b"hello")]), "not one torch.save made"),
        (stored_zip([("a/data.pkl", GOOD), ("b/data.pkl", GOOD)]), "not one torch.save made"),
        (torch_zip(GOOD, extra=(("other/data/1", b""),)), "other/data/1"),
        (torch_zip(GOOD, extra=(("../evil", b""),)), "../evil"),
        (torch_zip(GOOD, extra=(("m/../../evil", b""),)), "m/../../evil"),
        (torch_zip(GOOD, extra=(("/etc/evil", b""),)), "/etc/evil"),
        (torch_zip(GOOD, extra=(("m/data/a\\..\\b", b""),)), "m/data/a"),
        (torch_zip(GOOD, extra=(("m/constants.pkl", b""),)), "TorchScript"),
        (torch_zip(GOOD, extra=(("m/code/__torch__.py", b""),)), "TorchScript"),
        (torch_zip(GOOD).replace(b"little", b"biggie"), "byte order 'biggie'"),
        (stored_zip([("m/data.pkl", GOOD)]), "(data/0) is missing"),
        (stored_zip([("m/data.pkl", GOOD), ("m/byteorder", b"big")]), "byte order 'big'"),
        (
            stored_zip([("m/data.pkl", GOOD), ("m/data/0", SIX)], compression=zipfile.ZIP_DEFLATED),
            "compressed",
        ),
    ],
)
def test_a_broken_or_foreign_archive_is_refused(
    raw: bytes, words: str, written: Callable[[bytes], Path]
) -> None:
    assert words in refusal(written(raw))


def central_record(raw: bytes, entry: str) -> int:
    return raw.index(entry.encode(), raw.index(b"PK\x01\x02")) - 46


def test_entries_that_overlap_or_point_elsewhere_are_refused(
    written: Callable[[bytes], Path],
) -> None:
    raw = torch_zip(GOOD)
    first, second = central_record(raw, "m/data.pkl"), central_record(raw, "m/data/0")
    aliased = bytearray(raw)
    aliased[second + 42 : second + 46] = raw[first + 42 : first + 46]
    assert "overlaps another" in refusal(written(bytes(aliased)))
    swapped = bytearray(aliased)
    swapped[first + 42 : first + 46] = raw[second + 42 : second + 46]
    assert "where it should be" in refusal(written(bytes(swapped)))
    longer = bytearray(raw)
    for field in (20, 24):
        longer[first + field : first + field + 4] = struct.pack("<I", len(GOOD) + 8)
    assert "overlaps another" in refusal(written(bytes(longer)))
    beyond = bytearray(raw)
    for field in (20, 24):
        beyond[second + field : second + field + 4] = struct.pack("<I", 1 << 30)
    assert "overlaps the contents" in refusal(written(bytes(beyond)))
    nowhere = bytearray(raw)
    nowhere[second + 42 : second + 46] = b"\xf0\xff\xff\xff"
    assert "overlaps another" in refusal(written(bytes(nowhere)))


def test_an_entry_listed_twice_is_refused(written: Callable[[bytes], Path]) -> None:
    """Two readers could each see another of the two."""
    with pytest.warns(UserWarning, match="Duplicate"):
        raw = torch_zip(GOOD, extra=(("m/data.pkl", b"cos\nsystem\n."),))
    assert "m/data.pkl" in refusal(written(raw))


def test_an_encrypted_entry_is_refused(written: Callable[[bytes], Path]) -> None:
    raw = bytearray(torch_zip(GOOD))
    raw[central_record(raw, "m/data/0") + 8] |= 1
    assert "encrypted" in refusal(written(bytes(raw)))


def test_missing_files_and_folders_are_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "pytorch_model.bin")
    (tmp_path / "x.bin").mkdir()
    assert "directory" in refusal(tmp_path / "x.bin")


@pytest.mark.parametrize("file", ["module.bin", "legacy.bin"])
def test_no_damage_to_a_file_is_anything_but_one_line(
    file: str, written: Callable[[bytes], Path]
) -> None:
    """Seeded random damage; in the data it goes unseen (torch files carry no digest)."""
    dice = random.Random(7)
    original = (DATA / file).read_bytes()
    refused = 0
    for _ in range(400):
        raw = bytearray(original)
        for _ in range(dice.choice((1, 1, 4, 40))):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        path = written(bytes(raw[: dice.choice((len(raw), len(raw), dice.randrange(len(raw)))) :]))
        try:
            for found in TorchFile(path).values():
                assert found.read().shape == found.shape
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_the_writer_agrees_with_pickle_itself() -> None:
    """The hand-made pickles are what they claim: pickle reads them as the same structure."""

    class Plain(pickle.Unpickler):
        def find_class(self, module: str, attribute: str) -> object:
            if attribute == "OrderedDict":
                return OrderedDict
            return (lambda *args: args) if attribute.startswith("_rebuild") else attribute

        def persistent_load(self, reference: object) -> object:
            return reference

    read = Plain(io.BytesIO(GOOD)).load()["w"]
    assert read[0] == ("storage", "FloatStorage", "0", "cpu", 6)
    assert read[1:5] == (0, (2, 3), (3, 1), False)
