"""From two sides to the result of their comparison: one dictionary that JSON can hold, and that pages are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from dvc.repo import Repo

from review import label_sets, labels, texts
from review.cautions import caution_about_metrics, caution_about_noise, caution_about_texts, cautions_about
from review.changes import Comparison
from review.differences import RowChanges, changed_parameters, moved_baselines, take
from review.entries import (
    Entry,
    class_entries,
    flip_entry,
    metric_entries,
    row_entry,
    threshold_entry,
    unpaired_classes,
    unpaired_entries,
)
from review.headline import headline, unjudged
from review.objects import UnavailableError
from review.predictions import (
    SPLIT,
    Predictions,
    keys_of,
    measuring,
    read_predictions,
    read_rows,
    read_texts,
    row_changes,
    same_file,
    same_task,
)
from review.revisions import ADAPTER, DECISION, METRICS, Side, stale_outputs
from review.verdicts import SAME, UNKNOWN, WITHHELD
from stages.common.measuring import generated_texts, multi_label, single_label
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import GenerationTask, Task
from stages.evaluate import measures_of

# With a smaller share of the rows in common, what is found on them says little about either test set.
LEAST_COMMON_SHARE = 0.5
KINDS = {single_label: labels, multi_label: label_sets, generated_texts: texts}


class Question(NamedTuple):
    """What is compared, and what it is compared with.

    Attributes:
        repo: the repository.
        sides: before and after.
        task: the same on both.
        evaluate: the second side's block, which decides how both are measured.
        noise: the content of metrics/noise.json, or None.
        folder: for copies of files.
    """

    repo: Repo
    sides: tuple[Side, Side]
    task: Task
    evaluate: Evaluate
    noise: Entry | None
    folder: Path

    @property
    def show_labels(self) -> bool:
        """Whether labels may be shown: where answers are texts, they are texts of the data."""
        return not isinstance(self.task, GenerationTask) or self.evaluate.publish_texts


def compare_sides(repo: Repo, before: Side, after: Side, folder: Path) -> Entry:
    """All that there is to say about a change; docs/review.md describes the keys.

    Args:
        repo: the repository.
        before: the first side.
        after: the second.
        folder: for copies of files.

    Raises:
        IncomparableError: the sides are about different tasks.
        UserError: a file is not usable.
    """
    sides, task = (before, after), same_task(before, after)
    question = Question(repo, sides, task, measuring(after, task), after.noise or before.noise or None, folder)
    result: Entry = {
        "before": {"name": before.name, "title": before.title, "commit": before.commit},
        "after": {"name": after.name, "title": after.title, "commit": after.commit},
        "verdict": {},
        "cautions": [*cautions_about(repo, before), *cautions_about(repo, after)],
        "parameters": _plain(changed_parameters(before.params, after.params)),
        "same_split": {part: same_file(sides, SPLIT.format(part)) for part in METRICS},
        "data": {"test": None, "validation": None},
        "metrics": {},
        "own_rows": {},
        "noise": None,
        "per_class": {},
        "flipped": None,
        "baselines": moved_baselines(before.metrics["test"], after.metrics["test"]),
        "resamples": None,
    }
    if question.noise is not None:
        result["noise"] = {"seeds": question.noise["seeds"]}
        result["cautions"] += caution_about_noise(question.noise, sides)
    try:
        predictions = (read_predictions(repo, before, task, folder), read_predictions(repo, after, task, folder))
    except UnavailableError as error:
        answers = _without_predictions(question, error)
    else:
        answers = _with_predictions(question, predictions)
    return result | answers | {"cautions": result["cautions"] + answers["cautions"]}


def _plain(values: Any) -> Any:
    """The same as JSON can hold it: numbers that are not finite become texts."""
    return json.loads(json.dumps(values), parse_constant=str)


def _with_predictions(question: Question, predictions: tuple[Predictions, Predictions]) -> Entry:
    rows = row_changes(
        question.repo, question.sides, (predictions[0].rows, predictions[1].rows), "test", question.folder
    )
    validation, said = _validation(question)
    data = {"test": row_entry(rows, question.show_labels), "validation": validation}
    cautions = said + caution_about_texts(rows)
    if not len(rows.kept[0]):
        where = "no test row of one side is in the other's test set with the same label and text"
        return _of_metrics_files(question, WITHHELD, where, cautions) | {"data": data}
    aligned = [take(one.answers, kept) for one, kept in zip(predictions, rows.kept, strict=True)]
    comparison: Comparison = KINDS[measures_of(question.task)].compare(*aligned, question.task, question.evaluate)
    own, more = _own_rows(question, predictions, rows, comparison)
    shown, refused = _texts_to_show(question)
    withheld: set[str] | None = set()
    if len(rows.kept[0]) < LEAST_COMMON_SHARE * max(rows.before, rows.after):
        withheld = None
    elif isinstance(question.task, GenerationTask) and not texts.same_tokens(*aligned):
        withheld = {"perplexity"}
        more.append("perplexity does not compare: the references were cut into other tokens (tokenizer or budget).")
    metrics = metric_entries(comparison, question.noise, withheld) | threshold_entry(predictions)
    key, title = measures_of(question.task).HEADLINE
    flips = comparison.flips
    unlike = None if comparison.same else len(flips.fixed) + len(flips.broken) + flips.still_wrong
    return {
        "verdict": {
            "result": metrics[key]["verdict"],
            "metric": key,
            "text": headline(metrics, key, title, row_entry(rows, False), unlike),
        },
        "cautions": cautions + more + refused,
        "data": data,
        "metrics": metrics,
        "own_rows": own,
        "per_class": class_entries(comparison),
        "flipped": flip_entry(flips, predictions, rows, shown),
        "resamples": comparison.resamples,
    }


def _without_predictions(question: Question, error: UnavailableError) -> Entry:
    """What Git alone knows; if dvc.lock has the same predictions on both sides, that nothing changed."""
    before, after = question.sides
    stale = [side.name for side in question.sides if side.commit is None and stale_outputs(question.repo, [ADAPTER])]
    alike = ADAPTER in before.outputs and all(
        before.outputs.get(path) == after.outputs.get(path) for path in (ADAPTER, DECISION)
    )
    if alike and not stale:
        return _of_metrics_files(question, SAME, "", [])
    return _of_metrics_files(question, UNKNOWN, str(error), [])


def _of_metrics_files(question: Question, said: str, reason: str, cautions: list[str]) -> Entry:
    """The numbers of both metrics files, which need no common row and prove nothing."""
    before, after = (side.metrics["test"].get("adapter", {}) for side in question.sides)
    other_split = same_file(question.sides, SPLIT.format("test")) is False
    return {
        "verdict": {
            "result": said,
            "metric": measures_of(question.task).HEADLINE[0],
            "text": unjudged(said, reason, bool(before and after), other_split),
        },
        "cautions": cautions,
        "metrics": unpaired_entries(before, after, said),
        "per_class": unpaired_classes(before, after),
    }


def _own_rows(
    question: Question, predictions: tuple[Predictions, Predictions], rows: RowChanges, comparison: Comparison
) -> tuple[Entry, list[str]]:
    """Each side's metrics on all of its own rows, where these differ, and whether its metrics.json says the same."""
    if rows.same:
        own = [
            {name: getattr(change, end) for name, change in comparison.metrics.items()} for end in ("before", "after")
        ]
    else:
        values = KINDS[measures_of(question.task)].metric_values
        own = [values(one.answers, question.task, question.evaluate) for one in predictions]
    cautions = [
        caution
        for side, found in zip(question.sides, own, strict=True)
        for caution in caution_about_metrics(side, found, _measured_otherwise(side, question.evaluate))
    ]
    shown = {} if rows.same else {name: [own[0][name], own[1][name]] for name in own[0] if name in own[1]}
    return shown, cautions


