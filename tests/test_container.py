"""The Dockerfile without a daemon: it is linted, pinned and without root, and what it copies is what is needed."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serving.http.options import settings
from serving.sagemaker.train import DVC_FOLDER, PROJECT
from stages.common.errors import UserError
from tests.image import ROOT, ignored, image_files, make_image
from tests.project import EVERYTHING
from tests.workplace import ENVIRONMENT

HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with their arguments, line continuations joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; the last one's name is empty."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = "before"
    for keyword, argument in instructions():
        if keyword == "FROM":
            name = argument.split(" AS ")[1] if " AS " in argument else ""
        found.setdefault(name, []).append((keyword, argument))
    return found


def exec_form(stage: str, keyword: str) -> list[str]:
    """What an instruction runs, without a shell in between: signals are to reach the program."""
    [argument] = [argument for word, argument in stages()[stage] if word == keyword]
    return list(json.loads(argument[argument.index("[") :]))


def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_base_is_pinned_by_digest_and_no_host_of_an_index_is_named() -> None:
    bases = [argument for keyword, argument in instructions() if keyword == "ARG" and argument.startswith("BASE_IMAGE")]
    assert len(bases) == 1
    assert re.fullmatch(r"BASE_IMAGE=python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases[0])
    froms = [argument.split()[0] for keyword, argument in instructions() if keyword == "FROM"]
    assert set(froms) <= {"${BASE_IMAGE}", *stages()}
    assert "http" not in re.sub(r"http://127\.0\.0\.1:8000", "", (ROOT / "Dockerfile").read_text())


def test_the_image_runs_as_a_user_without_rights_and_only_sagemakers_as_root() -> None:
    users = {name: [argument for keyword, argument in found if keyword == "USER"] for name, found in stages().items()}
    assert users.pop("sagemaker") == ["0"]
    assert users["code"] == ["$USER_ID"]
    assert ("ARG", "USER_ID=1000") in stages()["code"]
    assert stages()[""][0] == ("FROM", "code"), "the default stage goes on as that user"


def test_the_package_files_are_installed_one_by_one_as_make_does() -> None:
    [run] = [argument for keyword, argument in stages()["packages"] if keyword == "RUN" and "requirement" in argument]
    installs = [part for part in run.split("&&") if "--requirement" in part]
    assert [part.count("--requirement") for part in installs] == [1, 1], "--only-binary of one would hold for both"


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose /healthz has this status; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def health_of(port: int) -> int:
    command = [part.replace(":8000/", f":{port}/") for part in exec_form("", "HEALTHCHECK")]
    return subprocess.run([sys.executable, *command[1:]], capture_output=True, check=False).returncode


def test_the_health_check_tells_a_working_service_from_a_broken_or_absent_one() -> None:
    with answering(200) as port:
        assert health_of(port) == 0
    with answering(503) as port:
        assert health_of(port) != 0
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert health_of(unused.getsockname()[1]) != 0
    assert ("EXPOSE", "8000") in stages()[""]


def test_the_service_of_the_image_starts_with_a_token_and_not_without(monkeypatch: pytest.MonkeyPatch) -> None:
    command = exec_form("", "CMD")
    assert command[:3] == ["python", "-m", "serving.api"]
    monkeypatch.setattr(sys, "argv", command[2:])
    monkeypatch.delenv("API_TOKEN", raising=False)
    with pytest.raises(UserError, match="API_TOKEN"):
        settings(None)
    monkeypatch.setenv("API_TOKEN", "0123456789abcdef")
    assert (settings(None).host, settings(None).port) == ("0.0.0.0", 8000)


def test_what_is_copied_holds_no_weights_results_history_or_secrets(tmp_path: Path) -> None:
    assert {name.split("/")[0] for name in image_files()} == {
        ".dvc", ".dvcignore", "LICENSE", "data", "dvc.yaml", "params.yaml", "preflight", "recipes",
        "requirements.txt", "serving", "stages",
    }  # fmt: skip
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (".git/config", ".dvc/config.local", ".dvc/cache/a", "data/raw/mine.csv", "models/base/a", ".env"):
        assert ignored(name, lines), name
    for name in ("stages/__pycache__/a.pyc", "serving/common/__pycache__/a.pyc", ".dvc/plots/page.html"):
        assert ignored(name, lines), name


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/app of the image, after the Dockerfile's own last step there."""
    folder = make_image(tmp_path_factory.mktemp("image") / "app")
    [step] = [argument for keyword, argument in stages()["code"] if keyword == "RUN" and argument.startswith("dvc ")]
    assert run(folder, *shlex.split(step)[1:], module="dvc") == ""
    return folder


def run(folder: Path, *arguments: str, module: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env={"PATH": "/nowhere", "HOME": str(folder.parent), **ENVIRONMENT}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_without_git_the_copied_files_know_the_whole_pipeline_and_the_commands(app: Path) -> None:
    for name in (*PROJECT, *DVC_FOLDER):
        assert (app / name).exists(), f"a training job copies {name}"
    assert set(run(app, "stage", "list", "--name-only", module="dvc").split()) == EVERYTHING
    assert "preflight: " in run(app, "params", module="preflight.check")
    assert "usage: python -m serving.predict" in run(app, "-h", module="serving.predict")
    assert exec_form("sagemaker", "ENTRYPOINT") == ["python", "-m", "serving.sagemaker"]
    assert "{train,serve}" in run(app, "-h", module="serving.sagemaker")
