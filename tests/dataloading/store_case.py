"""A web server with ranges on the loopback interface, which fails on request.

It serves a folder, or forwards to another server, such as the S3 server of ``serve_s3``.
"""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Fault = Callable[["Request"], str | int | None]
"""From a request to a status, the name of a fault as in ``_Handler``, or ``None``."""


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class Request:
    """A request that has come in: its number, method, key and first and last byte, if any."""

    def __init__(self, number: int, method: str, key: str, span: tuple[int, int] | None) -> None:
        self.number, self.method, self.key, self.span = number, method, key, span


class RangeServer:
    """Serves the files of a folder, or what the server at ``origin`` (HOST:PORT) answers.

    Attributes:
        fault: decides how a request fails.
        latency_s: before each answer.
        requests: all that came in.
        most: the most that were in progress at the same time.
        is_versioned: whether ETag and Last-Modified are sent.
    """

    def __init__(self, root: Path, origin: str | None = None) -> None:
        self.root, self.origin, self.latency_s, self.is_versioned = root, origin, 0.0, True
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.port = 0
        self._etags: dict[Path, tuple[int, str]] = {}
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again at the same port after ``stop``."""
        owner = self

        class Handler(_Handler):
            server_of = owner

        class Server(ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Log nothing: clients drop connections whose answers are wrong."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections; those that are open end at their next request."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def count(self) -> Iterator[None]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self.lock:
                self.now -= 1

    def find_etag(self, path: Path, time_ns: int) -> str:
        """Return the digest of a file, which is computed once per version."""
        if self._etags.get(path, (0, ""))[0] != time_ns:
            self._etags[path] = time_ns, f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
        return self._etags[path][1]

    def data_requests(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


def ask(
    host: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> tuple[HTTPResponse, bytes]:
    """Send one request; returns the answer and its body."""
    connection = HTTPConnection(host)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


@contextmanager
def serve_s3() -> Iterator[str]:
    """Run moto's S3 server in a process of its own; yields HOST:PORT.

    It answers some 200 requests per second: each on a connection of its own, and a range only after
    the whole object was read, which takes 0.25 ms per MB.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server_of: RangeServer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner = self.server_of
        with owner.count():
            self._answer(owner)

    def _answer(self, owner: RangeServer) -> None:
        key = unquote(self.path.partition("?")[0]).lstrip("/")
        text = self.headers.get("Range")
        span = None
        if text is not None:
            first, _, last = text.removeprefix("bytes=").partition("-")
            span = (int(first), int(last))
        with owner.lock:
            request = Request(len(owner.requests), self.command, key, span)
            owner.requests.append(request)
        time.sleep(owner.latency_s)
        fault = owner.fault(request)
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(1.5)
        if isinstance(fault, int):
            return self._fail(fault)
        if span is not None and fault == "whole":
            span = None
        elif span is not None and fault == "wrong range":
            span = span[0] + 1, span[1]
        find = self._read_file if owner.origin is None else self._ask_origin
        status, headers, data = find(key, span)
        if status >= 400 and owner.origin is None:
            return self._fail(status)
        length = int(headers.pop("Content-Length", len(data)))
        self.send_response(status)
        self.send_header("Content-Length", str(length + (7 if fault == "wrong length" else 0)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)
        if fault in ("truncate", "wrong length"):
            self.close_connection = True

    def _read_file(self, key: str, span: tuple[int, int] | None) -> Answer:
        owner = self.server_of
        path = owner.root / key
        if not path.is_file():
            return 404, {}, b""
        facts = path.stat()
        etag, whole = owner.find_etag(path, facts.st_mtime_ns), facts.st_size
        if self.headers.get("If-Match", etag) != etag:
            return 412, {}, b""
        first, last = (0, whole - 1) if span is None else (span[0], min(span[1], whole - 1))
        if span is not None and first > last:
            return 416, {}, b""
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        headers = {} if span is None else {"Content-Range": f"bytes {first}-{last}/{whole}"}
        if owner.is_versioned:
            modified = formatdate(facts.st_mtime, usegmt=True)
            headers |= {"ETag": etag, "Last-Modified": modified}
        return 200 if span is None else 206, headers, data

    def _ask_origin(self, key: str, span: tuple[int, int] | None) -> Answer:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("range", "host")}
        headers |= {} if span is None else {"Range": f"bytes={span[0]}-{span[1]}"}
        found, data = ask(str(self.server_of.origin), self.command, self.path, headers)
        kept = ("Content-Length", "Content-Range", "ETag", "Last-Modified", "Content-Type")
        return found.status, {k: found.headers[k] for k in kept if k in found.headers}, data

    def _fail(self, status: int) -> None:
        body = b"<Error><Code>Failure</Code><Secret>token=abcdef</Secret></Error>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