def _measured_otherwise(side: Side, evaluate: Evaluate) -> set[str]:
    """Metrics that a side's own block `evaluate` defines in another way than the one that is used here."""
    theirs, ours = keys_of(side, "evaluate"), evaluate.model_dump()
    found = {"ece"} if theirs.get("calibration_bins") != ours["calibration_bins"] else set()
    if theirs.get("threshold") != ours["threshold"]:
        found |= {"wss_at_recall", "precision_at_recall"}
    return found


def _validation(question: Question) -> tuple[Entry | None, list[str]]:
    """How the rows of validation differ; None where they are the same, or not known, which is then said."""
    if same_file(question.sides, SPLIT.format("validation")):
        return None, []
    try:
        before, after = (read_rows(question.repo, side, "validation", question.folder) for side in question.sides)
    except UnavailableError as error:
        return None, [f"whether the rows of validation changed is not known: {error}."]
    rows = row_changes(question.repo, question.sides, (before, after), "validation", question.folder)
    return row_entry(rows, question.show_labels), []


def _texts_to_show(question: Question) -> tuple[dict[str, str] | None, list[str]]:
    """The second side's texts, where its evaluate.publish_texts allows that they are shown."""
    if not question.evaluate.publish_texts:
        return None, []
    try:
        return read_texts(question.repo, question.sides[1], "test", question.folder), []
    except UnavailableError as error:
        return None, [f"texts are not shown: {error}."]
