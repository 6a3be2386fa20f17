"""Where a training run keeps its checkpoints: outside DVC's outputs, locked, under a fingerprint of all it depends on.

DVC removes a stage's outputs before it runs the stage, and runs queued experiments in folders that it deletes. So
checkpoints lie beside the cache of the main repository, and an interrupted run finds them again by its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.common.base import file_sha256
from stages.common.errors import UserError

FINISHED = "adapter"  # what a run leaves when it is done
RUN_NAME = re.compile("[0-9a-f]{64}")  # a fingerprint
SECONDS_KEPT = 7 * 24 * 3600  # an interrupted run that nobody resumed for a week


def fingerprint(files: list[Path], values: dict[str, Any]) -> str:
    """SHA-256 in hexadecimal digits over the contents of `files` and over `values`, which JSON can hold."""
    described = {"files": {str(path): file_sha256(path) for path in files}, "values": values}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def checkpoint_root() -> Path:
    """The folder of all runs: `CHECKPOINT_DIR` where that is set, else beside the DVC cache of the main repository."""
    if "CHECKPOINT_DIR" in os.environ:
        return Path(os.environ["CHECKPOINT_DIR"]).expanduser()
    from dvc.repo import Repo

    with Repo() as repo:
        return Path(repo.cache.local_cache_dir).parent / "checkpoints"


@contextmanager
def locked_run(root: Path, key: str) -> Iterator[Path]:
    """The folder of the run `key`, held by this process alone until the block ends.

    The operating system drops the lock with the process, however it ends. Finished runs and those that nobody resumed
    for a week are removed first, so that the disk holds the current run, the last one and interrupted ones.

    Raises:
        UserError: another process is training the same run.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is training this very run (it holds {lock.lock_file}). Wait for it, or stop it: after "
            "a killed `dvc repro` the trainer may still be at work, and its checkpoints are used by the next run."
        ) from None
    with lock:
        _remove_old_runs(root, key)
        folder = root / key
        folder.mkdir(exist_ok=True)
        yield folder


def keep_adapter_alone(folder: Path) -> None:
    """Remove a finished run's checkpoints; its adapter serves a `dvc repro` that was killed before it committed."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != FINISHED:
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` to continue from; None where there is none.

    Cut ones are removed: the trainer writes its state last. So are those of a training that had ended: transformers
    would take one step more from there, and the adapter would be another.
    """
    usable = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            is_usable = not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        except (OSError, ValueError, KeyError):
            is_usable = False
        if is_usable:
            usable.append(path)
        else:
            shutil.rmtree(path)
    return max(usable, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _remove_old_runs(root: Path, key: str) -> None:
    for folder in root.iterdir():
        # Whatever else lies in a folder that the user named is not this program's.
        if not folder.is_dir() or not RUN_NAME.fullmatch(folder.name) or folder.name == key:
            continue
        old = time.time() - folder.stat().st_mtime > SECONDS_KEPT
        if not (old or (folder / FINISHED).exists()):
            continue
        lock = FileLock(root / f"{folder.name}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            continue  # in use
