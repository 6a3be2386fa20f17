"""The adapter's predictions on each side, decided as `evaluate` decides them, and the rows that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dvc.repo import Repo
from pydantic import TypeAdapter, ValidationError

from review.differences import RowChanges, Rows, changed_rows
from review.objects import UnavailableError
from review.records import is_number
from review.revisions import ADAPTER, DECISION, IncomparableError, Side, file_of
from stages.common.errors import UserError, listing
from stages.common.measuring.answers import Texts
from stages.common.params import Params
from stages.common.schema.consistency import contradictions
from stages.common.schema.describing import describe
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import ClassificationTask, Task
from stages.common.tables import read_json, read_table
from stages.evaluate import measures_of

# What has to be equal on both sides: the numbers of one task say nothing about another.
TASK_KEYS = ("kind", "multi_label", "labels", "positive_label")
SPLIT = "data/splits/{}.parquet"
RECORDS = "data/records.parquet"

T = TypeVar("T")


class Predictions(NamedTuple):
    """One side's answers to test (`Answers`, `LabelSets` or `Texts`), decided by `rule`, and their rows."""

    answers: Any
    rule: dict[str, Any]
    rows: Rows


def same_task(before: Side, after: Side) -> Task:
    """The task that both sides are about.

    Raises:
        IncomparableError: they are about different ones.
        UserError: a block `task` is not usable.
    """
    task: Task = block(after, "task", Task)
    # Early revisions have no `multi_label`: there was nothing else than one label.
    tasks = [{"multi_label": False} | keys_of(side, "task") for side in (before, after)]
    different = [key for key in TASK_KEYS if tasks[0].get(key) != tasks[1].get(key)]
    if different:
        found = "; ".join(f"task.{key} is {tasks[0].get(key)!r}, then {tasks[1].get(key)!r}" for key in different)
        raise IncomparableError(
            f"{before.name} and {after.name} cannot be compared: they are about different tasks ({found}). Name two "
            "revisions with the same task and labels."
        )
    return task


def keys_of(side: Side, name: str) -> dict[str, Any]:
    """The keys of a block of a side's params.yaml; none where it has no such block.

    Raises:
        UserError: the block holds no keys.
    """
    keys = side.params.get(name, {})
    if not isinstance(keys, dict):
        raise UserError(f"{side.name}: in params.yaml the block {name} holds no keys. Restore it with `git checkout`.")
    return keys


def measuring(side: Side, task: Task) -> Evaluate:
    """The block `evaluate` of a side, which suits its task.

    Raises:
        UserError: it is missing, not usable, or says something against the task.
    """
    evaluate: Evaluate = block(side, "evaluate", Evaluate)
    blocks: dict[str, Any] = {"task": task, "evaluate": evaluate}
    problems = contradictions(Params.model_construct(**blocks))
    if problems:
        raise UserError(f"{side.name}: params.yaml is not usable:\n  " + "\n  ".join(problems))
    return evaluate


def block(side: Side, name: str, block_type: Any) -> Any:
    """A block of a side's params.yaml, checked.

    Raises:
        UserError: it is missing or not usable.
    """
    if name not in side.params:
        raise UserError(f"{side.name}: params.yaml has no block {name}. Name a revision whose pipeline is this one.")
    try:
        return TypeAdapter(block_type).validate_python(side.params[name])
    except ValidationError as error:
        problems = "\n  ".join(describe(name, side.params[name], error.errors()))
        raise UserError(f"{side.name}: params.yaml is not usable by this version of the code:\n  {problems}") from None


