from __future__ import annotations

import base64
import contextlib
import http.server
import io
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import FetchError, ImageError
from fastvlm_mlx.fetch import MAX_REDIRECTS, fetch
from fastvlm_mlx.prompt.image import open_image

BODY = bytes(range(256)) * 4


class Handler(http.server.BaseHTTPRequestHandler):
    """One path a behaviour. `seen` collects (path, headers) of every request."""

    seen: list[tuple[str, dict[str, str]]]
    stop: threading.Event
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        self.close_connection = True
        name = self.path.partition("?")[0].strip("/").partition("/")[0].replace("-", "_")
        with contextlib.suppress(ConnectionError):  # the client may leave, that is the point
            getattr(self, f"answer_{name}", self.answer_ok)()

    def head(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def answer_ok(self) -> None:
        self.head(Content_Length=str(len(BODY)))
        self.wfile.write(BODY)

    def answer_no_length(self) -> None:
        self.head()
        self.wfile.write(BODY)

    def answer_chunked(self) -> None:
        self.head(Transfer_Encoding="chunked")
        for part in (BODY[:100], BODY[100:], b""):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def answer_picture(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (3, 2), (9, 8, 7)).save(file, "PNG")
        self.head(Content_Length=str(len(file.getvalue())))
        self.wfile.write(file.getvalue())

    def answer_missing(self) -> None:
        self.send_error(404)

    def answer_broken(self) -> None:
        self.send_error(503)

    def answer_garbage(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def answer_hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer_promise(self) -> None:
        """Claims a giant body and sends none of it: only an early refusal ends in time."""
        self.head(Content_Length=str(10**12))
        self.stop.wait(20)

    def answer_cut(self) -> None:
        self.head(Content_Length="1000")
        self.wfile.write(b"x" * 10)

    def answer_endless(self) -> None:
        self.head()
        while not self.stop.is_set():
            self.wfile.write(b"x" * 65536)

    def answer_silent(self) -> None:
        self.stop.wait(20)

    def drip(self) -> None:
        while not self.stop.wait(0.05):
            self.wfile.write(b"x")

    def answer_slow_body(self) -> None:
        self.head()
        self.drip()

    def answer_slow_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip()

    def answer_moved(self) -> None:
        """/moved/N goes on to /moved/N-1, and /moved/0 to /ok."""
        left = int(self.path.rpartition("/")[2])
        self.head(302, Location=f"/moved/{left - 1}" if left else "/ok", Content_Length="0")

    def answer_circle(self) -> None:
        self.head(301, Location="/circle", Content_Length="0")

    def answer_nowhere(self) -> None:
        self.head(302, Content_Length="0")

    def answer_elsewhere(self) -> None:
        where = base64.urlsafe_b64decode(self.path.rpartition("/")[2]).decode()
        self.head(302, Location=where, Content_Length="0")

    def log_message(self, *args: object) -> None:
        """Keep test output quiet."""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running(context: ssl.SSLContext | None = None) -> Iterator[tuple[Server, type[Handler]]]:
    handler = type("Recording", (Handler,), {"seen": [], "stop": threading.Event()})
    server = Server(("127.0.0.1", 0), handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, handler
    finally:
        handler.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[tuple[Server, type[Handler]]]:
    with running() as pair:
        yield pair


def get(server: tuple[Server, type[Handler]], path: str, **options: float) -> bytes:
    caps = {"max_bytes": 10**6, "timeout_s": 20.0} | options
    return fetch(server[0].url + path, **caps)  # type: ignore[arg-type]


def error_of(server: tuple[Server, type[Handler]], path: str, **options: float) -> str:
    with pytest.raises(FetchError) as caught:
        get(server, path, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 300
    return text


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


@pytest.mark.parametrize("path", ["/ok", "/no-length", "/chunked", "/moved/2"])
def test_a_body_arrives_whole(server: tuple[Server, type[Handler]], path: str) -> None:
    assert get(server, path) == BODY


def test_a_request_says_who_asks_and_is_made_once(server: tuple[Server, type[Handler]]) -> None:
    get(server, "/ok?size=2&q=a%20b")
    [(path, headers)] = server[1].seen
    assert path == "/ok?size=2&q=a%20b"
    assert headers["User-Agent"].startswith("fastvlm-mlx")


def test_a_failed_request_is_not_repeated(server: tuple[Server, type[Handler]]) -> None:
    error_of(server, "/broken")
    assert len(server[1].seen) == 1


def test_letters_beyond_ascii_are_percent_encoded(server: tuple[Server, type[Handler]]) -> None:
    get(server, "/Äpfel und Öl.jpg")
    assert server[1].seen[0][0] == "/%C3%84pfel%20und%20%C3%96l.jpg"


def test_a_url_cannot_smuggle_a_header(server: tuple[Server, type[Handler]]) -> None:
    with contextlib.suppress(FetchError):
        get(server, "/ok HTTP/1.1\r\nX-Evil: 1\r\n\r\n")
    assert all("X-Evil" not in headers for _, headers in server[1].seen)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "the server answered 404 Not Found"),
        ("/broken", "the server answered 503 Service Unavailable"),
        ("/garbage", "broke off"),
        ("/hang-up", "broke off"),
        ("/cut", "broke off after 10 of 1000 bytes"),
        ("/circle", "redirected more than 5 times"),
        (f"/moved/{MAX_REDIRECTS}", "redirected more than 5 times"),
        ("/nowhere", "302 Found, redirecting to no http"),
    ],
)
def test_a_bad_answer_is_one_line(
    server: tuple[Server, type[Handler]], path: str, reason: str
) -> None:
    assert reason in error_of(server, path)


def test_redirects_up_to_the_limit_are_followed(server: tuple[Server, type[Handler]]) -> None:
    assert get(server, f"/moved/{MAX_REDIRECTS - 1}") == BODY


@pytest.mark.parametrize(
    "where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://127.0.0.1/"]
)
def test_a_redirect_never_leaves_http(server: tuple[Server, type[Handler]], where: str) -> None:
    path = "/elsewhere/" + base64.urlsafe_b64encode(where.encode()).decode()
    assert "http or https URL" in error_of(server, path)


