"""The destination: what is refused, and what kill -9, Ctrl-C and a full disk leave behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import make_read_only, mounted_tmpfs

from fastvlm_mlx.convert import leftovers
from fastvlm_mlx.convert.place import check_destination, disk_error, new_folder, require_space
from fastvlm_mlx.errors import CheckpointError


def model_folder(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(dst: Path, *, overwrite: bool = False, source: Path | None = None) -> str:
    """The line that both functions refuse `dst` with, nothing beside it touched."""
    before = names(dst.parent) if dst.parent.is_dir() else []
    with pytest.raises(CheckpointError) as checked:
        check_destination(dst, overwrite=overwrite, source=source)
    with (
        pytest.raises(CheckpointError) as made,
        new_folder(dst, overwrite=overwrite, source=source),
    ):
        pytest.fail("the block was entered")
    assert str(made.value) == str(checked.value)
    assert "\n" not in str(made.value)
    assert (names(dst.parent) if dst.parent.is_dir() else []) == before
    return str(made.value)


# What is made


def test_the_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    with new_folder(dst, overwrite=False) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".out.partial-")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert not dst.exists()
    assert names(tmp_path) == ["out"]
    assert (dst / "deep" / "file").read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_rights_are_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    """mkdtemp's folders are 0700: a model on a shared disk that no colleague could read."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out", overwrite=False):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, CheckpointError])
def test_an_exception_removes_what_was_made_and_goes_on(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="why"), new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
        raise error("why")
    assert names(tmp_path) == []


