"""Where a training run keeps its checkpoints: outside DVC's outputs, locked, under a fingerprint of all it depends on.

DVC removes a stage's outputs before it runs the stage, and runs queued experiments in folders that it deletes. So
checkpoints lie beside the cache of the main repository, and an interrupted run finds them again by its fingerprint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.common.base import file_sha256
from stages.common.errors import UserError, listing
from stages.common.tables import write_json, write_text

FINISHED = "adapter"  # what a run leaves when it is done
HASHES = "sha256.json"  # of all files beside it; written last
RUN_NAME = re.compile("[0-9a-f]{64}")  # a fingerprint
# Interrupted runs that are kept: as many as a machine of eight GPUs may have had under way, twice. Not by their age: a
# clock that jumps must not cost anybody a run.
RUNS_KEPT = 16
DATASETS = "datasets"  # a folder beside the runs: rows that are mapped into memory, shared by runs of the same data
DATASET = "dataset"  # a run's file with the name of its folder in there
PARTIAL = ".partial"  # what is being written, or removed
ORDER = "order"  # a run's file with its place in the order in which runs were started
NEWEST_KEPT = 2  # checkpoints, for the case that the last one is damaged; and the best one
# A trainer whose `dvc` was killed notices, takes a step to its end and writes a checkpoint.
SECONDS_TO_WAIT = 120


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

    The operating system drops the lock with the process, however it ends. Finished runs and all but the last
    interrupted ones are removed first, so that the disk holds no more than RUNS_KEPT beside the current one.

    Raises:
        UserError: another process is training the same run, and goes on doing so; or CHECKPOINT_DIR names no folder
            that can be written to.
    """
    lock = FileLock(root / f"{key}.lock")
    try:
        with _variable_named(root):
            root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        print("finetune: another process is training this very run; waits for it to end", flush=True)
        try:
            lock.acquire(timeout=SECONDS_TO_WAIT)
        except Timeout:
            raise UserError(
                f"another process is training this very run (it holds {lock.lock_file}). Wait for it, or stop it: its "
                "checkpoints are used by the next run."
            ) from None
    try:
        _remove_old_runs(root, key)
        folder = root / key
        folder.mkdir(exist_ok=True)
        write_text(folder / ORDER, f"{1 + max(map(_order, _runs(root)), default=0)}\n")
        yield folder
    finally:
        lock.release()


@contextmanager
def _variable_named(root: Path) -> Iterator[None]:
    """Say of a folder that cannot be had where its name comes from; a full disk is another matter."""
    try:
        yield
    except OSError as error:
        wrong_place = error.errno in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
        if not wrong_place or "CHECKPOINT_DIR" not in os.environ:
            raise
        raise UserError(
            f"CHECKPOINT_DIR={root} in the environment: checkpoints cannot be written there ({error.filename}: "
            f"{error.strerror}). Name a folder that you may write to, or unset it: they then lie beside DVC's cache."
        ) from None


def shared_dataset(run: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of the data set `key`: as a run has left it, or made now. It is there whole or not at all.

    It stays as long as a folder of a run is kept that uses it; others are removed first.

    Args:
        run: the folder of the run that uses it.
        key: a fingerprint of all that decides what `make` writes.
        make: writes the files into a folder.
    """
    folder = run.parent / DATASETS
    whole, partial = folder / key, folder / f"{key}{PARTIAL}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("finetune: another process writes or removes mapped rows; waits for it to end", flush=True)
        lock.acquire()
    try:
        # First of all, so that no run that starts now removes it.
        write_text(run / DATASET, f"{key}\n")
        _remove_unused_datasets(folder)
        if not whole.exists():
            make(partial)
            partial.replace(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    return whole


def keep_adapter_alone(folder: Path) -> None:
    """Remove a finished run's checkpoints; its adapter serves a `dvc repro` that was killed before it committed."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != FINISHED:
            shutil.rmtree(path)


def seal(folder: Path) -> None:
    """Write down the hashes of all files in `folder`: what has them was written to its end, and can be checked."""
    (folder / HASHES).unlink(missing_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    write_json(folder / HASHES, {str(path.relative_to(folder)): file_sha256(path) for path in files})


def damaged_files(folder: Path) -> list[str] | None:
    """Those that are not what `seal` saw, or are gone; None where it never came to its end there."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return [HASHES]
    found = {name: file_sha256(folder / name) for name in hashes if (folder / name).is_file()}
    return [name for name, expected in hashes.items() if found.get(name) != expected]


def remove_old_checkpoints(folder: Path, best_step: int | None) -> None:
    """Keep the newest and the best ones, by their steps: transformers goes by the clock, which may be set back."""
    newest = _newest_first(folder)
    # The second newest may have another best one, without which it could not be continued from.
    best = {best_step, *map(_best_step, newest[:NEWEST_KEPT])}
    for path in newest[NEWEST_KEPT:]:
        if _step(path) not in best:
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` to continue from; None where there is none. Later ones are removed.

    Those are cut, or damaged, which is told; or their best one is. Or their training had ended: transformers would take
    one step more from there, and the adapter would be another.
    """
    for path in _newest_first(folder):
        if _is_usable(path):
            return path
        shutil.rmtree(path)
    return None


def finished_adapter(folder: Path) -> Path | None:
    """The adapter that the run left, where it ended; None where it did not or its adapter is damaged, which is told."""
    adapter = folder / FINISHED
    return adapter if adapter.is_dir() and _is_whole(adapter) else None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _best_step(checkpoint: Path) -> int | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step: int | None = state["best_global_step"]
    return step


def _is_usable(checkpoint: Path) -> bool:
    if not _is_whole(checkpoint):
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    # Without it the run would end in another adapter. Evaluations are followed by a checkpoint of the same step.
    best = checkpoint.with_name(f"checkpoint-{state['best_global_step']}")
    if state["best_global_step"] and best != checkpoint and not _is_whole(best):
        return False
    return not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def _is_whole(folder: Path) -> bool:
    damaged = damaged_files(folder)
    if damaged:
        print(f"finetune: {folder} is not used, damaged: {listing(damaged)}", flush=True)
    return damaged == []


def _runs(root: Path) -> list[Path]:
    # Whatever else lies in a folder that the user named is not this program's.
    return [folder for folder in root.iterdir() if folder.is_dir() and RUN_NAME.fullmatch(folder.name)]


def _order(run: Path) -> int:
    try:
        return int((run / ORDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _remove_old_runs(root: Path, key: str) -> None:
    others = sorted((run for run in _runs(root) if run.name != key), key=_order)
    interrupted = [run for run in others if not (run / FINISHED).exists()]
    for run in {*others} - {*interrupted[-RUNS_KEPT:]}:
        lock = FileLock(root / f"{run.name}.lock")
        try:
            with lock.acquire(timeout=0), suppress(FileNotFoundError):  # another process may have removed it
                shutil.rmtree(run)
        except Timeout:
            continue  # in use


def _dataset(run: Path) -> str:
    try:
        return (run / DATASET).read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # or removed in this moment, as one of the old runs
        return ""


def _remove_unused_datasets(folder: Path) -> None:
    used = {_dataset(run) for run in _runs(folder.parent)}
    found = [dataset for dataset in folder.iterdir() if RUN_NAME.fullmatch(dataset.stem)]
    for dataset in found:
        if dataset.suffix == PARTIAL:
            shutil.rmtree(dataset)
    for dataset in found:
        if not dataset.suffix and dataset.name not in used:
            # Killed in the midst of it, under its own name it would be taken for a whole one.
            shutil.rmtree(dataset.replace(dataset.with_suffix(PARTIAL)))