def test_a_body_may_be_as_large_as_the_limit(server: tuple[Server, type[Handler]]) -> None:
    assert get(server, "/ok", max_bytes=len(BODY)) == BODY
    assert get(server, "/no-length", max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize("path", ["/ok", "/no-length", "/chunked"])
def test_a_body_over_the_limit_is_refused(server: tuple[Server, type[Handler]], path: str) -> None:
    assert f"larger than {len(BODY) - 1} bytes" in error_of(server, path, max_bytes=len(BODY) - 1)


def test_a_length_over_the_limit_is_refused_before_the_body(
    server: tuple[Server, type[Handler]],
) -> None:
    assert "larger than 1000000 bytes" in error_of(server, "/promise")


def test_an_endless_body_ends_at_the_limit(server: tuple[Server, type[Handler]]) -> None:
    assert "larger than" in error_of(server, "/endless")


@pytest.mark.parametrize("path", ["/silent", "/slow-body", "/slow-head"])
def test_a_slow_server_ends_at_the_time_limit_and_leaves_no_thread(
    server: tuple[Server, type[Handler]], path: str
) -> None:
    """A socket's timeout is for each read: a byte now and then never meets it."""
    assert "took longer than 0.4 s" in error_of(server, path, timeout_s=0.4)
    for thread in fetch_threads():
        thread.join(10)
        assert not thread.is_alive()


def test_a_success_leaves_no_thread(server: tuple[Server, type[Handler]]) -> None:
    get(server, "/ok")
    for thread in fetch_threads():
        thread.join(10)
        assert not thread.is_alive()


def test_a_refused_connection_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        with pytest.raises(FetchError, match="refuses the connection"):
            fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/x", max_bytes=9, timeout_s=20)


def test_a_name_that_does_not_resolve_is_one_line() -> None:
    with pytest.raises(FetchError, match=r"cannot be resolved|took longer"):
        fetch("http://no-such-host.invalid/x.png", max_bytes=9, timeout_s=5)


def test_a_slow_name_lookup_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """getaddrinfo knows no timeout."""
    release = threading.Event()
    real = socket.getaddrinfo

    def slow(*args: object, **options: object) -> object:
        release.wait(20)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        with pytest.raises(FetchError, match=r"took longer than 0\.2 s"):
            fetch("http://127.0.0.1:9/x", max_bytes=9, timeout_s=0.2)
    finally:
        release.set()
        for thread in fetch_threads():
            thread.join(10)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "/etc/passwd",
        "http://",
        "http:///x",
        "",
        "http://[::1/x",
        "http://a.b:port/x",
        "http://" + "ü" * 300 + ".de/",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(url, max_bytes=9, timeout_s=5)
    assert str(caught.value).isprintable()


def test_secrets_of_a_url_stay_out_of_errors(server: tuple[Server, type[Handler]]) -> None:
    text = error_of(server, "/missing/a.png?token=s3cret#s3cret")
    assert "/missing/a.png" in text
    assert "s3cret" not in text
    with pytest.raises(FetchError) as caught:
        fetch("http://user:s3cret@127.0.0.1:1/a.png", max_bytes=9, timeout_s=5)
    assert "s3cret" not in str(caught.value)


def test_the_environments_proxy_is_used(
    server: tuple[Server, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server[0].url)
    assert fetch("http://no-such-host.invalid/ok", max_bytes=10**6, timeout_s=20) == BODY
    assert server[1].seen[0][0] == "http://no-such-host.invalid/ok"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split(),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running(context) as (server, _):
        url = server.url.replace("http:", "https:") + "/ok"
        with pytest.raises(FetchError, match="certificate cannot be verified"):
            fetch(url, max_bytes=10**6, timeout_s=20)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(url, max_bytes=10**6, timeout_s=20) == BODY
        slow = server.url.replace("http:", "https:") + "/slow-body"
        with pytest.raises(FetchError, match="took longer"):
            fetch(slow, max_bytes=10**6, timeout_s=0.5)


def test_open_image_reads_a_url(server: tuple[Server, type[Handler]]) -> None:
    for url in (server[0].url, server[0].url.replace("http", "HTTP")):
        assert np.asarray(open_image(f"{url}/picture")).tolist() == [[[9, 8, 7]] * 3] * 2
    with pytest.raises(ImageError, match="/ok is not a picture"):
        open_image(f"{server[0].url}/ok")
    with pytest.raises(FetchError, match="404"):
        open_image(f"{server[0].url}/missing")
