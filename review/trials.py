"""Trainings of the committed configuration with another seed, as temporary DVC experiments.

The workspace stays as it is. A trial is named noise-SEED. What it trained comes out of DVC's cache the next time, and
an interrupted one goes on from its last checkpoint: both lie with the main repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dvc.exceptions import NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import NoSCM
from ruamel.yaml import YAML

from review.git import git
from stages.common.base import BASE_FOLDER
from stages.common.errors import UserError, listing

LOCK = Path("dvc.lock")
PARAMS = "params.yaml"
# Where DVC makes the folders of temporary experiments, below .dvc/tmp.
TEMPORARY = Path("exps/standalone")


class Trial(NamedTuple):
    """A finished training: its commit, and dvc.lock there."""

    commit: str
    lock: dict[str, Any]


def check_committed(allowed: Path) -> None:
    """Refuse a workspace whose results are not those of its commit: a trial starts from the commit alone.

    Args:
        allowed: a file that may differ from the commit; the program writes it itself.

    Raises:
        UserError: this is no root of a pipeline's clone, tracked files are changed, a stage would read files that Git
            does not know, or stages are not up to date.
    """
    with _repository() as repo:
        read = [Path(dependency.fs_path) for stage in repo.index.stages for dependency in stage.deps]
        changes = [(state, path) for state, path in _git_changes() if path != allowed]
        changed = [str(path) for state, path in changes if state != "??"]
        if changed:
            raise UserError(
                f"these files are not as committed: {listing(changed)}. The trainings start from the last commit: run "
                "`dvc repro` and `git commit` them, or set them aside with `git stash`; then run this again."
            )
        unknown = [str(path) for _, path in changes if any(path.resolve().is_relative_to(folder) for folder in read)]
        if unknown:
            raise UserError(
                f"stages read files that no commit has: {listing(unknown)}. `git add` (or `dvc add`) and commit them, "
                "or move them away; `dvc repro`; then run this again."
            )
        stale = sorted(repo.status())
    if stale:
        raise UserError(
            f"not up to date: {listing(stale)}. Run `dvc repro` (in a fresh clone `dvc pull` first), commit what it "
            "changes, then run this again."
        )


def committed_trial() -> Trial:
    """The training whose results the current commit holds."""
    return _trial(_head())


def check_unmoved(committed: Trial, allowed: Path) -> None:
    """Refuse to go on from anything but the commit at which the program began.

    Args:
        committed: the training of that commit.
        allowed: as for `check_committed`.

    Raises:
        UserError: there are other commits or changes since.
    """
    if _head() != committed.commit:
        raise UserError(
            f"HEAD is no longer the commit {committed.commit[:7]} at which this began. Run it again: finished seeds "
            "come out of the cache where their inputs are the same."
        )
    check_committed(allowed)


def finished_trial(seed: int, committed: Trial) -> Trial | None:
    """The trial of a seed that started from the current commit; None where there is none.

    Raises:
        UserError: an experiment has its name and differs from the commit in more than the seed.
    """
    name = trial_name(seed)
    with _repository() as repo:
        found = dict(repo.experiments.ls(committed.commit).get(committed.commit, []))
    if name not in found:
        return None
    trial = _trial(found[name])
    if seed_of(trial) != seed or configuration(trial.lock) != configuration(committed.lock):
        raise UserError(
            f"the experiment {name} differs from the last commit in more than finetune.seed. Rename it (`dvc exp "
            f"rename {name} NAME`) or remove it (`dvc exp remove {name}`), then run this again."
        )
    return trial


def run_trial(seed: int) -> bool:
    """Train with a seed in a temporary folder of DVC's; whether that succeeded. What it prints goes to stderr."""
    # The base's weights are in no commit: without a copy they would be fetched again from their source.
    base = ["--copy-paths", str(BASE_FOLDER)] if BASE_FOLDER.is_dir() else []
    with tidied(trial_name(seed)):
        arguments = ["--name", trial_name(seed), "--set-param", f"finetune.seed={seed}", *base]
        return _run_dvc("exp", "run", "--temp", *arguments) == 0


