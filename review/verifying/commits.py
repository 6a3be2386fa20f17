"""A commit as files in a folder of its own, so that nothing that is done with it touches the workspace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from dvc.repo import Repo

from review.git import git
from stages.common.errors import UserError, listing


def check_clean() -> None:
    """Refuse a workspace whose tracked files are not those of its commit: whoever names none may mean the files.

    Raises:
        UserError: some differ.
    """
    lines = git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=no").split("\0")
    changed = [line[3:] for line in lines if line]
    if changed:
        raise UserError(
            f"these files are not as committed: {listing(changed)}. What can be proved is a commit: `git commit` "
            "them first, or leave them aside and name the commit: `python -m review.verify HEAD`."
        )


def unpack(commit: str, folder: Path) -> Path:
    """Write all files of a commit into an empty folder; Git's own index and list of worktrees stay as they are.

    Returns:
        Where in it the pipeline lies: its root need not be Git's.
    """
    tree = folder / "commit"
    environment = os.environ | {"GIT_INDEX_FILE": str(folder / "index")}
    top, prefix = git("rev-parse", "--show-toplevel").strip(), git("rev-parse", "--show-prefix").strip()
    for command in (["read-tree", commit], ["checkout-index", "--all", f"--prefix={tree}/"]):
        subprocess.run(["git", *command], cwd=top, env=environment, check=True)
    return tree / prefix


def open_commit(user: Repo, root: Path, folder: Path) -> Repo:
    """The unpacked commit as DVC sees it, with the cache of the user's clone.

    Args:
        user: the clone.
        root: of the pipeline, as `unpack` gives it.
        folder: for what DVC remembers about files.
    """
    # A commit says nothing about where this machine has its cache.
    settings = {"core": {"no_scm": True, "site_cache_dir": str(folder)}, "cache": {"dir": user.cache.local_cache_dir}}
    (root / ".dvc").mkdir(exist_ok=True)
    return Repo(str(root), config=settings)
