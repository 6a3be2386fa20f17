"""The two sides of a comparison: what a commit, or the working tree, says about itself, and its predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import NoSCM, RevError, resolve_rev

from review.git import git_said, is_shallow
from review.objects import UnavailableError, output_content
from review.records import locked, read_metrics, read_noise, read_yaml
from stages.common.errors import UserError

WORKING_TREE = "the working tree"
METRICS = {"test": "metrics/metrics.json", "validation": "metrics/validation.json"}
NOISE_FLOOR = "metrics/noise.json"
ADAPTER = "data/predictions/adapter"
DECISION = "models/decision.json"


class NoResultsError(UserError):
    """A revision, or the working tree, has no results yet."""


class IncomparableError(UserError):
    """Both sides are as they should be, but cannot be compared with each other."""


class Side(NamedTuple):
    """A commit or the working tree.

    Attributes:
        name: as it was asked for.
        commit: 40 hex digits; None for the working tree.
        params: the content of params.yaml.
        lock: the content of dvc.lock.
        outputs: hash of each output in dvc.lock, by path.
        inputs: hash of each dependency in dvc.lock, by path.
        locked: blocks of params.yaml with which dvc.lock says that the stages ran.
        metrics: blocks of the metrics files, by part; empty where there is no file.
        foreign: metrics files that are not those of dvc.lock, or absent.
        noise: the content of metrics/noise.json; empty where there is none.
    """

    name: str
    commit: str | None
    params: dict[str, Any]
    lock: dict[str, Any]
    outputs: dict[str, str]
    inputs: dict[str, str]
    locked: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    foreign: list[str]
    noise: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name with the beginning of its commit."""
        if self.commit is None:
            return self.name
        short = self.commit[:7]
        return short if self.commit.startswith(self.name) else f"{self.name} ({short})"


def open_repository() -> Repo:
    """The repository in whose root this runs.

    Raises:
        UserError: this is no root of a DVC repository with Git.
    """
    try:
        repo = Repo()
    except DvcException:
        raise UserError("this is no DVC repository. Run this in the root of the pipeline's clone.") from None
    if isinstance(repo.scm, NoSCM) or Path(repo.root_dir).resolve() != Path.cwd().resolve():
        raise UserError("this is not the root of a DVC repository with Git. Run this in the root of the clone.")
    return repo


def read_side(repo: Repo, name: str | None) -> Side:
    """What Git knows about a commit, or the files of the working tree say; no object of DVC is read.

    Args:
        repo: the repository.
        name: a commit, branch, tag or DVC experiment; None for the working tree.

    Raises:
        NoResultsError: params.yaml, dvc.lock or the stages in it are missing.
        UserError: there is no such revision, or its files cannot be read.
    """
    commit = None if name is None else _commit(repo, name)
    name = WORKING_TREE if name is None else name
    params = read_yaml(name, "params.yaml", _content(commit, "params.yaml"))
    lock = read_yaml(name, "dvc.lock", _content(commit, "dvc.lock"))
    if params is None or lock is None or not lock.get("stages"):
        missing = "params.yaml" if params is None else "dvc.lock" if lock is None else "stage in dvc.lock"
        way_out = "Run `dvc repro` first" if commit is None else "Name a revision whose results were committed"
        raise NoResultsError(f"{name}: has no {missing}, so there are no results to compare. {way_out}.")
    outputs, inputs, parameters = locked(name, lock)
    files = {path: _content(commit, path) for path in METRICS.values()}
    return Side(
        name=name,
        commit=commit,
        params=params,
        lock=lock,
        outputs=outputs,
        inputs=inputs,
        locked=parameters,
        metrics={part: read_metrics(name, path, files[path]) for part, path in METRICS.items()},
        foreign=[path for path, content in files.items() if path in outputs and _md5(content) != outputs[path]],
        noise=read_noise(name, NOISE_FLOOR, _content(commit, NOISE_FLOOR)),
    )


@contextmanager
def file_of(repo: Repo, side: Side, path: str, folder: Path) -> Iterator[Path]:
    """A file of DVC's on one side, to be read where the block is; what a reader says about it names the side.

    Args:
        repo: the repository.
        side: whose file.
        path: as dvc.yaml writes it.
        folder: for copies.

    Raises:
        UnavailableError: it is neither in the working tree, where that is the side, nor in the cache or the remote.
    """
    if side.commit is None and Path(path).is_file():
        yield Path(path)
        return
    copy = folder / (side.commit or "working-tree") / path
    if not copy.is_file():
        try:
            content = output_content(repo, side.outputs, path)
        except UnavailableError as error:
            raise UnavailableError(f"{side.name}: {error}") from None
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    try:
        yield copy
    except UserError as error:
        raise UserError(str(error).replace(str(copy), f"{side.name}: {path}")) from None


def stale_outputs(repo: Repo, paths: list[str]) -> list[str]:
    """Those of the working tree's outputs that are there, and are not what dvc.lock names."""
    stale = []
    for path in paths:
        try:
            [output] = repo.find_outs_by_path(path)
            if Path(path).exists() and output.workspace_status():
                stale.append(path)
        except DvcException:
            continue
    return stale


def _commit(repo: Repo, name: str) -> str:
    if not name.strip():
        raise UserError(
            f"{name!r}: is no revision. Give a commit, branch, tag or experiment, or leave it out: an unset variable?"
        )
    try:
        return resolve_rev(repo.scm, name)
    except RevError:
        command, brings = (
            ("git fetch --unshallow", "the history") if is_shallow() else ("git fetch", "others' branches")
        )
        raise UserError(
            f"{name}: is no commit, branch, tag or experiment of this clone; `{command}` brings {brings}."
        ) from None


def _md5(content: bytes | None) -> str | None:
    return None if content is None else hashlib.md5(content, usedforsecurity=False).hexdigest()


def _content(commit: str | None, path: str) -> bytes | None:
    """A file in Git (or the working tree); None where it is not there."""
    if commit is None:
        return Path(path).read_bytes() if Path(path).is_file() else None
    # With ./ it is looked for in this folder, which need not be Git's root.
    return git_said("show", f"{commit}:./{path}")
