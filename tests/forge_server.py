"""GitHub and GitLab on this machine: the routes for comments that `review.forges` asks for, with a memory.

After the REST documentation of both: pages with a Link header; a workflow's own token may not ask who it is; errors
carry a `message`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ACTIONS_TOKEN = "ghs_workflowworkflow"
PERSONAL_TOKEN = "ghp_personalpersonal"
READ_TOKEN = "ghs_readreadread"
GITLAB_TOKEN = "glpat-projectproject"
ACCOUNTS = {
    ACTIONS_TOKEN: "github-actions[bot]", READ_TOKEN: "github-actions[bot]", PERSONAL_TOKEN: "ada",
    GITLAB_TOKEN: "project_7_bot",
}  # fmt: skip
HEAD = "a" * 40


class Forge(ThreadingHTTPServer):
    """Pull request 12 of owner/name, and merge request 12 of project 7; both have one list of comments."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.comments: list[dict[str, Any]] = []
        self.requests: list[str] = []
        # Status, body and headers of every answer, where set.
        self.refusal: tuple[int, bytes, dict[str, str]] | None = None
        self.next_link: str | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, account: str, body: str) -> dict[str, Any]:
        user = {"login": account, "username": account}
        comment = {"id": 1000 + len(self.comments), "user": user, "author": user, "body": body}
        self.comments.append(comment)
        return comment


class Routes(BaseHTTPRequestHandler):
    server: Forge

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.body = json.loads(content) if content else {}
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.refusal:
            self.send(*self.server.refusal)
            return
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = bearer or self.headers.get("PRIVATE-TOKEN", "")
        if token not in ACCOUNTS or (token == GITLAB_TOKEN) == bool(bearer):
            self.refuse(401, "Bad credentials")
            return
        self.token, self.account = token, ACCOUNTS[token]
        path = urlsplit(self.path).path
        for method, pattern, name in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                getattr(self, name)(**match.groupdict())
                return
        self.refuse(404, "Not Found")

    do_GET = do_POST = do_PATCH = do_PUT = answer  # noqa: N815

    def who(self) -> None:
        if self.account.startswith("github-actions"):
            self.refuse(403, "Resource not accessible by integration")
        else:
            self.send_json({"login": self.account} if self.account == "ada" else {"username": self.account})

    def describe(self) -> None:
        self.send_json({"sha": HEAD} if "projects" in self.path else {"head": {"sha": HEAD}})

    def listing(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        size, page = int(query["per_page"][0]), int(query.get("page", ["1"])[0])
        url = f"{self.server.address}{urlsplit(self.path).path}?per_page={size}&page="
        links = [f'<{url}1>; rel="first"']
        if page * size < len(self.server.comments):
            links.insert(0, f'<{self.server.next_link or f"{url}{page + 1}"}>; rel="next"')
        shown = self.server.comments[(page - 1) * size : page * size]
        self.send(200, json.dumps(shown).encode(), {"Link": ", ".join(links)})

    def create(self) -> None:
        if self.may_write():
            self.send_json(self.server.add(self.account, self.body["body"]), 201)

    def change(self, comment: str) -> None:
        if self.may_write():
            found = next(one for one in self.server.comments if one["id"] == int(comment))
            found["body"] = self.body["body"]
            self.send_json(found)

    def may_write(self) -> bool:
        if self.token == READ_TOKEN:
            self.refuse(403, "Resource not accessible by integration")
        elif len(self.body["body"]) > 65_536:
            self.refuse(422, "body is too long (maximum is 65536 characters)")
        else:
            return True
        return False

    def refuse(self, status: int, message: str) -> None:
        self.send_json({"message": message}, status)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


GITHUB, GITLAB = "/repos/owner/name", "/projects/7/merge_requests/12"
ROUTES = [
    ("GET", "/user", "who"),
    ("GET", f"{GITHUB}/pulls/12", "describe"),
    ("GET", f"{GITHUB}/issues/12/comments", "listing"),
    ("POST", f"{GITHUB}/issues/12/comments", "create"),
    ("PATCH", f"{GITHUB}/issues/comments/(?P<comment>[0-9]+)", "change"),
    ("GET", GITLAB, "describe"),
    ("GET", f"{GITLAB}/notes", "listing"),
    ("POST", f"{GITLAB}/notes", "create"),
    ("PUT", f"{GITLAB}/notes/(?P<comment>[0-9]+)", "change"),
]


@contextmanager
def serve() -> Iterator[Forge]:
    """A forge on a free port of this machine until the block ends."""
    forge = Forge()
    thread = threading.Thread(target=forge.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield forge
    finally:
        forge.shutdown()
        thread.join()
        forge.server_close()


def variables(forge: Forge, token: str = ACTIONS_TOKEN) -> dict[str, str]:
    """What a job of the forge that the token is of would have in its environment."""
    if token == GITLAB_TOKEN:
        return {"CI_API_V4_URL": forge.address, "CI_PROJECT_ID": "7", "REVIEW_TOKEN": token}
    return {"GITHUB_API_URL": forge.address, "GITHUB_REPOSITORY": "owner/name", "GITHUB_TOKEN": token}
