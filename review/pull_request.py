"""All that CI does on a pull request: `python -m review.pull_request --base origin/main --output FOLDER`.

FOLDER/comment.md is what reviewers read, FOLDER/plots/index.html the plots of both commits. Exit code 1 where dvc.lock
or the committed numbers are not what they have to be, or a step could not be done that has to be.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo

from review.git import git_said, is_shallow
from review.recompute import make_plan
from stages.common.errors import UserError, run_stage
from stages.common.measuring.markdown import markdown_table
from stages.common.tables import write_text

DVC = str(Path(sys.executable).with_name("dvc"))
# Exit code of review.compare where a comparison would mean nothing: another task, or a base without results.
INCOMPARABLE = 4


class Step(NamedTuple):
    """What a step came to.

    Attributes:
        title: what was asked.
        result: the answer, in a few words.
        failed: whether it fails the review.
        said: what it printed, for those who want to know why.
        markdown: what it has to show.
    """

    title: str
    result: str
    failed: bool = False
    said: str = ""
    markdown: str = ""


def review(base: str, folder: Path, optional: bool) -> list[Step]:
    """Check, pull, recompute, compare and draw; each step also when one before it failed.

    Args:
        base: commit to compare the workspace with.
        folder: where to write.
        optional: whether predictions may be out of reach: a fork's run has no credentials for the remote.
    """
    check = _check()
    predictions, available = _pull(optional)
    recomputed = _recompute() if available else Step("The committed metrics follow from the predictions", "not checked")
    return [check, predictions, recomputed, _compare(base, folder, available), _plots(base, folder)]


def comment(base: str, steps: list[Step]) -> str:
    """The steps as Markdown: results, then what failed, then what there is to see."""
    parts = ["# Review of the pull request", f"Compared with `{base[:10]}`."]
    parts.append(markdown_table(["", ""], [[step.title, _marked(step)] for step in steps]))
    parts += [f"**{step.title}**\n\n{fenced(step.said)}" for step in steps if step.said]
    parts += [step.markdown for step in steps if step.markdown]
    return "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    """Any text as a block of code that nothing in it can end."""
    longest = max(map(len, re.findall("~+", text)), default=0)
    fence = "~" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"


def merge_base(base: str) -> str:
    """The commit where the workspace's branch left `base`; `origin/base` where this clone has no such branch.

    Raises:
        UserError: there is neither, or the clone is too shallow to hold that commit.
    """
    names = [base, f"origin/{base}"]
    name = next((name for name in names if git_said("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")), None)
    if name is None:
        branch = base.removeprefix("origin/")
        into = branch if branch == base else f"refs/remotes/{base}"
        tried = " or ".join(names if branch == base else [base])
        # A commit that lies before the beginning of this clone is no branch either.
        deeper = " This clone is shallow: `git fetch --unshallow` brings older commits." if is_shallow() else ""
        raise UserError(
            f"--base {base!r}: there is no branch {tried} here: `git fetch origin {branch}:{into}`.{deeper}"
        )
    found = git_said("merge-base", name, "HEAD")
    if found:
        return found.decode().strip()
    way_out = (
        "This clone is shallow, CI needs the whole history: `git fetch --unshallow`, or fetch-depth: 0"
        if is_shallow()
        else "Name the branch that this one came from"
    )
    raise UserError(f"--base {base!r}: has no commit in common with HEAD here. {way_out}.")


def run(command: list[str]) -> tuple[int, str]:
    """Exit status of a command, and what it printed, which is printed here too."""
    result = subprocess.run(
        command, env=os.environ | {"NO_COLOR": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    print(f"$ {' '.join(command)}\n{result.stdout}", flush=True)
    return result.returncode, result.stdout


def _check() -> Step:
    status, said = run([sys.executable, "-m", "review.check"])
    title = "`dvc.lock` belongs to code, parameters and data"
    return Step(title, "no", True, said) if status else Step(title, "yes")


def _pull(optional: bool) -> tuple[Step, bool]:
    title = "Predictions are at hand"
    try:
        with Repo() as repo:
            remote = repo.config["core"].get("remote")
            absent = make_plan(repo).absent()
    except (DvcException, UserError) as error:
        return Step(title, "no", True, str(error)), False
    if not absent:
        return Step(title, "yes"), True
    if not remote:
        return Step(title, "no: the repository has no default remote, so nothing was recomputed"), False
    status, said = run([DVC, "pull", *map(str, absent)])
    if not status:
        return Step(title, "yes"), True
    if optional:
        return Step(title, "no: this run has no access to the remote, so nothing was recomputed"), False
    return Step(title, "no: the remote refuses, or the author has yet to `dvc push`", True, said), False


def _recompute() -> Step:
    status, said = run([sys.executable, "-m", "review.recompute"])
    title = "The committed metrics follow from the predictions"
    return Step(title, "no", True, said) if status else Step(title, "yes")


def _compare(base: str, folder: Path, available: bool) -> Step:
    title, file = "Comparison", folder / "comparison.md"
    status, said = run([sys.executable, "-m", "review.compare", base, "--output", str(file)])
    if not status:
        return Step(title, "below", markdown=file.read_text(encoding="utf-8"))
    # Parameters and metrics lie in Git. As text: a template or a label may hold what Markdown takes for a cell's end.
    tables = [run([DVC, what, "diff", base[:10], "--md"]) for what in ("params", "metrics")]
    shown = "\n\n".join(fenced(table) for status, table in tables if not status and table.strip())
    shown = f"### Parameters and metrics, without intervals\n\n{shown or 'No difference.'}"
    if status == INCOMPARABLE:
        # No fault of the change: otherwise none that adds a label could ever pass.
        return Step(title, "not comparable; the plain numbers are below", False, said, shown)
    return Step(title, "not possible; the plain numbers are below", available, said, shown)


def _plots(base: str, folder: Path) -> Step:
    status, said = run([DVC, "plots", "diff", base, "--out", str(folder / "plots")])
    return Step("Plots", "failed", True, said) if status else Step("Plots", "in the artifact, `plots/index.html`")


def _marked(step: Step) -> str:
    return f"**{step.result}**" if step.failed else step.result


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m review.pull_request", description=__doc__)
    parser.add_argument(
        "--base", default="main", metavar="REV",
        help="the branch that is to be merged into, here or of origin; default main",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="made where it does not exist")
    parser.add_argument(
        "--predictions", choices=["required", "optional"], default="required",
        help="optional: a remote that refuses is no failure, as in a fork's run",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Write FOLDER/comment.md, and fail where a step failed."""
    options = arguments()
    base = merge_base(options.base)
    options.output.mkdir(parents=True, exist_ok=True)
    steps = review(base, options.output, options.predictions == "optional")
    write_text(options.output / "comment.md", comment(base, steps))
    failed = [step.title for step in steps if step.failed]
    if failed:
        raise UserError(f"{options.output / 'comment.md'}: not as it has to be: {'; '.join(failed)}")
    print(f"pull_request: {options.output / 'comment.md'}")


if __name__ == "__main__":
    run_stage(main)
