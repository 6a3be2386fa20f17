"""What several test files need and is worth making only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like models/tokenizer, with the tiny base model's tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder
