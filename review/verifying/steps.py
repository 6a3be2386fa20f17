"""What `review.verify` looks at in a commit, one thing after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dvc.repo import Repo, lock_repo

from review.check import stages_that_would_run
from review.file_values import Difference, differences
from review.recompute import MOST_NAMED, Plan, make_plan, recompute
from review.revisions import DECISION, METRICS, Side
from review.verifying.answers import EXACT, ROUNDED, Bounds, compare_answers
from review.verifying.commits import open_commit, unpack
from review.verifying.provenance import misfits, other_digests, read_provenance
from review.verifying.rescoring import PREDICTIONS, PREDICTORS, SPLITS, rescore, sampled_rows, take_rows
from review.verifying.restoring import restore
from stages.common.base import BASE_FOLDER, BASE_PIN
from stages.common.errors import UserError
from stages.common.tables import read_json, table_metadata


class Sample(NamedTuple):
    """How many rows of each part are predicted again, and the seed that chooses them."""

    rows: int
    seed: int


class Step(NamedTuple):
    """What was looked at, in words, and what is not as it has to be."""

    looked_at: str
    differences: list[str]


def steps(user: Repo, side: Side, folder: Path, sample: Sample | None) -> Iterator[Step]:
    """Look at all that a commit says.

    Args:
        user: the clone in whose root this runs.
        side: the commit.
        folder: an empty one.
        sample: None: no row is predicted again.

    Raises:
        UserError: objects are damaged or nowhere to be had, or the model cannot be run.
    """
    assert side.commit is not None
    here, root = Path.cwd(), unpack(side.commit, folder)
    with open_commit(user, root, folder / "site") as commit:
        restored = restore(user, commit, folder / "fetched")
        yield Step(
            f"{restored.objects:,} objects, {restored.size:,} bytes, have the hashes of dvc.lock "
            f"({restored.fetched:,} came from the remote)", [],
        )  # fmt: skip
        with chdir(root):
            yield lock_step(commit)
            yield provenance_step(side, folder / "code")
            yield numbers_step(commit, folder / "numbers")
            if sample is not None:
                yield from row_steps(sample, folder / "rows", _base_of(here))


def lock_step(commit: Repo) -> Step:
    """Whether dvc.lock belongs to the files in Git and to each other's stages."""
    with lock_repo(commit):
        stages = stages_that_would_run(commit)
    found = [f"{reason} ({one.stage})" for one in stages for reason in one.reasons]
    return Step("dvc.lock belongs to code, parameters, data and metrics", list(dict.fromkeys(found)))


def provenance_step(side: Side, folder: Path) -> Step:
    """Whether the adapter was made of what the commit holds, as far as it says."""
    looked_at = "the adapter's provenance has the commit's base, data, code, parameters, prompt and tokenizer"
    folder.mkdir()
    try:
        return Step(looked_at, [*misfits(side.locked), *other_digests(folder)])
    except FileNotFoundError as error:
        return Step(looked_at, [f"{error.filename}: the commit has no such file"])
    except UserError as error:
        return Step(looked_at, [str(error)])


def numbers_step(commit: Repo, folder: Path) -> Step:
    """Whether evaluate and report give what is committed."""
    folder.mkdir()
    try:
        plan = make_plan(commit)
        found = recompute(plan, folder)
    except UserError as error:
        return Step("evaluate and report", [str(error)])
    # What no stage writes nothing would compare.
    unmade = [name for name in (*METRICS.values(), DECISION) if Path(name) not in plan.numbers]
    exact = ", ".join(str(path) for path in [*plan.numbers, *plan.texts] if path not in found.inexact)
    inexact = f"; {', '.join(map(str, found.inexact))} but for last digits or ends of lines" if found.inexact else ""
    others = [f"{name}: evaluate does not write it, by dvc.yaml" for name in unmade]
    others += _named(found.differences) + _for_people(plan, folder)
    return Step(f"evaluate and report give, byte for byte, {exact}{inexact}", others)


def row_steps(sample: Sample, folder: Path, base: Path | None) -> Iterator[Step]:
    """Whether base and adapter answer a sample of rows as is committed; a step for each."""
    folder.mkdir()
    rows, bounds = sampled_rows(sample.rows, sample.seed), _bounds()
    several = table_metadata(SPLITS["test"], "prompt_format")["kind"] == "multi_label"
    counts = " and ".join(f"{len(chosen):,} {part} rows" for part, chosen in rows.items())
    looked_at = f"{counts} (--seed {sample.seed}) re-scored with the"
    try:
        rescore(rows, folder, base)
    except UserError as error:
        raise UserError(f"no row could be re-scored; --no-model verifies everything else. {error}") from None
    for name in PREDICTORS:
        farthest, found = 0.0, list[str]()
        for part, chosen in rows.items():
            path = Path(PREDICTIONS.format(name, part))
            committed, again = take_rows(path, chosen), take_rows(folder / path, np.arange(len(chosen)))
            compared = compare_answers(committed, again, bounds, several)
            farthest = max(farthest, compared.farthest)
            found += [f"{path}: {text}" for text in compared.differences]
        yield Step(
            f"{looked_at} {name}: the same decisions, scores at most {farthest:.2g} apart ({bounds.probability:g} may "
            "be rounding)", found,
        )  # fmt: skip


def _named(found: list[Difference]) -> list[str]:
    named = [f"{one.place}: committed {one.committed}, recomputed {one.recomputed}" for one in found[:MOST_NAMED]]
    return [*named, f"and {len(found) - MOST_NAMED:,} more values"] if len(found) > MOST_NAMED else named


def _for_people(plan: Plan, folder: Path) -> list[str]:
    """What `evaluate` writes into data/ for people, where it is another one."""
    tables = [path for path in plan.rows if path.suffix == ".csv"]
    files = [path for path in plan.rows if path not in tables]
    return _named([one for path in tables for one in differences(path, path, folder / path)]) + [
        f"{path} is not what evaluate writes" for path in files if path.read_bytes() != (folder / path).read_bytes()
    ]


def _base_of(clone: Path) -> Path | None:
    """The base in a clone's workspace, if it is the commit's; whoever loads it hashes it."""
    pin = clone / BASE_PIN
    is_same = pin.is_file() and read_json(pin)["files"] == read_json(BASE_PIN)["files"]
    return clone / BASE_FOLDER if is_same and (clone / BASE_FOLDER).is_dir() else None


def _bounds() -> Bounds:
    """For this machine's precision, and for that in which the adapter was trained: who trains also predicts."""
    hardware = read_provenance().get("hardware")
    there = isinstance(hardware, dict) and hardware.get("compute_dtype") == "float32"
    return EXACT if there and _computes_in_float32() else ROUNDED


def _computes_in_float32() -> bool:
    from torch import cuda, float32

    if not cuda.is_available():
        return True
    from stages.common.model import compute_dtype, machine_device  # 6 s

    return compute_dtype(machine_device()) == float32
