"""One label for each text: decisions, a predictor's block of metrics.json, and data for plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.labels import INVALID
from stages.common.measuring import curves
from stages.common.measuring.answers import Answers, encode, read_answers
from stages.common.measuring.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    decision_scores,
    per_label_scores,
    probability_scores,
    two_class_scores,
)
from stages.common.measuring.ranking import ranking_scores, scores_at_recall
from stages.common.measuring.slices import Slices, label_scores, rows_selected, screening_scores
from stages.common.measuring.thresholds import label_threshold, promise
from stages.common.progress import progress
from stages.common.schema.measuring import Evaluate, RecallThreshold
from stages.common.schema.task import ClassificationTask
from stages.common.spreadsheets import neutral

HEADLINE = ("f1_macro", "macro-F1")


def read(path: Path, task: ClassificationTask) -> Answers:
    """A predictor's answers to a part."""
    return read_answers(path, task.labels)


def truth(path: Path, cells: Sequence[str], task: ClassificationTask) -> list[int]:
    """A split's labels as codes, comparable with `Answers.actual`."""
    return list(encode(path, cells, task.labels).tolist())


def positive_code(task: ClassificationTask) -> int | None:
    """With two labels, the positive one's code."""
    return None if task.positive_label is None else task.labels.index(task.positive_label)


def decision_rule(validation: Answers, task: ClassificationTask, params: Evaluate) -> dict[str, Any]:
    """How a predictor's probabilities become a label, chosen on validation alone.

    Args:
        validation: the predictor's answers to validation.
        task: the labels.
        params: the evaluate block.

    Returns:
        `rule` "answer" (as generated, without probabilities), "argmax", or with two labels "threshold": then also
        positive_label, threshold (positive from this probability on), method, where it was chosen, the positive
        label's precision, recall and f1 on validation, and, where a recall is promised, recall_promised, confidence
        and recall_lower_bound.

    Raises:
        UserError: the threshold is to be chosen on rows of which none, or too few, are positive.
    """
    if validation.probabilities is None:
        return {"rule": "answer"}
    positive = positive_code(task)
    if positive is None or params.threshold is None:
        return {"rule": "argmax"}
    is_positive, scores = validation.actual == positive, validation.probabilities[:, positive]
    rule = {
        "rule": "threshold",
        "positive_label": task.positive_label,
        "threshold": label_threshold(task.labels[positive], is_positive, scores, params.threshold),
        "method": params.threshold.method,
        "chosen_on": "params.yaml" if params.threshold.method == "fixed" else "validation",
    }
    decided = decide(validation, rule, task)
    reached = per_label_scores(confusion_matrix(decided.actual, decided.predicted, 2))
    rule |= {name: float(getattr(reached, name)[positive]) for name in ("precision", "recall", "f1")}
    found = int((is_positive & (decided.predicted == positive)).sum())
    return rule | promise(params.threshold, found, int(is_positive.sum()))


def decide(answers: Answers, rule: dict[str, Any], task: ClassificationTask) -> Answers:
    """The answers with their decisions made by `rule`."""
    if rule["rule"] != "threshold":
        return answers
    assert answers.probabilities is not None, "a threshold is chosen on probabilities"
    positive = task.labels.index(rule["positive_label"])
    above = answers.probabilities[:, positive] >= rule["threshold"]
    return answers._replace(predicted=np.where(above, positive, 1 - positive))


def score(
    answers: Answers, rule: dict[str, Any], task: ClassificationTask, params: Evaluate, slices: Slices
) -> dict[str, Any]:
    """A predictor's block of metrics.json.

    Numbers that need probabilities are left out where answers were generated; numbers that need positive and negative
    rows are left out where there are none.

    Args:
        answers: decisions made by `rule`, for at least one row.
        rule: as `decision_rule` made it.
        task: the labels.
        params: the evaluate block.
        slices: the rows of each slice; empty where the data has none.
    """
    assert params.calibration_bins is not None, "labels have calibration bins"
    matrix, positive = confusion_matrix(answers.actual, answers.predicted, len(task.labels)), positive_code(task)
    block: dict[str, Any] = {"n": len(answers.ids), **decision_scores(matrix)}
    if answers.probabilities is not None:
        block |= probability_scores(answers.actual, answers.probabilities, params.calibration_bins)
    block |= bootstrap_intervals(matrix, params.bootstrap_samples, params.seed)
    if positive is not None:
        block |= two_class_scores(matrix, positive) | {"rows_selected": rows_selected(matrix, positive)}
        if answers.probabilities is not None:
            block |= _ranking(answers.actual == positive, answers.probabilities[:, positive], params)
            block["threshold"] = rule["threshold"]
    block["per_class"] = _per_class(matrix, task.labels)
    if slices:
        block["per_slice"] = {name: _slice(answers, rows, task) for name, rows in slices.items()}
    return block


