"""A small Hugging Face hub for tests: its protocol, on a local port, in a thread.

Written from what huggingface_hub sends and expects (hf_api.py `model_info`, file_download.py):
model info with sizes; HEAD and GET of `/{repo}/resolve/{commit}/{file}` with ETag and
X-Repo-Commit; big files redirected to a CDN on another host, with Range; X-Error-Code on refusals.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"


@dataclass
class Repo:
    """One repository: branches and tags to commits, commits to files.

    `refuse` is (status, X-Error-Code) for its files; `refuse_info` for its model info.
    `cut` is a file whose first download breaks off after that many bytes; `fail_once` one whose
    first download is refused.
    """

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    refuse_info: tuple[int, str] | None = None
    cut: dict[str, int] = field(default_factory=dict)
    fail_once: set[str] = field(default_factory=set)
    private: bool = False


def repo(files: dict[str, bytes], **options: object) -> Repo:
    """A repository of one commit on main."""
    commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
    return Repo({commit: files}, {"main": commit}, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


class HubServer:
    """Serves `repos` until closed; `requests` lists what was asked, in order."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[Request] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def since(self, mark: str) -> list[Request]:
        """What was asked between `/mark/{mark}` and the next mark."""
        paths = [request.path for request in self.requests]
        start = paths.index(f"/mark/{mark}") + 1
        rest = self.requests[start:]
        marks = [i for i, request in enumerate(rest) if request.path.startswith("/mark/")]
        return rest[: marks[0]] if marks else rest


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.server_hub.requests.append(
            Request(self.command, path, headers["Host"], headers["Authorization"], headers["Range"])
        )
        if path.startswith("/mark/"):
            return self.answer(200)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", path):
            return self.resolve(match[1], match[2], match[3])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/([^/]+)", path):
            return self.cdn(self.server_hub.repos[match[1]], match[2], match[3])
        return self.answer(404)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def known(self, name: str) -> Repo | None:
        found = self.server_hub.repos.get(name)
        if found is None or (found.private and self.headers["Authorization"] != f"Bearer {TOKEN}"):
            # As the real hub does: 401 for what does not exist or may not be seen.
            self.refuse(401, "RepoNotFound")
            return None
        return found

    def info(self, name: str, revision: str) -> None:
        if (found := self.known(name)) is None:
            return None
        if found.refuse_info is not None:
            return self.refuse(*found.refuse_info)
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            return self.refuse(404, "RevisionNotFound")
        siblings = [
            {"rfilename": file, "size": found.claimed_sizes.get(file, len(raw)), "blobId": "b"}
            for file, raw in found.commits[commit].items()
        ]
        body = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": []}
        return self.answer(200, json.dumps(body | {"siblings": siblings}).encode())

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.known(name)) is None:
            return None
        if found.refuse is not None:
            return self.refuse(*found.refuse)
        commit = found.refs.get(revision, revision)
        raw = found.commits.get(commit, {}).get(file)
        if raw is None:
            return self.refuse(404, "EntryNotFound")
        digest = hashlib.sha256(raw).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if file.endswith((".safetensors", ".bin")):
            location = f"http://localhost:{self.server_hub.port}/cdn/{name}/{commit}/{file}"
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(raw))}
            return self.answer(302, b"", headers | linked | {"Location": location})
        return self.answer(200, raw, headers | {"Content-Length": str(len(raw))})

    def cdn(self, found: Repo, commit: str, file: str) -> None:
        raw = found.commits[commit][file]
        if file in found.fail_once:
            found.fail_once.remove(file)
            return self.answer(500)
        if (asked := self.headers["Range"]) is not None:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            whole = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
            return self.answer(206, raw[start:], {"Content-Range": whole})
        if file in found.cut:
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw[: found.cut.pop(file)])
            self.close_connection = True
            return None
        return self.answer(200, raw)
