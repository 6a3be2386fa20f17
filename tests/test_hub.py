"""huggingface_hub is real, in a process of its own as its endpoint is read at import; the Hub is a server made here."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"data/train.csv": b"id,text,label\n1,good,positive\n", "data/test.csv": b"x", "README.md": b"# card"}
TOKEN = "hf_secretsecretsecret"

DOWNLOAD = """
import sys
from stages.common.errors import run_stage
from stages.common.sources.hub import download_repository, require_commit
def main():
    repo_id, revision, folder = sys.argv[1:]
    require_commit(repo_id, revision, "dataset", "ingest.source.revision")
    from pathlib import Path
    root = download_repository(repo_id, revision, "dataset", ["data/*.csv"], Path(folder) if folder else None)
    print("\\n".join(sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())))
run_stage(main)
"""


class Hub(BaseHTTPRequestHandler):
    """The routes of the Hub that huggingface_hub asks for a data set; errors as in its `hf_raise_for_status`."""

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
            tree = [{"type": "file", "path": p, "size": len(c), "oid": f"{len(c):040x}"} for p, c in FILES.items()]
            self.send(200, json.dumps(tree).encode(), {})
        else:
            content = FILES[path.split(f"/resolve/{COMMIT}/")[1]]
            self.send(200, content, {"ETag": f'"{len(content):040x}"', "X-Repo-Commit": COMMIT})

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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(
    home: Path, endpoint: str, repo_id: str, revision: str, folder: Path | str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, repo_id, revision, str(folder)],
        env=clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wanted_files_of_a_commit_are_downloaded_and_nothing_beside_them(endpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    result = download(tmp_path, endpoint, "some/set", COMMIT, folder)
    assert result.stdout.split() == ["data/test.csv", "data/train.csv"], result.stderr
    assert (folder / "data" / "train.csv").read_bytes() == FILES["data/train.csv"]


def test_without_a_folder_the_next_run_needs_no_network(endpoint: str, tmp_path: Path) -> None:
    assert download(tmp_path, endpoint, "some/set", COMMIT).returncode == 0
    result = download(tmp_path, endpoint, "some/set", COMMIT, HF_HUB_OFFLINE="1")
    assert result.stdout.split() == ["data/test.csv", "data/train.csv"], result.stderr


def test_a_token_opens_a_gated_repository_and_is_neither_printed_nor_stored(endpoint: str, tmp_path: Path) -> None:
    result = download(tmp_path, endpoint, "gated/set", COMMIT, HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_token_stored_on_the_machine_is_not_used(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    assert download(tmp_path, endpoint, "gated/set", COMMIT).returncode == 1


@pytest.mark.parametrize(
    ("repo_id", "revision", "expected"),
    [
        ("some/set", "main", f"ingest.source.revision: 'main' is not a commit of 40 hexadecimal digits, and can point "
         f"to something else tomorrow. It points to {COMMIT} now: put that there."),
        ("some/set", "v9", "has no such revision"),
        ("some/set", "f" * 40, "has no such revision"),
        ("gated/set", COMMIT, "Accept the licence on that page, then set HF_TOKEN"),
        ("missing/set", COMMIT, "/datasets/missing/set: there is no such dataset, or it is private"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_ends_in_one_message(
    endpoint: str, tmp_path: Path, repo_id: str, revision: str, expected: str
) -> None:
    result = download(tmp_path, endpoint, repo_id, revision)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert expected in result.stderr


# A connection refused while downloading takes huggingface_hub's own 5 retries (26 s), so that case is offline mode.
@pytest.mark.parametrize(("revision", "environment"), [("main", {}), (COMMIT, {"HF_HUB_OFFLINE": "1"})])
def test_a_hub_that_cannot_be_reached_is_said_to_be(tmp_path: Path, revision: str, environment: dict[str, str]) -> None:
    result = download(tmp_path, "http://127.0.0.1:9", "some/set", revision, **environment)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "could not be fetched" in result.stderr
    assert ("not a commit" in result.stderr) == (revision == "main")
