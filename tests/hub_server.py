"""A Hugging Face Hub on this machine: the routes that huggingface_hub asks for; errors as in its `hf_raise_for_status`.

Downloads: one set of files under every name, but for owners `gated` (their files want a token whose account accepted
the licence, as on the Hub, where names and sizes stay public) and `missing` (there is no such repository).
Uploads: repositories that clients make, with a history of commits; weights travel as Git LFS objects, the rest inside
the commit, as `_commit_api` and `lfs` of huggingface_hub do it without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"
READ_TOKEN = "hf_readreadreadreadread"
# Account and role of each token; the licence was accepted by `me` alone.
ACCOUNTS = {TOKEN: ("me", "write"), READ_TOKEN: ("guest", "read")}


@dataclass(frozen=True)
class Commit:
    """A state of a repository, and which paths the client sent to get there."""

    id: str
    message: str
    files: dict[str, bytes]
    sent: list[str] = field(default_factory=list)


@dataclass
class Repository:
    """Made by a client; the newest commit is the last."""

    private: bool
    commits: list[Commit]


class Hub(ThreadingHTTPServer):
    """Serves one set of files, at COMMIT and as `main`, under every name that nobody has pushed to."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.files = files
        self.unreadable: set[str] = set()
        self.files_sent: list[str] = []
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.full = False

    def commits(self, repo_id: str) -> list[Commit]:
        if repo_id in self.repositories:
            return self.repositories[repo_id].commits
        return [Commit(COMMIT, "", self.files)]

    def add(self, repo_id: str, private: bool = False) -> None:
        """A new repository, which the Hub starts with a .gitattributes."""
        first = Commit(git_id(repo_id.encode()), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.repositories[repo_id] = Repository(private, [first])


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        # Read before refusing: a client that still sends would only see the connection end.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if token and token not in ACCOUNTS:
                raise RefusedError(401, message="Invalid credentials in Authorization header")
            self.account, self.role = ACCOUNTS.get(token, ("", ""))
            for methods, pattern, handle in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    handle(self, **match.groupdict())
                    break
            else:
                raise RefusedError(404)
        except RefusedError as refusal:
            self.send(refusal.status, b"{}", refusal.headers)

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def commit_at(self, repo_id: str, revision: str) -> Commit:
        repository = self.server.repositories.get(repo_id)
        if repo_id.startswith("missing/") or (
            repository is not None and repository.private and not self.may_write(repo_id)
        ):
            raise RefusedError(404, "RepoNotFound")
        for commit in reversed(self.server.commits(repo_id)):
            if revision in ("main", commit.id):
                return commit
        raise RefusedError(404, "RevisionNotFound")

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and repo_id.split("/")[0] == self.account

    def require_write(self, repo_id: str) -> None:
        if not self.may_write(repo_id):
            raise RefusedError(403, message=f"You don't have the rights to write to {repo_id}")

    def who(self) -> None:
        self.send_json({"name": self.account, "auth": {"accessToken": {"role": self.role}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.require_write(repo_id)
        exists = repo_id in self.server.repositories
        if not exists:
            self.server.add(repo_id, wanted.get("visibility") == "private")
        self.send_json({"url": f"{endpoint_of(self.server)}/{repo_id}"}, 409 if exists else 200)

    def check_card(self) -> None:
        # The real one knows each key's values; here a card only has to have metadata.
        if not json.loads(self.body)["content"].startswith("---\n"):
            raise RefusedError(400, message="no metadata")
        self.send_json({"warnings": [], "errors": []})

    def describe(self, repo_id: str, revision: str | None = None) -> None:
        commit = self.commit_at(repo_id, revision or "main")
        private = repo_id in self.server.repositories and self.server.repositories[repo_id].private
        self.send_json({"id": repo_id, "sha": commit.id, "private": private})

    def tree(self, repo_id: str, revision: str) -> None:
        files = self.commit_at(repo_id, revision).files
        self.send_json([
            {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
            | ({"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}} if is_large(name) else {})
            for name, content in files.items()
        ])  # fmt: skip

    def download(self, repo_id: str, revision: str, name: str) -> None:
        if repo_id.startswith("gated/") and self.account != "me":
            raise RefusedError(403 if self.account else 401, "GatedRepo", f"Access to {repo_id} is restricted.")
        commit = self.commit_at(repo_id, revision)
        if name not in commit.files.keys() - self.server.unreadable:
            raise RefusedError(404, "EntryNotFound")
        content = commit.files[name]
        if self.command == "GET":
            self.server.files_sent.append(name)
        etag = sha256(content) if is_large(name) else git_id(content)
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.id})

    def preupload(self, repo_id: str) -> None:
        self.require_write(repo_id)
        present = self.server.commits(repo_id)[-1].files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            name, large = wanted["path"], is_large(wanted["path"])
            oid = None
            if name in present:
                oid = sha256(present[name]) if large else git_id(present[name])
            answers.append(
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.send_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.require_write(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{endpoint_of(self.server)}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.objects else {"actions": upload}))
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.server.full:
            raise RefusedError(507, message="no storage left")
        if sha256(self.body) != oid:
            raise RefusedError(400, message="SHA-256 differs")
        self.server.objects[oid] = self.body
        self.send_json({})

    def commit(self, repo_id: str) -> None:
        self.require_write(repo_id)
        head = self.server.commits(repo_id)[-1]
        files, sent, message = dict(head.files), [], ""
        for entry in map(json.loads, self.body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                message = "\n\n".join(part for part in (value["summary"], value["description"]) if part)
                continue
            sent.append(value["path"])
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile", entry["key"]
                del files[value["path"]]
        new = Commit(git_id(head.id.encode() + self.body), message, files, sent)
        self.server.repositories[repo_id].commits.append(new)
        self.send_json({"commitUrl": f"{endpoint_of(self.server)}/{repo_id}/commit/{new.id}", "commitOid": new.id})

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        basic = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        for name, value in (basic | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


REPOSITORY = r"(?:datasets/)?(?P<repo_id>[^/]+/[^/]+)"
API = r"/api/(?:models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Routes.who),
    ("POST", "/api/repos/create", Routes.create),
    ("POST", "/api/validate-yaml", Routes.check_card),
    ("GET", API, Routes.describe),
    ("GET", API + "/revision/(?P<revision>.+)", Routes.describe),
    ("GET", API + "/tree/(?P<revision>[^/]+)", Routes.tree),
    ("POST", API + "/preupload/main", Routes.preupload),
    ("POST", API + "/commit/main", Routes.commit),
    ("POST", f"/{REPOSITORY}[.]git/info/lfs/objects/batch", Routes.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Routes.lfs_put),
    ("GET HEAD", f"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Routes.download),
]


def is_large(name: str) -> bool:
    """Whether a file is kept as a Git LFS object, by its name as in a new repository's .gitattributes."""
    return name.endswith(".safetensors")


def git_id(content: bytes) -> str:
    """Git's id of a file with this content, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """A Git LFS object's id."""
    return hashlib.sha256(content).hexdigest()


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
