"""A name becomes a local folder: a folder, "demo", or `org/name[@revision]` on the hub.

Knows which files of a hub repository a FastVLM needs, and nothing of what is in them. With `fetch`
it is the only network code; the protocol, the cache, tokens and resuming a cut connection are
huggingface_hub's, which is imported only when a hub name is asked for; HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean here what they mean there. No `.py` file is ever
fetched.

Other kinds of name (Apple's zips, a zoo of short names) would be added to `_NAMED` and `resolve`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from fastvlm_mlx.checkpoint.hub_errors import fetch_error, is_unreachable
from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.errors import CheckpointError, FetchError

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
# What can only be meant as a folder: ./x, /x, ~/x, x/, a/b/c (but not a URL or a@b/c).
_FOLDER_NAME = re.compile(r"[./~]|[^@:]*/$|[^/@:]+/[^/@:]+/")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"
_SMALL_FILES = (
    _CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "chat_template.jinja", "README.md",
)  # fmt: skip
# They travel with the weights: what is made of a model must hold its licence too.
_LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_NO_TEXT = (".py", ".bin", ".safetensors")
# One kind of weights is fetched, the first found: the same numbers twice would double the wait.
_WEIGHT_KINDS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)
_ASK_TIMEOUT_S = 10.0


def _demo() -> Path:
    folder = Path(__file__).parent.parent / "demo"
    if not folder.is_dir():
        raise CheckpointError("the demo model is missing from this installation: reinstall it")
    return folder


_NAMED: dict[str, Callable[[], Path]] = {"demo": _demo}


def resolve(
    name: str | os.PathLike[str], *, say: Say | None = None, progress: Progress | None = None
) -> Path:
    """The local folder of a checkpoint, fetched first if `name` is a hub name not in the cache.

    `demo` is always the demo model (a folder of that name is `./demo`); next an existing folder
    is itself; then `org/name`, `org/name@revision` (branch, tag or commit) is asked of the hub.
    `say` gets lines worth showing, the size before a download above all; `progress` gets
    (bytes so far, bytes in all, file), now and then, perhaps from another thread.

    Raises CheckpointError for a folder that does not exist or a name of no known kind, FetchError
    when the hub has no such model or revision, wants a token, or cannot be reached.
    """
    place = _place(os.fspath(name))
    if isinstance(place, Path):
        return place
    return _from_hub(*place, say or (lambda _: None), progress or (lambda *_: None))


def model_folder(
    name: str | os.PathLike[str], *, say: Say | None = None, progress: Progress | None = None
) -> Path:
    """`resolve`, its progress called "Downloading FILE" for a caller with other work to show."""

    def downloading(done: int, total: int, file: str) -> None:
        if progress is not None:
            progress(done, total, f"Downloading {file}")

    return resolve(name, say=say, progress=downloading)


def resolve_config(name: str | os.PathLike[str]) -> Path:
    """A folder that holds the config.json of a checkpoint, and perhaps nothing else of it.

    Of a hub name the cached copy is taken, or that one file is fetched. Raises as `resolve` does.
    """
    place = _place(os.fspath(name))
    if isinstance(place, Path):
        return place
    repo, revision = place
    cached = _cached_file(repo, _CONFIG, revision)
    if cached is not None:
        return cached.parent
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        bar = _bar(lambda _: None)
        return Path(hf_hub_download(repo, _CONFIG, revision=revision, tqdm_class=bar)).parent
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise fetch_error(error, repo, revision) from error


def _place(text: str) -> Path | tuple[str, str | None]:
    """A local folder, or a hub repository and its revision; CheckpointError for neither."""
    if text in _NAMED:
        return _NAMED[text]()
    # os.path's functions, as they raise for no name whatever; the empty name is no folder.
    path = os.path.expanduser(text)  # noqa: PTH111
    if os.path.isdir(path):  # noqa: PTH112
        return Path(path)
    if os.path.exists(path):  # noqa: PTH110
        raise CheckpointError(f"{text} is a file: give the folder it is in")
    if _FOLDER_NAME.match(text):
        raise CheckpointError(f"folder {text} does not exist")
    match = _HUB_NAME.fullmatch(text)
    if match is None:
        raise CheckpointError(
            f"'{text}' is no model: give a folder, demo, or a hub name like apple/FastVLM-0.5B"
        )
    return match["repo"], match["revision"]


def is_license_file(name: str) -> bool:
    """Whether a file at the top of a model's folder is its licence or a notice, by its name."""
    named = any(fnmatchcase(name.upper(), pattern) for pattern in _LICENSE_FILES)
    return named and not name.lower().endswith(_NO_TEXT)


