"""A loopback server that simulates the endpoints of the Hugging Face hub that an upload needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_never_shown"


class Hub(ThreadingHTTPServer):
    """Repositories with one commit's files; ``faults`` maps a part of a path to a status code."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, int] = {}
        self.sent: list[str] = []
        """Method and path of every request with a body."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if data:
            self.server.sent.append(f"{self.command} {path}")
        status = next((code for part, code in self.server.faults.items() if part in path), None)
        if status is not None:
            self.answer(status, {"error": f"fault {status}\nof the test"})
        elif path.startswith("/lfs/"):  # a store with signed addresses, so without a token
            self.server.objects[path.removeprefix("/lfs/")] = data
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        else:
            self.answer_known(path, data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer_known(self, path: str, data: bytes) -> None:
        hub, parts = self.server, path.strip("/").split("/")
        match parts:
            case ["api", "repos", "create"]:
                tree = json.loads(data)
                repo = f"{tree['organization']}/{tree['name']}"
                status = 409 if repo in hub.private else 200
                is_private = tree.get("private") or tree.get("visibility") == "private"
                hub.private.setdefault(repo, bool(is_private))
                hub.files.setdefault(repo, {})
                self.answer(status, {"url": f"{hub.endpoint}/{repo}"})
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, *_] if f"{owner}/{name}" not in hub.private:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            case ["api", "models", owner, name]:
                repo = f"{owner}/{name}"
                self.answer(200, {"id": repo, "private": hub.private[repo], "sha": "c" * 40})
            case ["api", "models", _, _, "preupload", "main"]:
                names = [file["path"] for file in json.loads(data)["files"]]
                modes = {name: "lfs" if "model." in name else "regular" for name in names}
                files = [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False}
                    for name, mode in modes.items()
                ]
                self.answer(200, {"files": files})
            case [*_, "info", "lfs", "objects", "batch"]:
                self.answer(200, {"objects": [self.place(o) for o in json.loads(data)["objects"]]})
            case ["api", "models", owner, name, "commit", "main"]:
                files = hub.files[f"{owner}/{name}"]
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                url = f"{hub.endpoint}/{owner}/{name}/commit/{'c' * 40}"
                self.answer(200, {"commitUrl": url, "commitOid": "c" * 40})
            case [owner, name, "resolve", "main", file] if file in hub.files[f"{owner}/{name}"]:
                body = hub.files[f"{owner}/{name}"][file]
                etag = hashlib.sha256(body).hexdigest()
                self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit="c" * 40)
            case _:
                self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")

    def place(self, found: dict[str, Any]) -> dict[str, Any]:
        if found["oid"] in self.server.objects:
            return found
        return found | {
            "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{found['oid']}"}}
        }


@contextmanager
def open_hub() -> Iterator[Hub]:
    """Serve in a thread until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
