"""What Git says about the repository in which this runs."""

from __future__ import annotations

import subprocess

from stages.common.errors import UserError

# Branches that a change is compared with; in a fresh clone of another branch only the second exists.
MAIN = ("main", "origin/main")


def git_said(*arguments: str) -> bytes | None:
    """What a command of Git prints; None where it fails."""
    result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return None if result.returncode else result.stdout


def git(*arguments: str) -> str:
    """What a command of Git prints that has no reason to fail; what it says against it goes to stderr."""
    return subprocess.run(["git", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def is_shallow() -> bool:
    """Whether this clone lacks the beginning of the history."""
    return git_said("rev-parse", "--is-shallow-repository") == b"true\n"


def merge_base() -> str:
    """The commit at which the current branch left main.

    Raises:
        UserError: there is no main, or no commit that both have.
    """
    for branch in MAIN:
        if not git_said("rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}"):
            continue
        found = git_said("merge-base", "HEAD", branch)
        if found:
            return found.decode().strip()
        way_out = (
            "This clone is shallow: `git fetch --unshallow` (actions/checkout: fetch-depth: 0) brings the history"
            if is_shallow()
            else f"Name the revision to compare with: python -m review.compare {branch}"
        )
        raise UserError(f"HEAD and {branch} have no commit in common. {way_out}.")
    raise UserError(
        f"there is no branch {' or '.join(MAIN)} to compare with. Name a revision, as in `python -m review.compare "
        "HEAD~1`, or run `git fetch origin main:main`."
    )
