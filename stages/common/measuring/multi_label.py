"""Any number of labels for each text: decisions, a predictor's block of metrics.json, and data for plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.labels import join_labels
from stages.common.measuring import curves
from stages.common.measuring.answers import LabelSets, label_matrix, read_label_sets
from stages.common.measuring.label_sets import (
    binary_log_loss,
    bootstrap_set_intervals,
    scores_of_labels,
    set_scores,
)
from stages.common.measuring.slices import Slices
from stages.common.measuring.thresholds import label_threshold, promise
from stages.common.progress import progress
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import ClassificationTask
from stages.common.spreadsheets import neutral

HEADLINE = ("f1_macro", "macro-F1")


def read(path: Path, task: ClassificationTask) -> LabelSets:
    """A predictor's answers to a part."""
    return read_label_sets(path, task.labels)


def truth(path: Path, cells: Sequence[str], task: ClassificationTask) -> list[list[bool]]:
    """Which labels each row of a split has, comparable with `LabelSets.actual`."""
    return list(label_matrix(path, cells, task.labels).tolist())


def decision_rule(validation: LabelSets, task: ClassificationTask, params: Evaluate) -> dict[str, Any]:
    """From which probability on each label is given, chosen on validation alone.

    Args:
        validation: the predictor's answers to validation.
        task: the labels.
        params: the evaluate block.

    Returns:
        `rule` "thresholds", the threshold of each label, method, where they were chosen, and for each label its
        precision, recall and f1 on validation; where a recall is promised also recall_promised, confidence and
        recall_lower_bound, for each label by itself.

    Raises:
        UserError: a threshold is to be chosen on rows of which none, or too few, have the label.
    """
    threshold = params.threshold
    assert threshold is not None, "several labels have thresholds"
    columns = zip(task.labels, validation.actual.T, validation.probabilities.T, strict=True)
    rule: dict[str, Any] = {
        "rule": "thresholds",
        "thresholds": {label: label_threshold(label, has, scores, threshold) for label, has, scores in columns},
        "method": threshold.method,
        "chosen_on": "params.yaml" if threshold.method == "fixed" else "validation",
        "per_class": {},
    }
    decided = decide(validation, rule, task)
    scores = scores_of_labels(decided.actual, decided.predicted, decided.probabilities)
    found = (decided.actual & decided.predicted).sum(axis=0)
    for code, label in enumerate(task.labels):
        reached = {name: scores[code][name] for name in ("precision", "recall", "f1")}
        rule["per_class"][label] = reached | promise(threshold, int(found[code]), int(scores[code]["support"]))
    return rule


def decide(answers: LabelSets, rule: dict[str, Any], task: ClassificationTask) -> LabelSets:
    """The answers with every label from its threshold on."""
    thresholds = np.array([rule["thresholds"][label] for label in task.labels])
    return answers._replace(predicted=answers.probabilities >= thresholds)


def score(
    answers: LabelSets, rule: dict[str, Any], task: ClassificationTask, params: Evaluate, slices: Slices
) -> dict[str, Any]:
    """A predictor's block of metrics.json.

    Args:
        answers: decisions made by `rule`, for at least one row.
        rule: as `decision_rule` made it.
        task: the labels.
        params: the evaluate block.
        slices: the rows of each slice; empty where the data has none.
    """
    scores = scores_of_labels(answers.actual, answers.predicted, answers.probabilities)
    block: dict[str, Any] = {
        "n": len(answers.ids),
        **set_scores(answers.actual, answers.predicted),
        # A set made of thresholds is always valid; the rate keeps its place in the contract.
        "invalid_rate": 0.0,
        "log_loss": binary_log_loss(answers.actual, answers.probabilities),
        **bootstrap_set_intervals(answers.actual, answers.predicted, params.bootstrap_samples, params.seed),
        "per_class": {
            label: {**found, "threshold": rule["thresholds"][label]}
            for label, found in zip(task.labels, scores, strict=True)
        },
    }
    if slices:
        block["per_slice"] = {name: _slice(answers, rows) for name, rows in slices.items()}
    return block


def surest_mistakes(answers: LabelSets, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and confidence of rows whose set is wrong, the surest first.

    Confidence is that of the row's surest wrong decision: a label's probability where it was given, what is left to 1
    where it was not. Rows of equal confidence keep the order of the table.
    """
    decided = np.where(answers.predicted, answers.probabilities, 1 - answers.probabilities)
    confidence = np.where(answers.predicted != answers.actual, decided, -np.inf).max(axis=1)
    wrong = np.flatnonzero((answers.predicted != answers.actual).any(axis=1))
    order = wrong[np.argsort(-confidence[wrong], kind="stable")[:most]]
    return order, confidence[order]


def example_rows(answers: LabelSets, most: int, params: Evaluate) -> np.ndarray:
    """Rows to look at: the surest mistakes."""
    return surest_mistakes(answers, most)[0]


def predictions(answers: LabelSets, rows: np.ndarray, task: ClassificationTask) -> list[str]:
    """The decisions on some rows, as JSON lists."""
    return [join_labels(list(compress(task.labels, has))) for has in answers.predicted[rows]]


def plot_tables(
    answers: Mapping[str, LabelSets], blocks: Mapping[str, Any], task: ClassificationTask, params: Evaluate
) -> curves.Tables:
    """The rows of each plot's table; confusion and coverage stay empty, for they are about one label a row.

    Args:
        answers: the answers to test of each predictor that is drawn, decisions made.
        blocks: the content of metrics.json.
        task: the labels.
        params: the evaluate block.
    """
    assert params.calibration_bins is not None, "labels have calibration bins"
    adapter = answers["adapter"]
    rows, confidence = surest_mistakes(adapter, curves.LISTED_MISTAKES)
    actual = predictions(adapter._replace(predicted=adapter.actual), rows, task)
    listed = zip(rows, actual, predictions(adapter, rows, task), confidence, strict=True)
    tables: curves.Tables = {
        "misclassified": [
            (neutral(adapter.ids[row]), label, given, curves.rounded(sure)) for row, label, given, sure in listed
        ],
        "per_class_f1": curves.per_class_rows(blocks, answers),
    }
    with progress(len(answers), "drawing curves", "predictor") as bar:
        for name, given in answers.items():
            for table, drawn in _curves(given, params.calibration_bins).items():
                tables.setdefault(table, []).extend((name, *row) for row in drawn)
            bar.update()
    return tables


def _slice(answers: LabelSets, rows: np.ndarray) -> dict[str, float]:
    """As of one label for each text: the macro-average is over the labels that the slice's rows or answers have."""
    actual, predicted = answers.actual[rows], answers.predicted[rows]
    seen = (actual | predicted).any(axis=0)
    scores = set_scores(actual, predicted)
    f1 = set_scores(actual[:, seen], predicted[:, seen])["f1_macro"] if seen.any() else 0.0
    return {"n": len(rows), "accuracy": scores["accuracy"], "f1_macro": f1}


def _curves(answers: LabelSets, bins: int) -> curves.Tables:
    """Every row once for each label."""
    actual, scores = answers.actual.ravel(), answers.probabilities.ravel()
    precision_recall, roc = curves.ranking_rows(actual, scores)
    return {
        "precision_recall": precision_recall,
        "roc": roc,
        "reliability": curves.bin_rows(scores, actual, bins),
    }
