"""Names to folders, tried against a local server that speaks the hub's protocol.

huggingface_hub reads its environment when imported, so each environment is a process of its own,
which takes a list of names and tells what became of each.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, Repo, repo

import fastvlm_mlx
from fastvlm_mlx.checkpoint.hub import needed_files, resolve
from fastvlm_mlx.errors import CheckpointError, FetchError

CLIENT = """
import json, os, sys, urllib.request
from fastvlm_mlx.checkpoint.hub import resolve
from fastvlm_mlx.errors import FastVLMError

assert "huggingface_hub" not in sys.modules, "imported before it is used"
for name in sys.argv[2:]:
    urllib.request.urlopen(sys.argv[1] + "/mark/" + name).read()
    said, progress = [], []
    outcome = {"said": said, "progress": progress}
    try:
        folder = resolve(name, say=said.append, progress=lambda *p: progress.append(p))
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        outcome |= {"folder": str(folder), "files": files}
    except FastVLMError as error:
        outcome["error"] = str(error)
    print(json.dumps(outcome), flush=True)
"""

OLD, NEW = "a" * 40, "b" * 40
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 3000 for i in (1, 2)}
SECOND = "model-00002-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {f"w{i}": file for i, file in enumerate(SHARDS)}}).encode()
LONG = os.urandom(1 << 20) * 12  # huggingface_hub hands on pieces of 10 MiB


def model(**more: bytes) -> dict[str, bytes]:
    """A repository's files; `_` in a keyword's name stands for a dot."""
    return {"config.json": b"{}", "tokenizer.json": b"{}"} | {
        name.replace("_", "."): raw for name, raw in more.items()
    }


def repositories() -> dict[str, Repo]:
    weights = {"model.safetensors": b"w" * 5000}
    extras = {
        "llava_qwen.py": b"import os", "README.md": b"#", "LICENSE": b"", "generation_config.json":
        b"{}", "chat_template.jinja": b"t", "merges.txt": b"", "pytorch_model.bin": b"b" * 9000,
        "training_args.bin": b"x", "onnx/model.safetensors": b"x", "optimizer.pt": b"x",
    }  # fmt: skip
    whole = model() | weights | extras
    return {
        "org/whole": Repo(
            {OLD: model() | {"model.safetensors": b"old"}, NEW: whole}, {"main": NEW, "v1/x": OLD}
        ),
        "org/bins": repo(
            model(llava_qwen_py=b"")
            | {f"pytorch_model-0000{i}-of-00002.bin": b"b" * 10 for i in (1, 2)}
            | {"pytorch_model.bin.index.json": b'{"weight_map": {}}', "training_args.bin": b"x"}
        ),
        "org/cut": repo(model() | {"model.safetensors": LONG}, cut={"model.safetensors": 11 << 20}),
        "org/half": repo(
            model() | SHARDS | {"model.safetensors.index.json": INDEX}, fail_once={SECOND}
        ),
        "org/private": repo(model() | weights, private=True),
        "org/gated": repo(model() | weights, refuse=(403, "GatedRepo")),
        "org/locked": repo(model() | weights, refuse_info=(401, "")),
        "org/forbidden": repo(model() | weights, refuse_info=(403, "")),
        "org/busy": repo(model() | weights, refuse_info=(429, "")),
        "org/down": repo(model() | weights, refuse_info=(503, "")),
        "org/giant": repo(model() | weights, claimed_sizes={"model.safetensors": 10**18}),
        "org/no-config": repo({"model.safetensors": b"w"}),
        "org/no-weights": repo(model() | {"README.md": b"#"}),
    }


def run(
    server: HubServer, home: Path, names: list[str], **environment: str
) -> dict[str, dict[str, Any]]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "proxy" not in key.lower()
    }
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": server.endpoint, "NO_PROXY": "*"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, server.endpoint, *names],
        env=clean, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr and "B/s" not in done.stderr  # no bars of its own
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(names)
    for outcome in outcomes:
        assert "\n" not in outcome.get("error", "")
    return dict(zip(names, outcomes, strict=True))


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    hub = HubServer(repositories())
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


ONLINE = [
    "org/whole", "org/whole@main", "org/whole@v1/x", f"org/whole@{OLD}", "org/whole@nope",
    "org/bins", "org/cut", "org/half", "org/half@main", "org/private", "org/gated", "org/locked",
    "org/forbidden", "org/busy", "org/down", "org/giant", "org/no-config", "org/no-weights",
    "org/nothing", "org/bad--name", f"org/bad--name@{OLD}",
]  # fmt: skip


@pytest.fixture(scope="module")
def online(server: HubServer, home: Path) -> dict[str, dict[str, Any]]:
    return run(server, home, ONLINE, HF_TOKEN=TOKEN)


def fetched(server: HubServer, name: str) -> set[str]:
    asked = (r for r in server.since(name) if not r.path.startswith("/api/"))
    return {request.path.rsplit("/", 1)[1] for request in asked}


def test_only_the_files_a_model_needs_are_fetched_and_never_code(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    names = {
        "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja",
        "merges.txt", "model.safetensors", "LICENSE", "README.md",
    }  # fmt: skip
    assert set(online["org/whole"]["files"]) == names == fetched(server, "org/whole")
    assert not any(".py" in request.path for request in server.requests)


def test_bin_weights_are_fetched_only_where_there_are_no_safetensors(
    online: dict[str, dict[str, Any]],
) -> None:
    assert "pytorch_model.bin" not in online["org/whole"]["files"]
    assert set(online["org/bins"]["files"]) == {
        "config.json", "tokenizer.json", "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
    }  # fmt: skip


def test_the_size_is_said_before_anything_is_fetched_and_progress_ends_at_it(
    online: dict[str, dict[str, Any]],
) -> None:
    outcome = online["org/whole"]
    assert outcome["said"] == ["Downloading org/whole (5.01 kB)"]
    counts = [done for done, _, _ in outcome["progress"]]
    assert counts == sorted(counts) and counts[-1] == sum(outcome["files"].values()) == 5008
    assert {total for _, total, _ in outcome["progress"]} == {5008}
    assert outcome["progress"][-1][2] == "model.safetensors"


def test_what_is_in_the_cache_is_not_fetched_again(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    again = online["org/whole@main"]
    assert again["folder"] == online["org/whole"]["folder"] and again["said"] == []
    asked = [(r.method, r.path) for r in server.since("org/whole@main")]
    assert asked == [("GET", "/api/models/org/whole/revision/main")]


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    tagged = online["org/whole@v1/x"]
    assert Path(tagged["folder"]).name == OLD and tagged["files"]["model.safetensors"] == 3
    assert online[f"org/whole@{OLD}"]["folder"] == tagged["folder"]
    assert server.since(f"org/whole@{OLD}") == []  # a commit cannot have changed
    assert online["org/whole@nope"]["error"].startswith("org/whole has no revision 'nope'")


def test_a_cut_connection_is_resumed_where_it_broke(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    folder = Path(online["org/cut"]["folder"])
    assert (folder / "model.safetensors").read_bytes() == LONG
    asked = [request.range for request in server.since("org/cut") if "/cdn/" in request.path]
    assert asked == [None, f"bytes={10 << 20}-"]


def test_a_download_that_failed_goes_on_with_the_files_that_are_missing(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    assert "answered 500" in online["org/half"]["error"]
    assert online["org/half@main"]["said"] == ["Downloading the rest of org/half (3 kB)"]
    assert fetched(server, "org/half@main") == {"config.json", SECOND}
    assert set(SHARDS) <= set(online["org/half@main"]["files"])


def test_the_token_goes_to_the_hub_and_to_no_other_host(
    server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    assert "model.safetensors" in online["org/private"]["files"]
    asked = server.since("org/private")
    assert {bool(r.authorization) for r in asked if "/cdn/" not in r.path} == {True}
    assert {r.host.split(":")[0] for r in asked if "/cdn/" in r.path} == {"localhost"}
    assert not any(r.authorization for r in asked if "/cdn/" in r.path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/nothing", "no folder org/nothing and no such model on http://127.0.0.1"),
        ("org/gated", "is gated: accept its terms at http://127.0.0.1"),
        ("org/locked", "wants a valid token"),
        ("org/forbidden", "refuses org/forbidden (403)"),
        ("org/busy", "too many requests"),
        ("org/down", "answered 503"),
        ("org/giant", "needs 1000000000 GB, but"),
        ("org/no-config", "org/no-config holds no config.json"),
        ("org/no-weights", "org/no-weights holds no weights"),
        ("org/bad--name", "'org/bad--name' is no hub name"),
        (f"org/bad--name@{OLD}", "'org/bad--name' is no hub name"),
    ],
)
def test_each_refusal_is_one_line_that_says_what_to_do(
    name: str, words: str, server: HubServer, online: dict[str, dict[str, Any]]
) -> None:
    assert words in online[name]["error"]
    assert not any("/cdn/" in request.path for request in server.since(name))


def test_offline_the_cache_is_used_and_nothing_is_asked(
    server: HubServer, home: Path, online: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (Path(online["org/bins"]["folder"]) / "pytorch_model-00001-of-00002.bin").unlink()
    (Path(online["org/bins"]["folder"]) / "pytorch_model-00002-of-00002.bin").unlink()
    half = Path(online["org/half@main"]["folder"])
    (half / SECOND).unlink()
    names = ["org/whole", "org/whole@v1/x", "org/bins", "org/half", "org/nothing"]
    start = len(server.requests)
    offline = run(server, home, names, HF_HUB_OFFLINE="1")
    assert all(request.path.startswith("/mark/") for request in server.requests[start:])
    for name in names[:2]:
        assert offline[name]["folder"] == online[name]["folder"] and offline[name]["said"] == []
    for name in names[2:]:
        assert (
            f"HF_HUB_OFFLINE is set and {name} is not whole in the cache" in offline[name]["error"]
        )


def test_with_the_network_off_the_cache_is_used_and_said(
    server: HubServer, home: Path, online: dict[str, dict[str, Any]]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    off = run(server, home, ["org/whole", "org/nothing"], HF_ENDPOINT=dead)
    assert off["org/whole"]["folder"] == online["org/whole"]["folder"]
    assert off["org/whole"]["said"] == [
        f"{dead} cannot be reached: using the copy of org/whole in the cache"
    ]
    error = off["org/nothing"]["error"]
    assert error.startswith(f"the network is off or {dead} cannot be reached")
    assert "HF_HUB_OFFLINE=1" in error and "give a local folder or demo" in error


# ---- names that need no network


def test_a_folder_is_itself_and_demo_is_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path) == tmp_path
    assert resolve("./demo") == Path("demo")
    assert resolve("demo") == Path(fastvlm_mlx.__file__).parent / "demo"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["./x", "../x", "/no/such", "~/nowhere", "a/b/c", "x/", "./a/b", "~nobody/x"]
)
def test_what_looks_like_a_folder_is_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where there is no x beside
    with pytest.raises(CheckpointError, match=f"^folder {re.escape(name)} does not exist$"):
        resolve(name)


@pytest.mark.parametrize(
    "name", ["", "llama", "https://huggingface.co/a/b", "org/name@", "a b/c?", "x\0", "x" * 999]
)
def test_a_name_of_no_known_kind_says_which_there_are(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no model: give a folder, demo, or a hub name"):
        resolve(name)


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file: give the folder it is in"):
        resolve(tmp_path / "model.safetensors")


def test_weights_come_last_and_their_index_just_before_them() -> None:
    """So that a folder cut short never looks whole."""
    files = ["a.safetensors", "z.safetensors.index.json", "vocab.json", "config.json", "x/y.json"]
    assert needed_files(files) == [
        "config.json", "vocab.json", "z.safetensors.index.json", "a.safetensors",
    ]  # fmt: skip


def test_a_models_licence_comes_with_it_but_no_code_by_that_name() -> None:
    """Apple's licence must be handed on with the weights, also with converted ones."""
    files = ["LICENSE", "LICENSE_MODEL", "license.txt", "NOTICE.md", "README.md"]
    others = ["LICENSE.py", "license.bin", "docs/LICENSE", "README", "A_LICENSE"]
    weights = ["config.json", "model.safetensors"]
    assert set(needed_files([*files, *others, *weights])) == {*files, *weights}


def test_a_full_disk_is_one_line() -> None:
    from fastvlm_mlx.checkpoint.hub_errors import fetch_error

    line = fetch_error(OSError(errno.ENOSPC, "No space left on device"), "org/x", None)
    assert isinstance(line, FetchError) and "is full: make room, or set HF_HOME" in str(line)
