"""The base model's files in models/base/: verified against their pin before use, fetched again when absent."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from stages.common.errors import UserError
from stages.common.progress import progress
from stages.common.tables import read_json

BASE_FOLDER = Path("models/base")
BASE_PIN = Path("models/base.json")
TOKENIZER_FOLDER = Path("models/tokenizer")


def ensure_base() -> Path:
    """The folder with the base model that models/base.json pins, fetched first when it is absent.

    Fetching is another process: what is fetched is checked here, so its code is no part of a training stage's digest.

    Returns:
        models/base, whose files have the SHA-256 that the pin names.

    Raises:
        UserError: a file differs from its pin, or the source cannot be fetched.
    """
    pinned = read_json(BASE_PIN)["files"]
    if not BASE_FOLDER.is_dir():
        print(f"{BASE_FOLDER} is absent: fetching it from its pinned source", flush=True)
        if subprocess.run([sys.executable, "-m", "stages.base_model", "fetch"], check=False).returncode:
            raise UserError(f"{BASE_FOLDER}: could not be fetched; the message above says why")
    found = file_hashes(BASE_FOLDER)
    wrong = sorted(name for name in pinned if found.get(name) != pinned[name])
    if wrong:
        raise UserError(
            f"{BASE_FOLDER}: not as pinned in {BASE_PIN} (SHA-256): {', '.join(wrong)}. Remove {BASE_FOLDER} to fetch "
            "the pinned files again; if the base was changed on purpose, run `dvc repro --force base_model`."
        )
    return BASE_FOLDER


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal digits of each file in `folder`, by name, sorted."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    hashes = {}
    with progress(sum(path.stat().st_size for path in paths), "verifying the base model", "B") as bar:
        for path in paths:
            hashes[path.name] = file_sha256(path)
            bar.update(path.stat().st_size)
    return hashes


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
