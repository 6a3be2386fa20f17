"""What several test files need and is worth making only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project import Project
from tests.project import finished_project as run_pipeline
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
    """The whole pipeline on a tiny base, run once and committed; not to be changed: `copy` or `clone` it."""
    return run_pipeline(tmp_path_factory.mktemp("finished") / "repository")
