"""One GET of bounded size within a bounded time. With checkpoint/hub.py the only network code.

Knows http and https, through the proxies of the environment. Refuses every other scheme, also
when redirected to one, and knows nothing of what the bytes are.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import queue
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from fastvlm_mlx.errors import FetchError

MAX_REDIRECTS = 5
_CHUNK = 2**16


def fetch(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body of one GET of an http or https URL.

    `timeout_s` covers everything: name, connection, redirects, headers, body. The proxy variables
    of the environment and SSL_CERT_FILE are honoured.

    Raises FetchError if the URL is not http(s), the server cannot be reached, answers with an
    error, redirects too often, sends more than `max_bytes`, stops early or takes too long.
    """
    request = _Request(_checked(url), max_bytes, timeout_s)
    # A socket's timeout is for each read: a server that sends a byte a second never meets it, and
    # looking up a name has none. So the work is in a thread that can be left.
    threading.Thread(target=request.run, name="fetch", daemon=True).start()
    try:
        outcome = request.outcome.get(timeout=timeout_s)
    except queue.Empty:
        raise FetchError(f"{_name(url)} took longer than {timeout_s:g} s") from None
    finally:
        request.abandon()
    if isinstance(outcome, FetchError):
        raise outcome
    if isinstance(outcome, Exception):
        raise FetchError(f"{_name(url)}: {_reason(outcome)}") from outcome
    return outcome


class _Request:
    """One GET in its own thread; `outcome` gets the body or the exception."""

    def __init__(self, url: str, max_bytes: int, timeout_s: float) -> None:
        self.outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._url = url
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._abandoned = False
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            self.outcome.put(self._get())
        except Exception as error:  # raised again by the caller's thread
            self.outcome.put(error)

    def abandon(self) -> None:
        """Stop the thread at its next read, also one that waits. Harmless when it has finished."""
        self._abandoned = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def connected(self, sock: socket.socket) -> None:
        self._socket = sock
        if self._abandoned:
            raise TimeoutError

    def _get(self) -> bytes:
        request = urllib.request.Request(self._url, headers={"User-Agent": "fastvlm-mlx"})
        name = _name(self._url)
        # The socket's own timeout is the later one: it only ends a thread that was left.
        with _opener(self).open(request, timeout=2 * self._timeout_s) as response:
            expected = response.headers.get("Content-Length", "")
            length = int(expected) if expected.isdecimal() else None
            if length is not None and length > self._max_bytes:
                raise self._too_large(name)
            body = bytearray()
            while chunk := response.read1(_CHUNK):
                body += chunk
                if len(body) > self._max_bytes:
                    raise self._too_large(name)
                if self._abandoned:
                    raise TimeoutError
        if length is not None and len(body) < length:
            raise FetchError(f"{name} broke off after {len(body)} of {length} bytes")
        return bytes(body)

    def _too_large(self, name: str) -> FetchError:
        return FetchError(f"{name} is larger than {self._max_bytes} bytes, the limit")


def _opener(owner: _Request) -> urllib.request.OpenerDirector:
    """Build an opener without urllib's file, ftp and data handlers; sockets are told to `owner`."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(functools.partial(_HttpConnection, owner), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            context = ssl.create_default_context()
            return self.do_open(functools.partial(_HttpsConnection, owner), req, context=context)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Http(),
        Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, owner: _Request, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._owner = owner

    def connect(self) -> None:
        super().connect()
        self._owner.connected(self.sock)


class _HttpsConnection(http.client.HTTPSConnection):
    def __init__(self, owner: _Request, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._owner = owner

    def connect(self) -> None:
        super().connect()
        self._owner.connected(self.sock)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = MAX_REDIRECTS + 1  # ours speaks first

    def __init__(self) -> None:
        self._count = 0

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        self._count += 1
        if self._count > MAX_REDIRECTS:
            fp.close()
            raise FetchError(f"{_name(newurl)}: redirected more than {MAX_REDIRECTS} times")
        _checked(newurl)  # urllib itself would follow to ftp
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checked(url: str) -> str:
    """Return the URL in ASCII (IDNA host, percent-encoded rest); raise unless it is http(s)."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
        quoted = urllib.parse.quote(
            urllib.parse.urlunsplit(parts._replace(netloc=host)), safe="%/:=&?~#+!$,;'@()*[]"
        )
    except ValueError as error:
        raise FetchError(f"{_name(url)} is not a valid URL: {error}") from error
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{_name(url)} is not an http or https URL")
    return quoted


def _name(url: str) -> str:
    """Name a URL in one printable line, without the secrets of its user part and query."""
    plain = url.partition("?")[0].partition("#")[0]
    scheme, separator, rest = plain.partition("://")
    host, slash, path = rest.partition("/")
    plain = scheme + separator + host.rpartition("@")[2] + slash + path
    if len(plain) > 160:
        plain = f"{plain[:100]}…{plain[-40:]}"
    return "".join(char if char.isprintable() else "?" for char in plain)


def _reason(error: Exception) -> str:
    """Say in a few words why a request failed."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        phrase = http.client.responses.get(error.code, "")
        where = ", redirecting to no http or https URL" if 300 <= error.code < 400 else ""
        return f"the server answered {error.code} {phrase}".strip() + where
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, socket.gaierror):
        return "the host's name cannot be resolved (is the network on?)"
    if isinstance(error, ConnectionRefusedError):
        return "the host refuses the connection"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate cannot be verified: {error.verify_message}"
    if isinstance(error, (http.client.HTTPException, ConnectionError)):
        return "the server broke off the connection"
    return (str(error).split("\n")[0] or type(error).__name__).strip()
