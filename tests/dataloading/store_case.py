"""A web server with ranges on the loopback interface, which fails as it is told to."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Fault = Callable[["Request"], str | int | None]
"""From a request to a status, the name of a fault as in ``_Handler``, or ``None``."""


class Request:
    """A request that has come in: its number, method, key and first and last byte, if any."""

    def __init__(self, number: int, method: str, key: str, span: tuple[int, int] | None) -> None:
        self.number, self.method, self.key, self.span = number, method, key, span


class RangeServer:
    """Serves the files of a folder.

    Attributes:
        fault: decides how a request fails.
        latency_s: before each answer.
        requests: all that came in.
        most: the most that were in progress at the same time.
        is_versioned: whether ETag and Last-Modified are sent.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.latency_s, self.is_versioned = root, 0.0, True
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.port = 0
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

    def data_requests(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server_of: RangeServer

    def log_message(self, *arguments: Any) -> None:
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
        path = owner.root / key
        if not path.is_file():
            return self._fail(404)
        data = path.read_bytes()
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            return self._fail(412)
        whole = len(data)
        if span is not None and fault != "whole":
            first, last = span[0], min(span[1], whole - 1)
            if fault == "wrong range":
                first -= 1
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) + (7 if fault == "wrong length" else 0)))
        if owner.is_versioned:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)
        if fault in ("truncate", "wrong length"):
            self.close_connection = True

    def _fail(self, status: int) -> None:
        body = b"<Error><Code>Failure</Code><Secret>token=abcdef</Secret></Error>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