def test_an_empty_folder_is_used_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_overwrite_replaces_a_model_folder_only_at_the_end(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out", "old")
    with new_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (dst / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(dst) == ["config.json"] and (dst / "config.json").read_text() == "new"


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), new_folder(dst, overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "old"


@pytest.mark.parametrize("spelling", [".", "../out", "../out/.", "sub/.."])
def test_a_folder_named_by_dots_is_the_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    if spelling == "sub/..":
        (tmp_path / "out" / "sub").mkdir()
        assert "sub/, which is no part" in refusal(Path(spelling), overwrite=True)
        return
    with new_folder(Path(spelling), overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json"]


# What is refused


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out")
    assert refusal(dst) == (
        f"{dst} exists: add --overwrite to replace it, or choose another folder"
    )


@pytest.mark.parametrize(
    "stranger",
    [
        "notes.txt",
        "llava_qwen.py",
        "processing_fastvlm.py",
        "pytorch_model.bin",
        "data.json",
        "sub/config.json",
        "sub/LICENSE",
        "license.py",
        ".git/HEAD",
        "fastvithd.mlpackage/notes.txt",
        "x.safetensors/notes.txt",
        "adapter_model.safetensors",
        "my_lora_adapter.safetensors",
        "adapter_model.safetensors.index.json",
        "my_prompt.jinja",
    ],
)
def test_a_folder_with_a_strangers_file_is_never_replaced(tmp_path: Path, stranger: str) -> None:
    dst = model_folder(tmp_path / "out")
    (dst / stranger).parent.mkdir(exist_ok=True)
    (dst / stranger).write_text("precious")
    assert refusal(dst, overwrite=True) == (
        f"{dst} holds {stranger}, which is no part of a model folder: move it away"
    )
    assert (dst / stranger).read_text() == "precious"


def test_a_link_to_a_folder_is_a_stranger_and_is_not_followed(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out")
    (dst / "fastvithd.mlpackage").symlink_to(model_folder(tmp_path / "elsewhere"))
    assert "holds fastvithd.mlpackage, which is no part" in refusal(dst, overwrite=True)


def test_a_folder_without_config_is_no_model_folder(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "README.md").write_text("a project of mine")
    assert "has no config.json, so it is no model folder" in refusal(dst, overwrite=True)


def test_every_file_of_an_artifact_may_be_replaced(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out")
    for name in (
        "model-00001-of-00002.safetensors model.safetensors.index.json generation_config.json "
        "preprocessor_config.json processor_config.json tokenizer.json tokenizer_config.json "
        "special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja "
        "chat_template.json README.md LICENSE LICENSE_MODEL License.txt NOTICE.md report.json "
        ".DS_Store "
        "fastvithd.mlpackage/Manifest.json fastvithd.mlpackage/Data/com.apple.CoreML/model.mlmodel "
        "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    ).split():
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_text("")
    with new_folder(dst, overwrite=True):
        pass
    assert names(tmp_path) == ["out"] and names(dst) == []


def test_the_demo_model_may_be_replaced(tmp_path: Path) -> None:
    import fastvlm_mlx

    demo = Path(fastvlm_mlx.__file__).parent / "demo"
    check_destination(demo, overwrite=True, source=None)


def test_a_file_that_comes_while_the_new_folder_is_made_is_not_lost(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match=r"holds notes\.txt"),
        new_folder(dst, overwrite=True),
    ):
        (dst / "notes.txt").write_text("precious")
    assert (dst / "notes.txt").read_text() == "precious"
    assert names(tmp_path) == ["out"]


def test_a_file_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model_folder(tmp_path / "out"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert refusal(tmp_path / "file", overwrite=True).endswith("is a file: choose another name")
    for name in ("link", "dangling"):
        assert "is a symbolic link" in refusal(tmp_path / name, overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_parent_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'no'} is missing: make that folder first" in refusal(
        tmp_path / "no" / "out"
    )
    assert f"{tmp_path / 'file'} is no folder" in refusal(tmp_path / "file" / "out")
    assert "is no folder" in refusal(tmp_path / "file" / "deep" / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_and_what_is_in_or_around_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Tools rewrite the user's checkpoint in place; a crash leaves it broken."""
    source = model_folder(tmp_path / "around" / "source")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    for dst in (source, Path(), tmp_path / "around" / ".." / "around" / "source"):
        assert "is the source" in refusal(dst, overwrite=overwrite, source=source)
    assert "is the source" in refusal(source, overwrite=overwrite, source=tmp_path / "link")
    for dst in (source / "out", tmp_path / "link" / "out", Path("out")):
        assert "lies inside the source" in refusal(dst, overwrite=overwrite, source=source)
    around = refusal(tmp_path / "around", overwrite=overwrite, source=Path())
    assert "holds files of the source" in around
    check_destination(tmp_path / "around" / "other", overwrite=overwrite, source=source)
    check_destination(tmp_path / "around" / "source2", overwrite=overwrite, source=source)


def test_a_folder_that_the_source_only_links_to_is_refused(tmp_path: Path) -> None:
    """A snapshot of the hub's cache is links to blobs elsewhere."""
    blobs = model_folder(tmp_path / "blobs")
    source = tmp_path / "source"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    assert "holds files of the source" in refusal(blobs, overwrite=True, source=source)


def test_a_name_too_long_for_its_partial_is_refused_up_front(tmp_path: Path) -> None:
    for length in (240, 255, 300):
        assert "is too long for its disk: choose a shorter one" in refusal(
            tmp_path / ("n" * length)
        )


def test_a_read_only_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=1 << 20) as disk:
        dst = model_folder(disk / "out")
        make_read_only(disk)
        assert refusal(disk / "new") == (
            f"{disk / 'new'} is on a read-only file system: choose another folder"
        )
        assert "is on a read-only file system" in refusal(dst, overwrite=True)
        assert "exists: add --overwrite" in refusal(dst)


_CHECK_AS_NOBODY = """
import os, sys
from pathlib import Path
from fastvlm_mlx.convert.place import check_destination
from fastvlm_mlx.errors import CheckpointError

if os.geteuid() == 0:
    os.setuid(65534)
for dst in sys.argv[1:]:
    try:
        check_destination(Path(dst), overwrite=True, source=None)
    except CheckpointError as error:
        print(error)
"""


def test_a_folder_without_the_right_to_write_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders let nobody else in
        disk = Path(name)
        closed = disk / "closed"
        model_folder(closed / "out")
        disk.chmod(0o555)
        closed.chmod(0o000)
        paths = [str(disk / "new"), str(closed / "out"), str(closed / "sub" / "out")]
        ran = subprocess.run(
            [sys.executable, "-c", _CHECK_AS_NOBODY, *paths], capture_output=True, text=True
        )
        disk.chmod(0o755)
        closed.chmod(0o755)
    why = "change its rights, or choose another folder"
    expected = [f"no permission to write {path}: {why}" for path in paths]
    assert (ran.stdout.splitlines(), ran.stderr) == (expected, "")


def test_a_mount_point_is_refused_before_hours_of_work(tmp_path: Path) -> None:
    """A container's volume is empty and writable, but nothing can be renamed to it."""
    with mounted_tmpfs(tmp_path / "disk", nbytes=1 << 20) as disk:
        assert "is in use as a mount point: choose a folder inside it" in refusal(disk)
    assert "mount point" in refusal(Path("/"), overwrite=True)


# What the disk refuses


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=1 << 20) as disk:
        dst = model_folder(disk / "out", "old")
        for overwrite, place in ((True, dst), (False, disk / "new")):
            with (
                pytest.raises(CheckpointError) as raised,
                new_folder(place, overwrite=overwrite) as folder,
                (folder / "model.safetensors").open("wb") as file,
            ):
                for _ in range(4):
                    file.write(bytes(1 << 20))
            assert str(raised.value) == (
                f"no space left on the disk of {place}: nothing was written"
            )
            assert names(disk) == ["out"] and (dst / "config.json").read_text() == "old"


def test_too_little_space_is_seen_up_front(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=1 << 20) as disk:
        require_space(disk / "out", 1 << 20)
        with pytest.raises(CheckpointError) as raised:
            require_space(disk / "out", 15_200_000_000)
    line = f"{disk / 'out'} needs 15.2 GB, its disk has 1.05 MB free: "
    assert str(raised.value) == line + "make room, or choose another disk"


def test_space_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError, match="needs 1000000000 GB, its disk has"):
        require_space(tmp_path / "not" / "there", 10**18)


def test_every_error_of_a_disk_is_one_line_that_names_the_folder() -> None:
    for number in sorted(errno.errorcode):
        line = str(disk_error(OSError(number, os.strerror(number)), Path("some/out")))
        assert "some/out" in line and "\n" not in line
    assert "nothing was written" in str(disk_error(OSError(errno.EDQUOT, ""), Path("out")))


def test_an_error_of_another_file_is_said_of_that_file(tmp_path: Path) -> None:
    missing = tmp_path / "source" / "vocab.json"
    with (
        pytest.raises(CheckpointError) as raised,
        new_folder(tmp_path / "out", overwrite=False),
    ):
        missing.read_text()
    assert str(raised.value) == f"{missing} cannot be read or written: No such file or directory"
    with pytest.raises(BrokenPipeError), new_folder(tmp_path / "out", overwrite=False):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert names(tmp_path) == []


# What other runs left, or are doing


_RUN = """
import sys, time
from pathlib import Path
from fastvlm_mlx.convert.place import new_folder
from fastvlm_mlx.errors import CheckpointError

try:
    with new_folder(Path(sys.argv[1]), overwrite="--overwrite" in sys.argv) as folder:
        (folder / "config.json").write_text("by the other process")
        print("writing", flush=True)
        sys.stdin.readline()
except CheckpointError as error:
    print(error)
"""


@contextmanager
def another_run(dst: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process in the midst of making `dst`; a line on its stdin lets it finish."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _RUN, str(dst), *options]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out", "old")
    with another_run(dst, "--overwrite") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        (partial,) = (name for name in names(tmp_path) if name != "out")
        assert partial.startswith(".out.partial-")
        assert (dst / "config.json").read_text() == "old"
    with new_folder(dst, overwrite=True):
        assert len(names(tmp_path)) == 2 and partial not in names(tmp_path)
    assert names(tmp_path) == ["out"]


def test_ctrl_c_removes_what_was_made(tmp_path: Path) -> None:
    with another_run(tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        process.wait()
    assert names(tmp_path) == []


def test_what_a_living_process_makes_is_left_alone_and_the_second_to_finish_loses(
    tmp_path: Path,
) -> None:
    dst = tmp_path / "out"
    with another_run(dst) as process:
        with new_folder(dst, overwrite=False) as folder:
            (folder / "config.json").write_text("mine")
            assert sum(name.startswith(".out.partial-") for name in names(tmp_path)) == 2
        out, err = process.communicate("go on\n", timeout=60)
    assert (out.count("\n"), err) == (1, "")
    assert out.startswith(f"{dst} was made by another process meanwhile: add --overwrite")
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "mine"


def test_two_runs_with_overwrite_both_end_whole(tmp_path: Path) -> None:
    dst = model_folder(tmp_path / "out", "old")
    with another_run(dst, "--overwrite") as process:
        with new_folder(dst, overwrite=True) as folder:
            (folder / "config.json").write_text("mine")
        assert (dst / "config.json").read_text() == "mine"
        out, err = process.communicate("go on\n", timeout=60)
    assert (out, err) == ("", "")
    assert names(tmp_path) == ["out"]
    assert (dst / "config.json").read_text() == "by the other process"


def test_overwrite_replaces_what_another_run_puts_there_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with --overwrite onto a new name: the loser was told to add --overwrite."""
    dst, rename = tmp_path / "out", Path.rename

    def rename_second(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        model_folder(dst, "by the other process")
        return path.rename(target)

    with new_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("mine")
        monkeypatch.setattr(Path, "rename", rename_second)
    assert names(tmp_path) == ["out"] and names(dst) == ["config.json"]
    assert (dst / "config.json").read_text() == "mine"


def test_a_file_of_another_put_there_at_the_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, rename = tmp_path / "out", Path.rename

    def rename_second(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        dst.mkdir()
        (dst / "notes.txt").write_text("precious")
        return path.rename(target)

    with (
        pytest.raises(CheckpointError, match=r"holds notes\.txt"),
        new_folder(dst, overwrite=True),
    ):
        monkeypatch.setattr(Path, "rename", rename_second)
    assert names(tmp_path) == ["out"] and names(dst) == ["notes.txt"]


def test_overwrite_takes_a_place_that_another_run_leaves_empty_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run is between its two renames when this one is about to move the old folder."""
    dst = model_folder(tmp_path / "out", "old")
    replace = leftovers.replace

    def replace_late(place: Path, partial: Path) -> None:
        monkeypatch.setattr(leftovers, "replace", replace)
        place.rename(tmp_path / "aside")
        replace(place, partial)

    with new_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("mine")
        monkeypatch.setattr(leftovers, "replace", replace_late)
    assert names(tmp_path) == ["aside", "out"]
    assert (dst / "config.json").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_between_its_two_renames_has_lost_nothing(
    tmp_path: Path, overwrite: bool
) -> None:
    model_folder(tmp_path / ".out.replaced-0a1b2c", "old")
    model_folder(tmp_path / ".out.partial-0a1b2d", "new")
    dst = tmp_path / "out"
    if overwrite:
        check_destination(dst, overwrite=True, source=None)
    else:
        with pytest.raises(CheckpointError, match="exists: add --overwrite"):
            check_destination(dst, overwrite=False, source=None)
    assert (dst / "config.json").read_text() == "old"
    with pytest.raises(KeyboardInterrupt), new_folder(dst, overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "old"


def test_a_run_killed_after_its_two_renames_is_tidied_up(tmp_path: Path) -> None:
    model_folder(tmp_path / ".out.replaced-0a1b2c", "old")
    dst = model_folder(tmp_path / "out", "new")
    check_destination(dst, overwrite=True, source=None)
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "new"


def test_what_a_living_process_has_moved_aside_is_left_alone(tmp_path: Path) -> None:
    replaced = model_folder(tmp_path / ".out.replaced-0a1b2c", "old")
    hold = "import fcntl, os, sys; fd = os.open(sys.argv[1], 0); fcntl.flock(fd, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", hold + "print(flush=True); input()", str(replaced)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        check_destination(tmp_path / "out", overwrite=False, source=None)
        assert names(tmp_path) == [replaced.name]
        process.kill()
    with pytest.raises(CheckpointError, match="exists"):
        check_destination(tmp_path / "out", overwrite=False, source=None)
    assert names(tmp_path) == ["out"]


def test_an_error_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = model_folder(tmp_path / "out", "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if ".replaced-" in target.name:
            raise KeyboardInterrupt
        return moved

    with pytest.raises(KeyboardInterrupt), new_folder(dst, overwrite=True):
        monkeypatch.setattr(Path, "rename", interrupted)
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "old"


def test_another_runs_check_between_the_two_renames_puts_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = model_folder(tmp_path / "out", "old")
    rename, checked = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if ".replaced-" in target.name:  # another descriptor's lock, as another process's is
            check_destination(dst, overwrite=True, source=None)
            checked.append(dst.exists())
        return moved

    with new_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        monkeypatch.setattr(Path, "rename", watched)
    assert checked == [False]
    assert names(tmp_path) == ["out"] and (dst / "config.json").read_text() == "new"


def test_a_replaced_folder_that_was_half_removed_never_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = model_folder(tmp_path / "out", "old")

    def killed(folder: Path, **options: bool) -> None:
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(leftovers.shutil, "rmtree", killed)
        with pytest.raises((KeyboardInterrupt, OSError)), new_folder(dst, overwrite=True) as folder:
            (folder / "config.json").write_text("new")
    (dst / "config.json").unlink()
    dst.rmdir()
    check_destination(dst, overwrite=False, source=None)
    assert not dst.exists()
    with new_folder(dst, overwrite=False):
        pass
    assert names(tmp_path) == ["out"]


def test_hidden_folders_of_other_names_and_kinds_are_left_alone(tmp_path: Path) -> None:
    kept = {
        ".out.partial-notes",
        ".out.partial-0a1b2c3",
        ".out2.partial-0a1b2c",
        ".other.partial-0a1b2c",
        "out.partial-0a1b2c",
    }
    for name in kept:
        model_folder(tmp_path / name)
    (tmp_path / ".out.partial-0a1b2c").write_text("a file")
    (tmp_path / ".out.partial-0a1b2d").symlink_to(tmp_path / ".out.partial-notes")
    with new_folder(tmp_path / "out", overwrite=False):
        pass
    assert set(names(tmp_path)) == kept | {"out", ".out.partial-0a1b2c", ".out.partial-0a1b2d"}
    assert (tmp_path / ".out.partial-notes" / "config.json").exists()


def test_another_users_leftover_is_left_alone(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    for name in (".out.partial-0a1b2c", ".out.replaced-0a1b2c"):
        os.chown(model_folder(tmp_path / name), 12345, 12345)
    with new_folder(tmp_path / "out", overwrite=False):
        pass
    assert names(tmp_path) == [".out.partial-0a1b2c", ".out.replaced-0a1b2c", "out"]


def test_a_partial_taken_by_anothers_clean_up_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a folder and locking it, another run may take it for a leftover."""
    lock, taken = leftovers._lock, []

    def late(descriptor: int, **options: bool) -> bool:
        if not taken:
            taken.extend(tmp_path.glob(".out.partial-*"))
            taken[0].rmdir()
        return lock(descriptor, **options)

    monkeypatch.setattr(leftovers, "_lock", late)
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        assert folder != taken[0]
        (folder / "config.json").write_text("{}")
    assert names(tmp_path) == ["out"]


_OVERWRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from fastvlm_mlx.convert.place import new_folder

for number in itertools.count():
    with new_folder(Path(sys.argv[1]), overwrite=True) as folder:
        for name in ("config.json", "model.safetensors", "vocab.json"):
            (folder / name).write_text(str(number))
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path: Path) -> None:
    """Between making, renaming twice and removing: the next run finds the old or the new one."""
    dst = model_folder(tmp_path / "out", "old")
    (dst / "model.safetensors").write_text("old")
    (dst / "vocab.json").write_text("old")
    chance = random.Random(3)
    left: set[str] = set()
    for _ in range(12):
        command = [sys.executable, "-c", _OVERWRITE_FOR_EVER, str(dst)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.random() / 100)
            process.kill()
        left |= {name.split("-")[0] for name in names(tmp_path)}
        check_destination(dst, overwrite=True, source=None)
        assert names(dst) == ["config.json", "model.safetensors", "vocab.json"]
        assert len({file.read_text() for file in dst.iterdir()}) == 1
    assert ".out.partial" in left  # some were killed in the midst of it
    with new_folder(dst, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