def trial_name(seed: int) -> str:
    """The experiment's name."""
    return f"noise-{seed}"


def seed_of(trial: Trial) -> int:
    """The seed that it was trained with."""
    return trial.lock["stages"]["finetune"]["params"][PARAMS]["finetune"]["seed"]


def configuration(lock: dict[str, Any]) -> dict[str, Any]:
    """What decides the metrics, the seed aside.

    Args:
        lock: the content of dvc.lock.

    Returns:
        `finetune`, the block without its seed, and `inputs`: SHA-256 in hexadecimal digits over the hashes of all that
        training and inference read (splits, base, tokenizer, code) and over the blocks `task`, `infer` and `evaluate`.
    """
    stages = lock["stages"]
    block = {key: value for key, value in stages["finetune"]["params"][PARAMS]["finetune"].items() if key != "seed"}
    made = {output["path"] for output in stages["finetune"]["outs"]}
    files = {
        dependency["path"]: dependency["md5"]
        for stage in ("finetune", "infer")
        for dependency in stages[stage]["deps"]
        if dependency["path"] not in made
    }
    blocks = {name: value for stage in ("infer", "evaluate") for name, value in stages[stage]["params"][PARAMS].items()}
    described = json.dumps({"files": files, "blocks": blocks}, sort_keys=True)
    return {"finetune": block, "inputs": hashlib.sha256(described.encode()).hexdigest()}


def file_at(commit: str, path: str) -> str:
    """A file's text at a commit."""
    # With ./ it is looked for in this folder, which need not be Git's root.
    return git("show", f"{commit}:./{path}")


def _head() -> str:
    return git("rev-parse", "HEAD").strip()


def _trial(commit: str) -> Trial:
    return Trial(commit, YAML(typ="safe", pure=True).load(file_at(commit, str(LOCK))))


@contextmanager
def _repository() -> Iterator[Repo]:
    """The repository in whose root this runs, as it is now.

    Raises:
        UserError: this is no root of a DVC repository with Git and a commit.
    """
    try:
        repo = Repo()
    except NotDvcRepoError:
        raise UserError("this is no DVC repository. Run this in the root of the pipeline's clone.") from None
    with repo:
        if isinstance(repo.scm, NoSCM) or Path(repo.root_dir) != Path.cwd():
            raise UserError(
                f"{Path.cwd().name}: is not the root of a DVC repository with Git. Run this in the clone's root."
            )
        if repo.scm.no_commits or not LOCK.is_file():
            raise UserError("there is no training to repeat. `dvc repro`, `git add -A` and `git commit` first.")
        yield repo


@contextmanager
def tidied(name: str) -> Iterator[None]:
    """Remove what DVC leaves of an experiment that is interrupted at its start: its folder, and its place in a queue.

    What waits in that queue would be run by the next `dvc exp run`, whatever that is asked for.
    """
    before = set(_temporary_folders())
    try:
        yield
    finally:
        for folder in set(_temporary_folders()) - before:
            shutil.rmtree(folder, ignore_errors=True)
        with _repository() as repo:
            repo.experiments.workspace_queue.remove([name])


def _temporary_folders() -> list[Path]:
    with _repository() as repo:
        return list(Path(repo.tmp_dir, TEMPORARY).glob("tmp*"))


def _run_dvc(*arguments: str) -> int:
    """The exit code of a DVC command, which a Ctrl-C ends once and in order."""
    # In a group of its own, or the terminal would interrupt it too, in the middle of tidying up after our interrupt.
    process = subprocess.Popen([Path(sys.executable).with_name("dvc"), *arguments], stdout=2, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


def _git_changes() -> list[tuple[str, Path]]:
    """What differs from the last commit: Git's two letters, and the path from here."""
    top = git("rev-parse", "--show-toplevel").strip()
    lines = git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all").split("\0")
    return [(line[:2], Path(os.path.relpath(Path(top, line[3:])))) for line in lines if line]
