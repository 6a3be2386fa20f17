"""A Hugging Face Hub on this machine: the routes that huggingface_hub asks for; errors as in its `hf_raise_for_status`.

Repositories whose owner is `gated` want TOKEN; those of `missing` do not exist.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"


class Hub(ThreadingHTTPServer):
    """Serves one set of files, at COMMIT and as `main`, under every repository's name."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.files = files
        self.unreadable: set[str] = set()
        self.files_sent: list[str] = []


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if "/gated/" in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "/missing/" in path:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.endswith("/revision/main"):
            self.send(200, json.dumps({"id": "some/set", "sha": COMMIT}).encode(), {})
        elif "/revision/" in path or "/tree/" + "f" * 40 in path:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
                for name, content in self.server.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), {})
        elif (
            name := path.partition(f"/resolve/{COMMIT}/")[2]
        ) not in self.server.files.keys() - self.server.unreadable:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            content = self.server.files[name]
            if self.command == "GET":
                self.server.files_sent.append(name)
            self.send(200, content, {"ETag": f'"{git_id(content)}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


def git_id(content: bytes) -> str:
    """40 hexadecimal digits that stand for a content, as Git's object ids do."""
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub on a free port of this machine until the block ends."""
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def endpoint_of(hub: Hub) -> str:
    """What HF_ENDPOINT has to be."""
    return f"http://127.0.0.1:{hub.server_port}"
