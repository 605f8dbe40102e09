"""A runtime's process is asked line by line, and is gone afterwards however it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import scripted

import fastvlm_mlx
from fastvlm_mlx.bench import peer_process
from fastvlm_mlx.bench.peer_process import PeerProcess
from fastvlm_mlx.errors import FastVLMError

LOAD: dict[str, Any] = {"model": "m", "dtype": "float32", "device": "cpu"}


def start(folder: Path, *, python: Path | None = None, **script: Any) -> PeerProcess:
    contender = scripted(folder, "peer", **script)
    return PeerProcess(contender.name, contender.file, python=python)


def gone(process: PeerProcess) -> bool:
    """Whether the child was waited for, so that it is no zombie either."""
    with pytest.raises(ChildProcessError):
        os.waitpid(process.process.pid, os.WNOHANG)
    return process.process.poll() is not None


def test_it_says_when_it_started_on_the_clock_of_its_parent(tmp_path: Path) -> None:
    with start(tmp_path) as peer:
        assert peer.ask("load", **LOAD)["started_s"] > peer.spawned_s
    assert gone(peer)
    assert peer.process.returncode == 0


def test_an_exception_is_one_line_and_the_next_request_is_answered(tmp_path: Path) -> None:
    with start(tmp_path, at="load", do="raise KeyError('first')") as peer:
        with pytest.raises(FastVLMError, match=r"^peer cannot load: KeyError: 'first'$"):
            peer.ask("load", **LOAD)
        assert peer.ask("about")["name"] == "peer 1"


def test_what_a_runtime_prints_is_no_reply(tmp_path: Path) -> None:
    with start(tmp_path, at="load", do="print('hello'); os.write(1, b'{}\\n')") as peer:
        assert peer.ask("load", **LOAD)["load_ms"] == 5.0


def test_one_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    do = "sys.stderr.write('first\\nout of\\x07 luck\\n\\n'); sys.stderr.flush(); os._exit(3)"
    with start(tmp_path, at="load", do=do) as peer:
        with pytest.raises(
            FastVLMError,
            match=r"^peer ended with exit code 3 when it was to load: out of\? luck$",
        ):
            peer.ask("load", **LOAD)
        with pytest.raises(
            FastVLMError, match=r"^peer ended with exit code 3 when it was to about"
        ):
            peer.ask("about")
    assert gone(peer)


def test_one_that_is_killed_is_reported_with_the_signal(tmp_path: Path) -> None:
    do = "os.kill(os.getpid(), signal.SIGKILL)"
    with (
        start(tmp_path, at="load", do=do) as peer,
        pytest.raises(FastVLMError, match=r"^peer was ended by SIGKILL when it was to load$"),
    ):
        peer.ask("load", **LOAD)
    assert gone(peer)


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with (
        start(tmp_path, at="load", do="time.sleep(600)") as peer,
        pytest.raises(FastVLMError, match=r"^peer did not load within 0\.5 s$"),
    ):
        peer.ask("load", patience_s=0.5, **LOAD)
    assert gone(peer)


def test_one_whose_parent_fails_is_ended_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start(tmp_path) as peer:
        raise KeyboardInterrupt
    assert gone(peer)
    peer.close()  # twice does no harm


def test_one_whose_parent_is_gone_ends_by_itself(tmp_path: Path) -> None:
    with start(tmp_path) as peer:
        peer.ask("about")
        assert peer.process.stdin is not None
        peer.process.stdin.close()
        assert peer.process.wait(30) == 0


def test_a_python_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "python"
    with pytest.raises(FastVLMError, match=r"^cannot run .*python: No such file or directory$"):
        start(tmp_path, python=missing)


def test_another_python_is_not_led_to_our_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PYTHONPATH of ours once would have put our MLX before the peer's own."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    do = "raise LookupError(repr([os.environ.get('PYTHONPATH'), sys.path[0] == '']))"
    with (
        start(tmp_path, python=Path(sys.executable), at="load", do=do) as peer,
        pytest.raises(FastVLMError, match=r"LookupError: \[None, False\]$"),
    ):
        peer.ask("load", **LOAD)


def test_the_childs_side_needs_the_standard_library_alone(tmp_path: Path) -> None:
    file = scripted(tmp_path, "peer").file
    package = str(Path(fastvlm_mlx.__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-S", "-P", "-c", peer_process._BOOT, package, str(file)],
        input='{"do": "about"}\n',
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith('{"done": {"name": "peer 1"')
