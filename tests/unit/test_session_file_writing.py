"""A session file is replaced whole or not at all, and nothing else is ever replaced."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from disks import make_read_only, mounted_tmpfs
from saved_sessions import same_kv, session

from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate import session_file
from fastvlm_mlx.generate.session_file import SavedSession, read_session, write_session
from fastvlm_mlx.prompt.template import Message

TESTS = Path(__file__).parent
OLD = SavedSession((Message("system", ("the old one",)),), (), "old")

# Writes one of two sessions of some 30 MB again and again, so that a kill comes in the middle.
_WRITER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from saved_sessions import kv, session
from fastvlm_mlx.generate.session_file import SavedSession, write_session
a = session()
big = SavedSession(a.messages, a.images, "big", kv(tuple(range(15_000)), layers=2))
print("ready", flush=True)
while True:
    write_session(sys.argv[1], a)
    write_session(sys.argv[1], big)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def refusal(path: Path | str) -> str:
    with pytest.raises(SessionError) as raised:
        write_session(path, session())
    assert str(raised.value).isprintable() and str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_its_owner_may_read_a_conversation(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_session(path, OLD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    write_session(path, OLD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_file_and_an_old_session_are_replaced(path: Path) -> None:
    path.touch()
    write_session(path, OLD)
    write_session(path, session())
    assert read_session(path).messages == session().messages
    assert names(path.parent) == ["chat.session"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_an_exception_midway_leaves_the_old_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write_session(path, OLD)
    before = path.read_bytes()
    real, calls = session_file.stored_bits, 0

    def fails(array: mx.array) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert len(names(path.parent)) == 2  # the half-made file beside it
            raise error("why")
        return real(array)

    monkeypatch.setattr(session_file, "stored_bits", fails)
    with pytest.raises(error, match="why"):
        write_session(path, session())
    assert path.read_bytes() == before and names(path.parent) == ["chat.session"]


@pytest.mark.slow
def test_kill_9_leaves_one_whole_session_or_the_other(path: Path) -> None:
    code = _WRITER.format(tests=str(TESTS), root=str(TESTS.parents[1]))
    small, found = session(), set()
    write_session(path, small)
    for attempt in range(4):
        command = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.2 + random.Random(attempt).random() / 3)
            process.send_signal(signal.SIGKILL)
        got = read_session(path)
        assert got.damage == () and got.messages == small.messages and got.kv is not None
        assert got.model == "big" or same_kv(got.kv, small.kv)
        found.add(got.model)
    left = [name for name in names(path.parent) if name != "chat.session"]
    assert all(name.startswith(".fastvlm-session-") for name in left)
    assert found <= {"big", small.model}


def test_what_killed_saves_left_is_removed_once_it_is_old(path: Path) -> None:
    stale = path.with_name(".fastvlm-session-0123456789ab.partial")
    fresh = path.with_name(".fastvlm-session-ba9876543210.partial")
    other = path.with_name(".fastvlm-session-notes.txt")
    for file in (stale, fresh, other):
        file.write_bytes(b"half")
    for file in (stale, other):
        os.utime(file, (time.time() - 7200,) * 2)
    write_session(path, OLD)
    assert names(path.parent) == sorted([fresh.name, other.name, path.name])


def test_a_full_disk_leaves_the_old_session(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=64 << 10) as disk:
        path = disk / "chat.session"
        write_session(path, OLD)
        (disk / "rest").write_bytes(b"\0" * (52 << 10))
        assert refusal(path) == f"{path} was not saved: no space left on the disk"
        assert names(disk) == ["chat.session", "rest"]
        assert read_session(path).messages == OLD.messages


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", nbytes=1 << 20) as disk:
        write_session(disk / "chat.session", OLD)
        make_read_only(disk)
        assert "read-only" in refusal(disk / "new.session")
        assert "was not saved" in refusal(disk / "chat.session")


def test_a_limit_on_file_sizes_is_named(path: Path) -> None:
    write_session(path, OLD)
    code = (
        f"import resource, sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parents[1])!r}]\n"
        "import fastvlm_mlx\n"
        "from saved_sessions import session\n"
        "from fastvlm_mlx.generate.session_file import write_session\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_session(sys.argv[1], session())\n"
        "except fastvlm_mlx.FastVLMError as error: print(error, end='')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "ulimit -f" in ran.stdout and "\n" not in ran.stdout
    assert names(path.parent) == ["chat.session"]
    assert read_session(path).messages == OLD.messages


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert "folder is missing" in refusal(tmp_path / "no" / "chat.session")
    assert "its folder is a file" in refusal(tmp_path / "file" / "chat.session")
    assert "is a folder" in refusal(tmp_path)
    assert "too long" in refusal(tmp_path / ("x" * 300))
    assert "null byte" in refusal_of_odd_name(f"{tmp_path}/a\0b")
    (tmp_path / "round").symlink_to("round")
    assert "was not saved" in refusal(tmp_path / "round")
    assert names(tmp_path) == ["file", "round"]


def refusal_of_odd_name(path: str) -> str:
    with pytest.raises(SessionError) as raised:
        write_session(path, session())
    assert str(raised.value).isprintable()
    return str(raised.value)


# As somebody else than root, who may do everything; in a folder of their own.
_UNPRIVILEGED = """
import os, sys, tempfile
sys.path[:0] = [{tests!r}, {root!r}]
import fastvlm_mlx
from pathlib import Path
from saved_sessions import session
from fastvlm_mlx.generate.session_file import read_session, write_session

