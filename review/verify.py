"""Prove a commit: `python -m review.verify [REVISION]`; without one the last commit. The workspace is not touched.

Restores all that dvc.lock names into a temporary folder and hashes it, holds the adapter's provenance against the
commit, runs `evaluate` and `report`, and predicts a random sample of rows again. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import tempfile
from pathlib import Path

from dvc.exceptions import DvcException

from review.revisions import open_repository, read_side
from review.verifying.commits import check_clean
from review.verifying.steps import Sample, steps
from stages.common.errors import UserError, run_stage

LARGEST_SEED = 2**32 - 1


def message(name: str, found: list[str]) -> str:
    """What differs, and what that means."""
    return "\n".join(
        [
            f"not verified: {name} is not what it says:",
            *(f"  {text}" for text in found),
            "If nobody meant to deceive: `dvc repro` there, then commit dvc.lock and metrics/, and `dvc push`.",
        ]
    )


def chosen_sample(options: argparse.Namespace) -> Sample | None:
    """Which rows are to be predicted again.

    Raises:
        UserError: nothing here can run a model.
    """
    if not options.model:
        return None
    if importlib.util.find_spec("torch") is None:
        raise UserError("to re-score rows takes torch, which is not here: `make setup`, or give --no-model.")
    return Sample(options.rows, options.seed)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m review.verify", description=__doc__)
    parser.add_argument("revision", nargs="?", metavar="REVISION", help="a commit, branch, tag or DVC experiment")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="of validation and of test each; default 32")
    # One that nobody knew who made the commit.
    seed = secrets.randbelow(LARGEST_SEED + 1)
    parser.add_argument("--seed", type=int, default=seed, help="of the sample; default: another each time")
    parser.add_argument("--no-model", dest="model", action="store_false", help="re-score no rows; needs no torch")
    options = parser.parse_args()
    if options.model and (options.rows < 1 or not 0 <= options.seed <= LARGEST_SEED):
        parser.error(f"--rows has to be 1 or more (--no-model scores none), --seed from 0 to {LARGEST_SEED:,}")
    return options


def main() -> None:
    """Print what was looked at, and fail where anything differs."""
    options = arguments()
    sample, found = chosen_sample(options), list[str]()
    try:
        with open_repository() as repo, tempfile.TemporaryDirectory(prefix="verify-") as folder:
            if options.revision is None:
                check_clean()
            side = read_side(repo, options.revision or "HEAD")
            for step in steps(repo, side, Path(folder).resolve(), sample):
                print(f"verify: {step.looked_at}{': NOT SO' if step.differences else ''}", flush=True)
                found += step.differences
    except UserError as error:
        if not found:
            raise
        found.append(str(error))
    except DvcException as error:
        raise UserError(f"dvc.yaml and dvc.lock of the commit could not be read: {error}") from None
    if found:
        raise UserError(message(side.title, found))
    unseen = "; whether its answers come from its adapter was not looked at (--no-model)" if sample is None else ""
    print(f"verified: {side.title}{unseen}")


if __name__ == "__main__":
    run_stage(main)