def needed_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that a checkpoint needs, small ones first, weights last.

    Only files at its top; never code. Raises FetchError if it holds no config or no weights.
    """
    present = sorted(name for name in names if "/" not in name and "\\" not in name)
    small = [name for name in present if name in _SMALL_FILES or is_license_file(name)]
    if _CONFIG not in small:
        raise FetchError("holds no config.json, so it is no model this program can read")
    for weights, index in _WEIGHT_KINDS:
        found = [name for name in present if fnmatchcase(name, weights)]
        if found:
            # The index before the shards, so that a folder cut short shows that it is.
            return [*small, *(n for n in present if fnmatchcase(n, index)), *found]
    raise FetchError("holds no weights (no *.safetensors, no pytorch_model*.bin)")


def _from_hub(repo: str, revision: str | None, say: Say, progress: Progress) -> Path:
    from huggingface_hub import HfApi, constants

    # Not httpx's by name: its HTTP client is httpx or httpx2 by version.
    from huggingface_hub.errors import HTTPError

    try:
        if _COMMIT.fullmatch(revision or "") and (cached := _cached(repo, revision)):
            return cached  # a commit never changes: nothing to ask
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=_ASK_TIMEOUT_S
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        if not _COMMIT.fullmatch(info.sha or ""):
            raise KeyError("sha")
    except (OSError, HTTPError, ValueError, KeyError, TypeError) as error:
        cached = _cached(repo, revision) if is_unreachable(error) else None
        if cached is None:
            raise fetch_error(error, repo, revision) from error
        if not constants.HF_HUB_OFFLINE:
            say(f"{constants.ENDPOINT} cannot be reached: using the copy of {repo} in the cache")
        return cached
    try:
        wanted = {file: sizes[file] for file in needed_files(sizes)}
    except FetchError as error:
        raise FetchError(f"{repo} {error}") from None
    try:
        return _download(repo, revision, info.sha, wanted, say, progress)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise fetch_error(error, repo, revision) from error


def _download(
    repo: str,
    revision: str | None,
    commit: str,
    sizes: dict[str, int],
    say: Say,
    progress: Progress,
) -> Path:
    """Fetch what the cache lacks of one commit, one file after the other, in this thread, so that
    Ctrl-C ends it at once. (Big files are fetched in parallel chunks by huggingface_hub itself.)"""
    from huggingface_hub import hf_hub_download

    missing = [file for file in sizes if _cached_file(repo, file, commit) is None]
    total, done = sum(sizes[file] for file in missing), 0
    if missing:
        _check_disk(repo, total)
        rest = "" if len(missing) == len(sizes) else "the rest of "
        say(f"Downloading {rest}{repo} ({readable_bytes(total)})")
    for file in missing:
        before = done

        def report(nbytes: int, file: str = file, before: int = before) -> None:
            progress(before + min(nbytes, sizes[file]), total, file)

        hf_hub_download(repo, file, revision=commit, tqdm_class=_bar(report))
        done = before + sizes[file]
        progress(done, total, file)
    config = _cached_file(repo, _CONFIG, commit)
    if config is None:
        raise FetchError(f"{repo}: the download left no config.json in the cache; try again")
    # Only now does the branch's name point at this commit in the cache: offline, a name finds
    # the last snapshot that is whole, never one cut short.
    if _cached_file(repo, _CONFIG, revision) != config:
        hf_hub_download(repo, _CONFIG, revision=revision, tqdm_class=_bar(lambda _: None))
    return config.parent


def _bar(report: Callable[[int], None]) -> type:
    """A class that huggingface_hub takes for tqdm: it prints nothing and reports one file's bytes.

    A file may get two bars (bytes received, bytes written); the furthest counts.
    """
    counts: dict[int, int] = {}

    class Bar:
        def __init__(self, *_: object, initial: int = 0, total: int | None = None, **__: object):
            self.total = total
            self.n = initial

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            counts[id(self)] = self.n
            report(max(counts.values()))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def refresh(self, *_: object, **__: object) -> None: ...

        def set_postfix_str(self, *_: object, **__: object) -> None: ...

    return Bar


def _cached_file(repo: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _cached(repo: str, revision: str | None) -> Path | None:
    """The cached snapshot of a revision, if every file it needs is there."""
    config = _cached_file(repo, _CONFIG, revision)
    if config is None:
        return None
    present = [file.name for file in config.parent.iterdir() if file.exists()]
    try:
        files = needed_files(present)
        for index in (file for file in files if file.endswith(".index.json")):
            listed = json.loads((config.parent / index).read_text())["weight_map"].values()
            if not set(listed) <= set(present):
                return None
    except (FetchError, OSError, ValueError, KeyError, TypeError, AttributeError):
        # Cut short before its weights, or an index that is broken.
        return None
    return config.parent


def _check_disk(repo: str, nbytes: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise FetchError(
            f"{repo} needs {readable_bytes(nbytes)}, but {cache} has {readable_bytes(free)} "
            "free: make room, or set HF_HOME to a folder on a larger disk"
        )
