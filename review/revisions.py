"""The two sides of a comparison: what a commit, or the working tree, says about itself, and its predictions."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import NoSCM, RevError, resolve_rev
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from review.objects import UnavailableError, output_content
from stages.common.errors import UserError

WORKING_TREE = "the working tree"
METRICS = {"test": "metrics/metrics.json", "validation": "metrics/validation.json"}
NOISE_FLOOR = "metrics/noise.json"
ADAPTER = "data/predictions/adapter"
DECISION = "models/decision.json"
# Branches that a change is compared with; in a fresh clone of another branch only the second exists.
MAIN = ("main", "origin/main")


class Side(NamedTuple):
    """A commit or the working tree.

    Attributes:
        name: as it was asked for.
        commit: 40 hex digits; None for the working tree.
        params: the content of params.yaml.
        outputs: hash of each output in dvc.lock, by path.
        inputs: hash of each dependency in dvc.lock, by path.
        locked: blocks of params.yaml with which dvc.lock says that the stages ran.
        metrics: blocks of the metrics files, by part; empty where there is no file.
        noise: the content of metrics/noise.json; empty where there is none.
    """

    name: str
    commit: str | None
    params: dict[str, Any]
    outputs: dict[str, str]
    inputs: dict[str, str]
    locked: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
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


def merge_base() -> str:
    """The commit at which the current branch left main.

    Raises:
        UserError: there is no main, or no commit that both have.
    """
    for branch in MAIN:
        if not _git("rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}"):
            continue
        found = _git("merge-base", "HEAD", branch)
        if found:
            return found.decode().strip()
        shallow = _git("rev-parse", "--is-shallow-repository") == b"true\n"
        way_out = (
            "This clone is shallow: `git fetch --unshallow` (actions/checkout: fetch-depth: 0) brings the history"
            if shallow
            else f"Name the revision to compare with: python -m review.compare {branch}"
        )
        raise UserError(f"HEAD and {branch} have no commit in common. {way_out}.")
    raise UserError(
        f"there is no branch {' or '.join(MAIN)} to compare with. Name a revision, as in `python -m review.compare "
        "HEAD~1`, or run `git fetch origin main:main`."
    )


def read_side(repo: Repo, name: str | None) -> Side:
    """What Git knows about a commit, or the files of the working tree say; no object of DVC is read.

    Args:
        repo: the repository.
        name: a commit, branch, tag or DVC experiment; None for the working tree.

    Raises:
        UserError: there is no such revision, or it has no results, or its files cannot be read.
    """
    commit = None if name is None else _commit(repo, name)
    name = WORKING_TREE if name is None else name
    params = _yaml(name, "params.yaml", _content(commit, "params.yaml"))
    lock = _yaml(name, "dvc.lock", _content(commit, "dvc.lock"))
    if params is None or lock is None:
        missing = "params.yaml" if params is None else "dvc.lock"
        way_out = "Run `dvc repro` first" if commit is None else "Name a revision whose results were committed"
        raise UserError(f"{name}: has no {missing}, so there are no results to compare. {way_out}.")
    stages = list(lock.get("stages", {}).values())
    return Side(
        name=name,
        commit=commit,
        params=params,
        outputs={entry["path"]: entry["md5"] for stage in stages for entry in stage.get("outs", []) if "md5" in entry},
        inputs={entry["path"]: entry["md5"] for stage in stages for entry in stage.get("deps", []) if "md5" in entry},
        locked={
            block: value for stage in stages for block, value in stage.get("params", {}).get("params.yaml", {}).items()
        },
        metrics={part: _json(name, path, _content(commit, path)) for part, path in METRICS.items()},
        noise=_noise(name, commit),
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


def _noise(name: str, commit: str | None) -> dict[str, Any]:
    noise = _json(name, NOISE_FLOOR, _content(commit, NOISE_FLOOR))
    missing = [key for key in ("seeds", "metrics", "parameters") if key not in noise]
    if noise and (missing or "finetune" not in noise["parameters"]):
        raise UserError(
            f"{name}: {NOISE_FLOOR} lacks {', '.join(missing) or 'parameters.finetune'}. `python -m review.noise` "
            "writes it again."
        )
    return noise


def _commit(repo: Repo, name: str) -> str:
    try:
        return resolve_rev(repo.scm, name)
    except RevError:
        shallow = _git("rev-parse", "--is-shallow-repository") == b"true\n"
        way_out = "`git fetch --unshallow` brings the history" if shallow else "`git fetch` brings others' branches"
        raise UserError(f"{name}: is no commit, branch, tag or experiment of this clone; {way_out}.") from None


def _content(commit: str | None, path: str) -> bytes | None:
    """A file in Git (or the working tree); None where it is not there."""
    if commit is None:
        return Path(path).read_bytes() if Path(path).is_file() else None
    # With ./ it is looked for in this folder, which need not be Git's root.
    return _git("show", f"{commit}:./{path}")


def _git(*arguments: str) -> bytes | None:
    result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return None if result.returncode else result.stdout


def _yaml(name: str, path: str, content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        values = YAML(typ="safe", pure=True).load(content.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: {path} is not valid YAML in UTF-8 (an open merge conflict?): {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: {path} holds no keys. Restore it with `git checkout`.")
    return values


def _json(name: str, path: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name}: {path} is not valid JSON (an open merge conflict?): {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: {path} holds no blocks. Restore it, or run `dvc repro evaluate`.")
    return values