def line(function, *arguments):
    try:
        function(*arguments)
    except fastvlm_mlx.FastVLMError as error:
        print(str(error).removeprefix(str(folder)))

given = session()  # now: what is imported lies where only root may read
if os.geteuid() == 0:
    os.setuid(65534)
with tempfile.TemporaryDirectory(dir="/tmp") as name:
    folder = Path(name)
    path = folder / "a"
    write_session(path, given)
    path.chmod(0o400)
    line(write_session, path, given)
    path.chmod(0o000)
    line(read_session, path)
    path.chmod(0o600)
    folder.chmod(0o500)
    line(write_session, folder / "b", given)
    line(write_session, path, given)
    assert read_session(path).damage == () and os.listdir(folder) == ["a"]
    folder.chmod(0o700)
"""


def test_no_permission_is_named() -> None:
    """A rename would replace a read-only file without asking."""
    code = _UNPRIVILEGED.format(tests=str(TESTS), root=str(TESTS.parents[1]))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    refused = "was not saved: no permission: change the rights, or choose another place"
    assert ran.stdout.splitlines() == [
        f"/a {refused}",
        "/a: no permission to read it",
        f"/b {refused}",
        f"/a {refused}",
    ]


def test_the_name_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    """A hidden name made of the file's own would be longer than it."""
    path = tmp_path / ("x" * 255)
    write_session(path, OLD)
    assert names(tmp_path) == [path.name]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "chat.session", tmp_path / "link"
    link.symlink_to(Path("real") / "chat.session")
    for given in (OLD, session()):  # where there is nothing yet, and where there is
        write_session(link, given)
        assert link.is_symlink() and not target.is_symlink()
        assert read_session(link).messages == read_session(target).messages == given.messages
    assert names(tmp_path / "real") == ["chat.session"]


def test_a_link_to_a_photo_is_no_way_to_lose_it(tmp_path: Path) -> None:
    photo, link = tmp_path / "photo.jpg", tmp_path / "link"
    photo.write_bytes(b"\xff\xd8\xff\xe0 a photo")
    link.symlink_to(photo)
    assert "left as it is" in refusal(link)
    assert photo.read_bytes().endswith(b"a photo")


def test_home_is_written_as_people_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_session("~/chat.session", OLD)
    assert names(tmp_path) == ["chat.session"]
    assert read_session("~/chat.session").messages == OLD.messages


def test_a_relative_name_is_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_session("chat", OLD)
    assert names(tmp_path) == ["chat"] and read_session("chat").damage == ()