def read_predictions(repo: Repo, side: Side, task: Task, folder: Path) -> Predictions:
    """The adapter's answers to test.

    Args:
        repo: the repository.
        side: whose answers.
        task: what they are about.
        folder: for copies.

    Raises:
        UnavailableError: they, or the rule that decides, are nowhere to be had.
        UserError: a file is damaged, has no rows, or is for another task.
    """
    measures, rule = measures_of(task), {"rule": "as predicted"}
    # Every other rule takes the answers as they are.
    if isinstance(task, ClassificationTask) and (task.multi_label or task.positive_label is not None):
        rule = _read_rule(repo, side, task, folder)
    with file_of(repo, side, f"{ADAPTER}/test.parquet", folder) as path:
        answers = measures.read(path, task)
    if not answers.ids:
        raise UserError(f"{side.name}: {ADAPTER}/test.parquet has no rows to compare.")
    if rule["rule"] == "threshold" and answers.probabilities is None:
        raise UserError(
            f"{side.name}: {DECISION} has a threshold, but {ADAPTER}/test.parquet no probabilities: they are of "
            "different runs. Run `dvc repro`, or `dvc checkout` for the committed ones."
        )
    answers = measures.decide(answers, rule, task)
    if isinstance(answers, Texts):
        # Long texts are held once.
        return Predictions(answers, rule, Rows(answers.ids, answers.actual, None))
    return Predictions(answers, rule, read_rows(repo, side, "test", folder))


def read_rows(repo: Repo, side: Side, part: str, folder: Path) -> Rows:
    """Ids and labels of a part, out of the adapter's predictions, which have the rows of the split."""
    with file_of(repo, side, f"{ADAPTER}/{part}.parquet", folder) as path:
        table = read_table(path, ["id", "label"])
    return Rows(table["id"].to_pylist(), table["label"].to_pylist(), None)


def read_texts(repo: Repo, side: Side, part: str, folder: Path) -> dict[str, str]:
    """The texts of a part by id.

    Raises:
        UnavailableError: the split is nowhere to be had.
    """
    with file_of(repo, side, SPLIT.format(part), folder) as path:
        table = read_table(path, ["id", "text"])
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def row_changes(repo: Repo, sides: tuple[Side, Side], rows: tuple[Rows, Rows], part: str, folder: Path) -> RowChanges:
    """How the rows of a part differ. The splits with the texts are read only where the texts may differ.

    Args:
        repo: the repository.
        sides: both.
        rows: ids and labels on both.
        part: `test` or `validation`.
        folder: for copies.
    """
    if same_file(sides, SPLIT.format(part)) or same_file(sides, RECORDS):
        return changed_rows(*rows, texts_are_same=True)
    try:
        found = [
            one._replace(texts=read_texts(repo, side, part, folder)) for one, side in zip(rows, sides, strict=True)
        ]
    except UnavailableError:
        return changed_rows(*rows, texts_are_same=False)
    return changed_rows(found[0], found[1], texts_are_same=False)


def _read_rule(repo: Repo, side: Side, task: ClassificationTask, folder: Path) -> dict[str, Any]:
    """How the adapter's probabilities become labels.

    Raises:
        UnavailableError: models/decision.json is nowhere to be had.
        UserError: it is damaged, or its rule is for other labels.
    """
    with file_of(repo, side, DECISION, folder) as path:
        values = read_json(path)
    rule = values.get("adapter") if isinstance(values, dict) else None
    if not isinstance(rule, dict) or not _fits(rule, task):
        raise UserError(
            f"{side.name}: {DECISION} does not say how the adapter decides between {listing(task.labels)}: it is "
            "damaged, or of another run. Run `dvc repro evaluate`, or `dvc checkout` for the committed one."
        )
    return rule


def _fits(rule: dict[str, Any], task: ClassificationTask) -> bool:
    if task.multi_label:
        thresholds = rule.get("thresholds")
        return isinstance(thresholds, dict) and all(is_number(thresholds.get(label)) for label in task.labels)
    if rule.get("rule") == "threshold":
        return rule.get("positive_label") in task.labels and is_number(rule.get("threshold"))
    return rule.get("rule") in ("argmax", "answer")


def same_file(sides: tuple[Side, Side], path: str) -> bool | None:
    """Whether dvc.lock has the same hash of a file on both sides; None where a side names none."""
    before, after = (side.outputs.get(path) or side.inputs.get(path) for side in sides)
    return None if before is None or after is None else before == after
