"""`convert`, `quantize` and what goes wrong: killed, interrupted, disk full, read-only, a source
that is damaged. One clear line each, no half artifact, no touched source.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import make_read_only, mounted_tmpfs
from safetensors.numpy import load_file, save_file

import fastvlm_mlx as fv
from tests.cli.command import DEMO, Run, copy_of_demo, edit_json, spawn, wait

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "number_42.png"
ANSWER = "The number 42 in blue."


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def answer(folder: Path) -> str:
    return fv.load(folder).generate("Describe the image.", images=[PICTURE]).text


def test_convert_writes_a_folder_that_answers_and_says_what_it_wrote(
    tmp_path: Path, run: Run
) -> None:
    ran = run("convert", "demo", tmp_path / "native", "--dtype", "bfloat16")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        f"{tmp_path / 'native'}: 4.83 MB of weights, bfloat16",
        "checked for native, mlx-swift-lm",
        "mlx-vlm takes only towers of Apple's size; all else it requires is met",
    ]
    assert answer(tmp_path / "native") == ANSWER


def test_the_card_holds_the_exact_command(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "two words"
    assert run("quantize", "demo", out, "--bits", "8", "--recipe", "uniform").code == 0
    wanted = f"fastvlm quantize demo '{out}' --bits 8 --recipe uniform"
    assert wanted in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--bits", "8"], (8, 64, "affine")),
        (["--bits", "4", "--group-size", "32"], (4, 32, "affine")),
        (["--bits", "3"], (3, 64, "affine")),
        (["--mode", "mxfp4"], (4, 32, "mxfp4")),
        (["--mode", "mxfp8"], (8, 32, "mxfp8")),
        (["--mode", "nvfp4"], (4, 16, "nvfp4")),
    ],
)
def test_quantize_packs_as_asked_and_the_result_answers(
    tmp_path: Path, run: Run, options: list[str], setting: tuple[int, int, str]
) -> None:
    assert run("quantize", "demo", tmp_path / "packed", *options).code == 0
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    stated = config["quantization"]
    assert (stated["bits"], stated["group_size"], stated["mode"]) == setting
    assert stated["mm_projector.0"] is stated["mm_projector.layers.0"] is False
    assert config["quantization_config"] == stated
    assert answer(tmp_path / "packed").startswith("The number")


def test_sixteen_bits_are_float16_and_nothing_is_packed(tmp_path: Path, run: Run) -> None:
    assert run("quantize", "demo", tmp_path / "half", "--bits", "16").code == 0
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization" not in config
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bits", "7"], "7 bits in groups of 64, affine cannot be packed: use affine with"),
        (["--bits", "4", "--group-size", "48"], "in groups of 48"),
        (["--mode", "mxfp4", "--bits", "8"], "8 bits in groups of 32, mxfp4 cannot be packed"),
        (
            ["--bits", "16", "--mode", "nvfp4"],
            "16 is float16, nothing packed: leave out --mode",
        ),
        (["--bits", "16", "--dtype", "float32"], "leave out --dtype"),
        (["--bits", "0"], "0 bits leave nothing of a model"),
        (["--embeddings", "many"], "'many' is no number of bits"),
        (["--report-picture", "x.png"], "--report-picture needs --report"),
        (["--report", "--report-picture", "missing.png"], "missing.png: no such file"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_anything_is_written(
    tmp_path: Path, run: Run, arguments: list[str], line: str
) -> None:
    assert line in run("quantize", "demo", tmp_path / "packed", *arguments).refused()
    assert names(tmp_path) == set()


def test_an_existing_folder_needs_overwrite_and_is_then_replaced(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "native"
    assert run("convert", "demo", out).code == 0
    before = (out / "model.safetensors").read_bytes()
    assert "add --overwrite" in run("convert", "demo", out, "--dtype", "float32").refused()
    assert (out / "model.safetensors").read_bytes() == before
    assert run("convert", "demo", out, "--dtype", "float32", "--overwrite").code == 0
    assert (out / "model.safetensors").stat().st_size > len(before)
    assert names(tmp_path) == {"native"}


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path, run: Run) -> None:
    assert run("quantize", "demo", tmp_path / "packed").code == 0
    line = run("quantize", tmp_path / "packed", tmp_path / "again").refused()
    assert "quantized already: start from the float model" in line
    line = run("quantize", tmp_path / "packed", tmp_path / "again", "--bits", "16").refused()
    assert "quantized already: start from the float model" in line
    assert names(tmp_path) == {"packed"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["quantize", "nobody/nothing", "out", "--bits", "7"], "7 bits in groups of 64"),
        (["convert", "nobody/nothing", "no/folder/out"], "no/folder is missing"),
        (["export-app", "nobody/nothing", "no/folder/out", "--bits", "4"], "no/folder is missing"),
    ],
)
def test_a_mistake_is_said_before_anything_is_downloaded(
    run: Run, arguments: list[str], line: str
) -> None:
    assert line in run(*arguments).refused()


def test_an_empty_destination_is_not_the_current_folder(run: Run) -> None:
    assert "the name of the destination is empty" in run("convert", "demo", "").refused()


def test_the_report_is_of_what_was_written_whatever_its_name(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named demo was reported on as the demo model, which loses nothing."""
    monkeypatch.chdir(tmp_path)
    options = ["--bits", "2", "--recipe", "uniform", "--report", "--report-picture", str(PICTURE)]
    ran = run("quantize", "demo", "demo", *options)
    assert ran.code == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["kl"]["mean"] > 0
    assert report["quantized"]["size"]["decoder_bits_per_weight"] < 3
    assert report["questions"] == 1
    assert report["worst"][0]["picture"] == PICTURE.name, "no folders of the user's in a report"
    assert "KL, mean" in ran.out


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_one_value_that_is_not_finite_is_not_packed_away(
    tmp_path: Path, run: Run, mode: str, bad: str
) -> None:
    """`mx.quantize` makes a code of it like any other, and the model answers as if nothing were."""
    model = copy_of_demo(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.language_model.layers.1.mlp.down_proj.weight"][3, 5] = float(bad)
    save_file(weights, model / "model.safetensors")
    line = run("quantize", model, tmp_path / "packed", "--mode", mode).refused()
    assert "layers.1.mlp.down_proj.weight has values that are not finite" in line
    assert names(tmp_path) == {"model"}


_KILLED = """
import os, signal, sys
from pathlib import Path
from fastvlm_mlx.convert.pipeline import convert
left = int(sys.argv[3])
def progress(done, total, what):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], Path(sys.argv[2]), dtype="float32", overwrite=True, progress=progress)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_old_folder_is_whole_and_the_next_run_clears_up(
    tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "native"
    assert run("convert", "demo", out).code == 0
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    source = {path: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}
    for moment in (0, 1, 40, 100, 160, 220, 280):
        killed = subprocess.run([sys.executable, "-c", _KILLED, "demo", out, str(moment)])
        assert killed.returncode == -signal.SIGKILL
        assert {path.name: path.read_bytes() for path in out.iterdir()} == old
        left = names(tmp_path) - {"native"}
        # One: each run removes what the one before it left.
        assert len(left) == 1 and left.pop().startswith(".native.partial-")
    assert run("convert", "demo", out, "--overwrite").code == 0
    assert names(tmp_path) == {"native"}
    assert source == {path: path.read_bytes() for path in source}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0, 0.05, 0.2])
def test_ctrl_c_and_kill_leave_nothing_or_the_whole(
    tmp_path: Path, delay_s: float, number: signal.Signals
) -> None:
    process = spawn("convert", "demo", tmp_path / "native")
    while not any(tmp_path.glob("*/*")) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(number)
    ran = wait(process)
    ended = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert ran.code in (ended, 0, -number)  # the last: after all was done, at Python's own end
    assert names(tmp_path) in ((set(), {"native"}) if ran.code == ended else ({"native"},))
    assert "Traceback" not in ran.err
    if names(tmp_path):
        assert answer(tmp_path / "native") == ANSWER


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, run: Run) -> None:
    with mounted_tmpfs(tmp_path / "small", nbytes=4 << 20) as small:
        line = run("convert", "demo", small / "native").refused()
        assert "needs 6." in line and "free" in line
        assert names(small) == set()


def test_a_disk_that_fills_up_on_the_way_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Room for the weights as reckoned, but another program takes it meanwhile."""
    code = (
        "import sys, fastvlm_mlx.convert.pipeline as p; p.require_space = lambda *_: None; "
        "from fastvlm_mlx.cli.main import main; sys.exit(main())"
    )
    with mounted_tmpfs(tmp_path / "small", nbytes=4 << 20) as small:
        command = [sys.executable, "-c", code, "convert", "demo", str(small / "native")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 2
        assert ran.stderr.count("\n") == 1
        assert "no space left on the disk" in ran.stderr
        assert names(small) == set()


def test_a_disk_without_room_for_the_package_is_one_line_and_leaves_nothing(
    tmp_path: Path, run: Run
) -> None:
    """The decoder's file fits; coremltools' writers know no errno, and keep a copy."""
    pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python")
    with mounted_tmpfs(tmp_path / "small", nbytes=4 << 20) as small:
        assert "free" in run("export-app", "demo", small / "app", "--bits", "4").refused()
        assert names(small) == set()


def test_a_read_only_destination_is_one_line(tmp_path: Path, run: Run) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=64 << 20) as disk:
        make_read_only(disk)
        assert "read-only file system" in run("convert", "demo", disk / "native").refused()


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_damaged_sources_are_one_line_and_leave_nothing(
    tmp_path: Path, run: Run, command: str
) -> None:
    model, out = copy_of_demo(tmp_path / "model"), tmp_path / "out"
    weights = model / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-1000])
    assert "truncated or corrupt" in run(command, model, out).refused()
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    assert "truncated or corrupt" in run(command, model, out).refused()
    length = int.from_bytes(whole[:8], "little")
    nan = b"\xff\xff" * 400
    weights.write_bytes(whole[: 8 + length] + nan + whole[8 + length + len(nan) :])
    assert "not finite" in run(command, model, out).refused()
    weights.unlink()
    assert "has no *.safetensors" in run(command, model, out).refused()
    weights.write_bytes(whole)
    edit_json(model / "config.json", text_config__intermediate_size=64)
    assert "the config asks for" in run(command, model, out).refused()
    assert names(tmp_path) == {"model"}


def test_a_missing_shard_is_named(tmp_path: Path, run: Run) -> None:
    model = copy_of_demo(tmp_path / "model")
    index = {"weight_map": {"x": "model.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    line = run("convert", model, tmp_path / "out").refused()
    assert "model-00002-of-00002.safetensors is missing" in line
    assert names(tmp_path) == {"model"}


def test_a_broken_tokenizer_is_found_and_nothing_is_left(tmp_path: Path, run: Run) -> None:
    model = copy_of_demo(tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in run("convert", model, tmp_path / "out").refused()
    assert names(tmp_path) == {"model"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, run: Run) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "no permission" in run("convert", "demo", locked / "native").refused()
