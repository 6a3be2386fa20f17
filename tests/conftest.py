"""What several test files need and is worth making only once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.planted import planted
from tests.project import Project
from tests.project import finished_project as run_pipeline
from tests.s3_server import S3Server, serve_s3
from tests.ssh_server import SSHD, SshServer, serve_ssh
from tests.stored import Stored, store
from tests.tiny import save_base_model, save_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like models/tokenizer, with the tiny base model's tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like models/base, with the tiny base model; not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    save_base_model(folder)
    return folder


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The whole pipeline on a tiny base, run once and committed; not to be changed: `copy` or `clone` it.

    Secrets are in that run's environment, for `tests/test_secrets.py`; a key for Weights & Biases would ask for them.
    """
    return run_pipeline(tmp_path_factory.mktemp("finished") / "repository", planted("WANDB_API_KEY"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server with a bucket."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A running SSH server."""
    if SSHD is None:
        pytest.skip("there is no sshd on this machine; Debian and Ubuntu: apt install openssh-server")
    with serve_ssh(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture(scope="session")
def stored(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """The finished project, pushed to a folder that is also served over HTTP; not to be changed."""
    with store(finished_project, tmp_path_factory.mktemp("stored")) as stored:
        yield stored
