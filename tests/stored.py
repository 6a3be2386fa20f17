"""A finished project whose objects lie in a remote, and the clones and remotes that tests make of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ruamel.yaml import YAML

from tests.project import Project
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.ssh_server import SshServer

ADAPTER = "models/adapter"
WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A pushed project.

    Attributes:
        project: with its cache; its default remote is `folder`.
        folder: the remote of that name.
        http: the url under which a web server shows that folder.
    """

    project: Project
    folder: Path
    http: str

    def own_folder(self, project: Project, folder: Path) -> Path:
        """Give a project a copy of the remote that may be damaged."""
        shutil.copytree(self.folder, folder)
        project.dvc("remote", "modify", "--local", "folder", "url", str(folder))
        return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serve_http(folder: Path) -> Iterator[str]:
    """The url under which Python's web server shows a folder until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def store(finished: Project, place: Path) -> Iterator[Stored]:
    """Push a copy of a project to a folder, and serve that."""
    project = finished.copy(place / "repository")
    project.dvc("remote", "add", "--default", "folder", str(place / "remote"))
    project.dvc("remote", "modify", "folder", "verify", "true")
    project.git("commit", "-qam", "Add a remote")
    project.dvc("push")
    with serve_http(place / "remote") as url:
        yield Stored(project, place / "remote", url)


def add_s3(project: Project, server: S3Server, path: str, endpoint: str | None = None) -> None:
    """Set up remote `s3` as docs/remotes.md says."""
    project.dvc("remote", "add", "--local", "s3", f"s3://{BUCKET}/{path}")
    settings = {
        "verify": "true",
        "endpointurl": endpoint or server.endpoint,
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET_KEY,
    }
    set_up(project, "s3", settings)


def add_ssh(project: Project, server: SshServer, path: str, port: int | None = None) -> None:
    """Set up remote `ssh` as docs/remotes.md says."""
    place = server.folder / "storage" / path
    project.dvc("remote", "add", "--local", "ssh", f"ssh://127.0.0.1:{port or server.port}{place}")
    set_up(project, "ssh", {"verify": "true", "user": server.user, "keyfile": str(server.folder / "user_key")})


def add_http(project: Project, url: str) -> None:
    """Set up remote `http` as docs/remotes.md says."""
    project.dvc("remote", "add", "--local", "http", url)
    set_up(project, "http", {"verify": "true"})


def set_up(project: Project, remote: str, settings: dict[str, str]) -> None:
    """Change settings of a remote in .dvc/config.local, as `dvc remote modify --local` does, in no time."""
    with (project.folder / ".dvc/config.local").open("a", encoding="utf-8") as config:
        config.write("".join(f"    {key} = {value}\n" for key, value in settings.items()))


def locked(project: Project, stage: str, path: str) -> str:
    """The hash of an output in dvc.lock."""
    lock = YAML(typ="safe").load((project.folder / "dvc.lock").read_text(encoding="utf-8"))
    return next(output["md5"] for output in lock["stages"][stage]["outs"] if output["path"] == path)


def object_at(folder: Path, oid: str) -> Path:
    """Where a cache or a remote in a folder keeps an object."""
    return folder / "files/md5" / oid[:2] / oid[2:]


def files_in(folder: Path) -> dict[str, bytes]:
    """All files in a folder by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path, content: bytes) -> None:
    """Change an object and leave it read-only, as a failing disk does."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def flipped(content: bytes) -> bytes:
    """The same with one bit changed."""
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]
