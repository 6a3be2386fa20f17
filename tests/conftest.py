"""What several test files need and is worth making only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments import make_trained_project
from tests.test_pipeline import Project
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
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny pipeline, run once and committed; not to be written to: `tests.experiments.copied` makes copies."""
    return make_trained_project(tmp_path_factory.mktemp("trained"))
