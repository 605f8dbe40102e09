"""The weight writer against the safetensors library and MLX, and what it does with memory."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastvlm_mlx.convert.safetensors_writer import (
    Shard,
    TensorSpec,
    index_json,
    plan_shards,
    write_shards,
)
from fastvlm_mlx.errors import CheckpointError


def arrays_of_every_dtype() -> dict[str, mx.array]:
    """Values of each dtype: odd lengths, a scalar, nothing at all, -0, subnormals, the largest."""
    mx.random.seed(7)
    return {
        "b.bfloat16": mx.random.normal((5, 3)).astype(mx.bfloat16),
        "b.float16": mx.array([-0.0, 6e-8, 65504.0, -65504.0, 1 / 3], mx.float16),
        "a.float32": mx.array([[-0.0, 1e-45, 3.4028235e38]], mx.float32),
        "a.uint32": mx.array([0, 2**32 - 1, 7], mx.uint32),
        "c.uint8": mx.array([255, 0, 127], mx.uint8),
        "d.bfloat16_edges": mx.array([0x8000, 0x0001, 0x7F7F], mx.uint16).view(mx.bfloat16),
        "d.scalar": mx.array(2.5, mx.float32),
        "d.nothing": mx.zeros((0, 4), mx.float16),
        "ü.name": mx.ones((1,), mx.float32),
    }


def spec_of(name: str, array: mx.array) -> TensorSpec:
    return TensorSpec(name, tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))


def specs_of(arrays: dict[str, mx.array]) -> list[TensorSpec]:
    return [spec_of(name, array) for name, array in arrays.items()]


def write(folder: Path, arrays: dict[str, mx.array], **options: int) -> tuple[Shard, ...]:
    shards = plan_shards(specs_of(arrays), **options)
    folder.mkdir(exist_ok=True)
    write_shards(folder, shards, iter(sorted(arrays.items())), progress=lambda _: None)
    return shards


def bits(array: mx.array) -> bytes:
    return bytes(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)))


def test_mlx_reads_back_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    write(tmp_path, arrays)
    read, metadata = mx.load(str(tmp_path / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype), name
        assert bits(read[name]) == bits(array), name


def test_the_safetensors_library_reads_the_same_values(tmp_path: Path) -> None:
    arrays = arrays_of_every_dtype()
    write(tmp_path, arrays)
    with safe_open(tmp_path / "model.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "mlx"}
        assert sorted(opened.keys()) == sorted(arrays)
        for name, array in arrays.items():
            assert tuple(opened.get_slice(name).get_shape()) == tuple(array.shape)
    # numpy has no bfloat16: those are read by MLX above.
    plain = {name: array for name, array in arrays.items() if array.dtype != mx.bfloat16}
    write(tmp_path / "plain", plain)
    read = load_file(tmp_path / "plain" / "model.safetensors")
    for name, array in plain.items():
        assert read[name].dtype == np.array(array).dtype
        assert read[name].tobytes() == bits(array), name


def test_a_file_of_one_dtype_is_the_safetensors_librarys_own_byte_for_byte(tmp_path: Path) -> None:
    arrays = {f"layer.{i}.weight": mx.random.normal((3, i + 1)) for i in range(12)}
    write(tmp_path, arrays)
    reference = tmp_path / "reference.safetensors"
    save_file(
        {name: np.array(array) for name, array in arrays.items()},
        reference,
        metadata={"format": "mlx"},
    )
    assert (tmp_path / "model.safetensors").read_bytes() == reference.read_bytes()


def test_the_header_is_compact_sorted_and_padded_to_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 10):
        folder = tmp_path / str(length)
        write(folder, {"x" * length: mx.ones((2,)), "a": mx.ones((1,), mx.uint8)})
        content = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = content[8 : 8 + size].decode()
        assert size % 8 == 0 and len(text.rstrip(" ")) > size - 8
        fields = json.loads(text)
        assert list(fields) == ["__metadata__", "a", "x" * length]
        assert len(content) == 8 + size + 9


def test_bytes_do_not_depend_on_insertion_order(tmp_path: Path) -> None:
    """safetensors bytes depend on the order of insertion in mx.save_safetensors and many ports."""
    arrays = arrays_of_every_dtype()
    backwards = dict(reversed(arrays.items()))
    digests = set()
    for number, given in enumerate((arrays, backwards, arrays)):
        write(tmp_path / str(number), given)
        content = (tmp_path / str(number) / "model.safetensors").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1


def test_several_shards_hold_each_tensor_once_as_the_index_says(tmp_path: Path) -> None:
    arrays = {f"t{i:02d}": mx.random.normal((25,)) for i in range(10)}
    shards = write(tmp_path, arrays, max_shard_bytes=300)
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [shard.file_name for shard in shards] == names
    assert [len(shard.specs) for shard in shards] == [3, 3, 3, 1]
    index = index_json(shards)
    assert index["metadata"] == {"total_size": 1000}
    assert list(index["weight_map"]) == sorted(arrays)
    for name, file_name in index["weight_map"].items():
        read = mx.load(str(tmp_path / file_name))
        assert bits(read[name]) == bits(arrays[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_shard_is_filled_to_the_limit_and_a_larger_tensor_is_alone() -> None:
    specs = [
        TensorSpec(name, (size,), "uint8") for name, size in zip("abcd", (4, 6, 11, 1), strict=True)
    ]
    shards = plan_shards(specs, max_shard_bytes=10)
    assert [[spec.name for spec in shard.specs] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.nbytes for shard in shards] == [10, 11, 1]


def test_a_plan_that_cannot_be_is_refused() -> None:
    spec = TensorSpec("a", (2,), "float32")
    with pytest.raises(ValueError, match="a is planned twice"):
        plan_shards([spec, TensorSpec("b", (), "uint8"), spec])
    with pytest.raises(ValueError, match="no tensors"):
        plan_shards([])
    with pytest.raises(ValueError, match="float64 is not written"):
        TensorSpec("a", (2,), "float64")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", mx.ones((2,)))], "b was planned but not given"),
        ([("b", mx.ones((3,)))], "b .* was given, .*'a'.* was planned"),
        ([("a", mx.ones((1, 2)))], r"a \(1, 2\) .* was given"),
        ([("a", mx.ones((2,), mx.float16))], "a .*float16 was given"),
        (
            [("a", mx.ones((2,))), ("b", mx.ones((3,))), ("c", mx.ones((1,)))],
            "c was given but not planned",
        ),
    ],
)
def test_arrays_that_are_not_those_planned_are_a_bug(
    tmp_path: Path, given: list[tuple[str, mx.array]], message: str
) -> None:
    shards = plan_shards([TensorSpec("a", (2,), "float32"), TensorSpec("b", (3,), "float32")])
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, shards, iter(given), progress=lambda _: None)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_is_not_finite_is_refused_by_its_tensors_name(
    tmp_path: Path, dtype: mx.Dtype, value: float
) -> None:
    """Wherever it lies: first, last, or behind the first slice that is looked at."""
    for number, place in enumerate((0, 1000, 300_000, 399_999)):
        values = np.zeros(400_000, np.float32)
        values[place] = value
        folder = tmp_path / str(number)
        with pytest.raises(CheckpointError, match=r"^layer\.bias has values that are not finite"):
            write(folder, {"layer.bias": mx.array(values).astype(dtype)})


def test_codes_and_negative_largest_values_are_no_infinities(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "codes": mx.array([0x7F800000, 0xFFFFFFFF], mx.uint32),
            "scales": mx.array([255, 127], mx.uint8),
            "weight": mx.array([-65504.0, 65504.0], mx.float16),
        },
    )


@pytest.mark.parametrize("turn", ["transposed", "strided", "broadcast", "offset"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.uint8])
def test_arrays_that_are_views_are_written_in_their_own_order(
    tmp_path: Path, turn: str, dtype: mx.Dtype
) -> None:
    base = mx.arange(60).reshape(3, 4, 5).astype(dtype)
    view = {
        "transposed": base.transpose(2, 0, 1),
        "strided": base.reshape(-1)[::3],
        "broadcast": mx.broadcast_to(base[:, :1], (3, 7, 5)),
        "offset": base[1:],
    }[turn]
    write(tmp_path, {"a": view})
    read = mx.load(str(tmp_path / "model.safetensors"))["a"]
    assert mx.array_equal(read, view).item()


def test_progress_moves_within_a_large_tensor_and_ends_at_the_total(tmp_path: Path) -> None:
    arrays = {"a": mx.zeros((12 << 20,), mx.float32), "b": mx.zeros((3,), mx.uint8)}
    heard: list[int] = []
    shards = plan_shards(specs_of(arrays))
    write_shards(tmp_path, shards, iter(arrays.items()), progress=heard.append)
    assert heard == [16 << 20, 32 << 20, 48 << 20, (48 << 20) + 3]


def test_memory_holds_one_tensor_whatever_their_number(tmp_path: Path) -> None:
    """Ports gather all weights in a dict before they save, and need the model twice."""
    one_bytes = 16 << 20
    specs = [TensorSpec(f"t{i:02d}", (one_bytes // 2,), "bfloat16") for i in range(20)]

    def arrays() -> Iterator[tuple[str, mx.array]]:
        for number, spec in enumerate(specs):
            yield spec.name, mx.full(spec.shape, number, mx.bfloat16)

    shards = plan_shards(specs)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_shards(tmp_path, shards, arrays(), progress=lambda _: None)
    assert mx.get_peak_memory() - before < 2 * one_bytes
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() == 0


def test_a_written_tensor_is_let_go_before_the_next_is_asked_for(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{i}", (1 << 20,), "float32") for i in range(4)]
    held: list[int] = []
    before = mx.get_active_memory()

    def arrays() -> Iterator[tuple[str, mx.array]]:
        for spec in specs:
            held.append(mx.get_active_memory() - before)
            yield spec.name, mx.ones(spec.shape)

    write_shards(tmp_path, plan_shards(specs), arrays(), progress=lambda _: None)
    assert held == [0, 0, 0, 0]


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path, {"a": mx.ones((2,))})
    assert (tmp_path / "model.safetensors").read_text() == "mine"


_WRITE_8_MB = """
import sys
from pathlib import Path
import mlx.core as mx
from fastvlm_mlx.convert.place import new_folder
from fastvlm_mlx.convert.safetensors_writer import TensorSpec, plan_shards, write_shards
from fastvlm_mlx.errors import CheckpointError

shards = plan_shards([TensorSpec("a", (1 << 21,), "float32")])
try:
    with new_folder(Path(sys.argv[1]), overwrite=False) as folder:
        arrays = iter([("a", mx.ones((1 << 21,)))])
        write_shards(folder, shards, arrays, progress=lambda _: None)
except CheckpointError as error:
    print(error)
"""


def test_a_file_size_limit_leaves_nothing_and_says_so_in_one_line(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    ran = subprocess.run(
        [sys.executable, "-c", _WRITE_8_MB, str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("\n") == 1
    assert "ulimit -f" in ran.stdout and "nothing was written" in ran.stdout
    assert list(tmp_path.iterdir()) == []