def surest_mistakes(answers: Answers, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and confidence of wrongly answered rows, the surest first.

    Confidence is the probability of the label that was decided on; NaN where answers were generated. Rows of equal
    confidence keep the order of the table.
    """
    wrong = np.flatnonzero(answers.predicted != answers.actual)
    confidence = np.full(len(wrong), math.nan)
    if answers.probabilities is not None:
        confidence = answers.probabilities[wrong, answers.predicted[wrong]]
    order = np.argsort(-confidence, kind="stable")[:most]
    return wrong[order], confidence[order]


def example_rows(answers: Answers, most: int, params: Evaluate) -> np.ndarray:
    """Rows to look at: the surest mistakes."""
    return surest_mistakes(answers, most)[0]


def predictions(answers: Answers, rows: np.ndarray, task: ClassificationTask) -> list[str]:
    """The decisions on some rows, as labels."""
    names = [*task.labels, INVALID]
    return [names[code] for code in answers.predicted[rows]]


def plot_tables(
    answers: Mapping[str, Answers], blocks: Mapping[str, Any], task: ClassificationTask, params: Evaluate
) -> curves.Tables:
    """The rows of each plot's table.

    Args:
        answers: the answers to test of each predictor that is drawn, decisions made.
        blocks: the content of metrics.json.
        task: the labels.
        params: the evaluate block.
    """
    assert params.calibration_bins is not None, "labels have calibration bins"
    adapter = answers["adapter"]
    matrix = confusion_matrix(adapter.actual, adapter.predicted, len(task.labels))
    rows, confidence = surest_mistakes(adapter, curves.LISTED_MISTAKES)
    listed = zip(predictions(adapter, rows, task), confidence, rows, strict=True)
    tables: curves.Tables = {
        "confusion": curves.confusion_rows(matrix, task.labels),
        "misclassified": [
            (neutral(adapter.ids[row]), task.labels[adapter.actual[row]], prediction, curves.rounded(sure))
            for prediction, sure, row in listed
        ],
        "per_class_f1": curves.per_class_rows(blocks, answers),
    }
    with progress(len(answers), "drawing curves", "predictor") as bar:
        for name, given in answers.items():
            for table, drawn in _curves(given, task, params.calibration_bins).items():
                tables.setdefault(table, []).extend((name, *row) for row in drawn)
            bar.update()
    return tables


def _ranking(positive: np.ndarray, scores: np.ndarray, params: Evaluate) -> dict[str, float]:
    found = ranking_scores(positive, scores)
    if isinstance(params.threshold, RecallThreshold):
        found |= scores_at_recall(positive, scores, params.threshold.recall)
    return found


def _per_class(matrix: np.ndarray, labels: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, f1 and support of each label."""
    scores = per_label_scores(matrix)
    return {
        label: {
            "precision": float(scores.precision[code]),
            "recall": float(scores.recall[code]),
            "f1": float(scores.f1[code]),
            "support": int(scores.support[code]),
        }
        for code, label in enumerate(labels)
    }


def _slice(answers: Answers, rows: np.ndarray, task: ClassificationTask) -> dict[str, float]:
    matrix = confusion_matrix(answers.actual[rows], answers.predicted[rows], len(task.labels))
    positive = positive_code(task)
    return label_scores(matrix) if positive is None else screening_scores(matrix, positive)


def _curves(answers: Answers, task: ClassificationTask, bins: int) -> curves.Tables:
    if answers.probabilities is None:
        return {}
    is_positive, scores = curves.one_against_rest(answers.actual, answers.probabilities, positive_code(task))
    precision_recall, roc = curves.ranking_rows(is_positive, scores)
    return {
        "precision_recall": precision_recall,
        "roc": roc,
        "reliability": curves.reliability_rows(answers.actual, answers.probabilities, bins),
        "coverage": curves.coverage_rows(answers.actual, answers.probabilities),
    }
