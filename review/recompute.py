"""Do the committed numbers follow from the predictions? `python -m review.recompute`; seconds on a CPU.

Runs `evaluate` on the predictions that dvc.lock names, and `report` on the committed numbers, in a temporary folder;
compares metrics/*.json, metrics/evaluation/*.csv, models/decision.json and metrics/*.md. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage

from review.file_values import Difference, differences
from stages.common.errors import UserError, run_stage

PARAMS = Path("params.yaml")
# More differences than these are counted, not named.
MOST_NAMED = 20


class Plan(NamedTuple):
    """What is read and compared, by paths relative to the repository's root.

    Attributes:
        evaluate_reads: inputs of `evaluate` in DVC's care.
        report_reads: those of `report` that `evaluate` does not write.
        numbers: what `evaluate` writes into metrics/ and models/.
        rows: what it writes into data/, for people.
        texts: what `report` writes.
    """

    evaluate_reads: list[Path]
    report_reads: list[Path]
    numbers: list[Path]
    rows: list[Path]
    texts: list[Path]

    def in_cache(self) -> list[Path]:
        """What a clone has to pull before anything can be recomputed."""
        return [*self.evaluate_reads, *self.report_reads, *(path for path in self.numbers if path.parts[0] == "models")]

    def absent(self) -> list[Path]:
        """What of that is not here."""
        return [path for path in self.in_cache() if not path.exists()]


class Recomputed(NamedTuple):
    """What came of it.

    Attributes:
        differences: between the committed values and those just computed.
        notes: what could not be compared because something is not here.
        inexact: files whose values (within the tolerance) and lines are the same, but whose bytes are not.
    """

    differences: list[Difference]
    notes: list[str]
    inexact: list[Path]


def make_plan(repo: Repo) -> Plan:
    """What dvc.yaml says about the two stages.

    Raises:
        UserError: an input is here, but is not the one that dvc.lock names.
    """
    evaluate, report = (repo.stage.load_one(name=name) for name in ("evaluate", "report"))
    written = [Path(out.def_path) for out in evaluate.outs]
    inputs = {name: _data_of(stage) for name, stage in (("evaluate", evaluate), ("report", report))}
    others = [str(out) for out in inputs["evaluate"] if out.exists and out.workspace_status()]
    if others:
        raise UserError(
            f"{', '.join(others)}: not what dvc.lock names, so the committed numbers need not follow from it. "
            "`dvc checkout` or `dvc pull` restores what was committed; `dvc repro` makes numbers of what is here."
        )
    return Plan(
        evaluate_reads=[Path(out.def_path) for out in inputs["evaluate"]],
        report_reads=[Path(out.def_path) for out in inputs["report"] if Path(out.def_path) not in written],
        numbers=[path for path in written if path.parts[0] != "data"],
        rows=[path for path in written if path.parts[0] == "data"],
        texts=[Path(out.def_path) for out in report.outs],
    )


def recompute(plan: Plan, folder: Path) -> Recomputed:
    """Run both stages in `folder` and compare with the workspace, to which nothing is written.

    Args:
        plan: what to read and compare; `evaluate`'s inputs are here.
        folder: an empty folder.
    """
    copy_into(folder, [PARAMS, *plan.evaluate_reads])
    run_in(folder, "evaluate")
    notes = [f"{path} was not compared: it is not here" for path in plan.numbers if _only_in_cache(path)]
    compared = [path for path in plan.numbers if not _only_in_cache(path)]
    found = [one for path in compared for one in differences(path, path, folder / path)]
    inexact = [] if found else _other_bytes(compared, folder)
    absent = [str(path) for path in plan.report_reads if not path.exists()]
    if absent:
        notes.append(f"{', '.join(map(str, plan.texts))} were not compared: {', '.join(absent)} are not here")
    elif not found:
        # From the committed numbers, not from those just computed: a difference within the tolerance, on the edge
        # between two rounded values, would show as another text.
        copy_into(folder, [*compared, *plan.report_reads])
        run_in(folder, "report")
        found = [one for path in plan.texts for one in differences(path, path, folder / path)]
        inexact += [] if found else _other_bytes(plan.texts, folder)
    return Recomputed(found, notes, inexact)


def message(found: list[Difference]) -> str:
    """Which committed values differ, both values of each, and what to do."""
    lines = [f"  {one.place}: committed {one.committed}, recomputed {one.recomputed}" for one in found[:MOST_NAMED]]
    more = [f"  and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else []
    return "\n".join(
        [
            f"{len(found):,} committed values are not what evaluate and report make of the predictions in dvc.lock:",
            *lines,
            *more,
            # Without the rest, which this does not need, DVC would train anew or miss inputs.
            "Run `dvc pull`, then `dvc repro evaluate report`, and commit metrics/ and dvc.lock. After a manual "
            "change: `git checkout`.",
        ]
    )


def _data_of(stage: Stage) -> list[Output]:
    # The rest is Git's: code, requirements.txt, params.yaml.
    return [
        dep for dep in stage.deps
        if not isinstance(dep, ParamsDependency) and Path(dep.def_path).parts[0] in ("data", "models")
    ]  # fmt: skip


def _other_bytes(paths: list[Path], folder: Path) -> list[Path]:
    return [path for path in paths if path.read_bytes() != (folder / path).read_bytes()]


def _only_in_cache(path: Path) -> bool:
    return path.parts[0] == "models" and not path.exists()


def copy_into(folder: Path, paths: list[Path]) -> None:
    """Copy files and folders of the current folder to the same places in another one."""
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            # DVC may have linked it into its cache: copy what it leads to, writable.
            shutil.copyfile(path, target)


def run_in(folder: Path, stage: str, *arguments: str) -> None:
    """Run a stage in another folder, with the code of the current one.

    Raises:
        UserError: it failed.
    """
    result = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path.cwd()), "TQDM_DISABLE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        # Libraries warn before the message, in their own words.
        said = re.sub(r"\A.*?^error: ", "", result.stderr, flags=re.DOTALL | re.MULTILINE).strip()
        raise UserError(
            f"{stage} could not be run on what dvc.lock names: {said or f'it ended with {result.returncode}'}"
        )


def arguments() -> argparse.Namespace:
    """What the command line says: nothing."""
    return argparse.ArgumentParser(prog="python -m review.recompute", description=__doc__).parse_args()


def main() -> None:
    """Recompute, and fail where the committed values differ."""
    arguments()
    try:
        with Repo() as repo:
            plan = make_plan(repo)
    except DvcException as error:
        raise UserError(f"dvc.yaml and dvc.lock could not be read: {error}") from None
    absent = [str(path) for path in plan.evaluate_reads if not path.exists()]
    if absent:
        needed = " ".join(map(str, plan.in_cache()))
        raise UserError(
            f"{', '.join(absent)}: not here, so nothing was recomputed. Run `dvc pull {needed}`, then again."
        )
    with tempfile.TemporaryDirectory(prefix="recompute-") as folder:
        recomputed = recompute(plan, Path(folder))
    for note in recomputed.notes:
        print(f"recompute: {note}", file=sys.stderr)
    if recomputed.differences:
        raise UserError(message(recomputed.differences))
    print("recompute: the committed metrics are what evaluate makes of the predictions in dvc.lock")


if __name__ == "__main__":
    run_stage(main)
