"""Two predictions of one label for each text: metrics with paired intervals and tests, labels, flipped rows."""

from __future__ import annotations

import numpy as np

from review.changes import Change, ClassChange, Comparison, Flips
from review.decisions import joint_cells, permuted_decisions, resampled_decisions
from review.probabilities import loss_p_values, resampled_probabilities
from review.statistics import mcnemar_exact, percentile_interval, resample_count
from stages.common.labels import INVALID
from stages.common.measuring.answers import Answers
from stages.common.measuring.metrics import (
    confusion_matrix,
    decision_scores,
    per_label_scores,
    probability_scores,
    two_class_scores,
)
from stages.common.measuring.ranking import ranking_scores, scores_at_recall
from stages.common.measuring.single_label import positive_code
from stages.common.measuring.slices import rows_selected
from stages.common.schema.measuring import Evaluate, RecallThreshold
from stages.common.schema.task import ClassificationTask

RATES = ("precision", "recall", "specificity")


def metric_values(answers: Answers, task: ClassificationTask, evaluate: Evaluate) -> dict[str, float]:
    """The metrics of `evaluate`, by its own functions, without their intervals."""
    assert evaluate.calibration_bins is not None, "labels have calibration bins"
    matrix, positive = confusion_matrix(answers.actual, answers.predicted, len(task.labels)), positive_code(task)
    values: dict[str, float] = decision_scores(matrix)
    if positive is not None:
        values |= {name: two_class_scores(matrix, positive)[name] for name in RATES}
        values["rows_selected"] = rows_selected(matrix, positive)
    if answers.probabilities is not None:
        values |= probability_scores(answers.actual, answers.probabilities, evaluate.calibration_bins)
        if positive is not None:
            is_positive, scores = answers.actual == positive, answers.probabilities[:, positive]
            values |= ranking_scores(is_positive, scores)
            if isinstance(evaluate.threshold, RecallThreshold):
                values |= scores_at_recall(is_positive, scores, evaluate.threshold.recall)
    return values


def compare(before: Answers, after: Answers, task: ClassificationTask, evaluate: Evaluate) -> Comparison:
    """Compare decided answers to the same n >= 1 rows.

    Args:
        before: of the first side.
        after: of the second, for the same ids and labels in the same order.
        task: the labels.
        evaluate: number of resamples, seed, bins.
    """
    cells, k = joint_cells(before, after, len(task.labels)), len(task.labels)
    samples = resample_count(evaluate.bootstrap_samples, len(before.ids))
    differences = resampled_decisions(cells, task, samples, evaluate.seed)
    differences |= resampled_probabilities(before, after, task, evaluate, samples)
    right, was_right = after.predicted == after.actual, before.predicted == before.actual
    fixed, broken = right & ~was_right, was_right & ~right
    p_values, p_of_labels = permuted_decisions(cells, task, evaluate.seed)
    p_values |= loss_p_values(before, after, evaluate.seed)
    tests = dict.fromkeys(p_values, "permutation") | {"accuracy": "McNemar exact"}
    p_values["accuracy"] = mcnemar_exact(int(fixed.sum()), int(broken.sum()))
    values, others = metric_values(before, task, evaluate), metric_values(after, task, evaluate)
    changes = {
        name: Change(
            value,
            others[name],
            percentile_interval(differences[name]) if name in differences else None,
            p_values.get(name),
            tests.get(name),
        )
        for name, value in values.items()
        if name in others
    }
    scores = [per_label_scores(confusion_matrix(side.actual, side.predicted, k)) for side in (before, after)]
    return Comparison(
        changes,
        {
            label: ClassChange(float(scores[0].f1[code]), float(scores[1].f1[code]), int(scores[0].support[code]), p)
            for (code, label), p in zip(enumerate(task.labels), p_of_labels.tolist(), strict=True)
        },
        _flips(before, after, fixed, broken, task),
        same=_same(before, after),
        resamples=samples,
    )


def _flips(before: Answers, after: Answers, fixed: np.ndarray, broken: np.ndarray, task: ClassificationTask) -> Flips:
    confidence = None
    if after.probabilities is not None:
        confidence = after.probabilities[np.arange(len(after.ids)), after.predicted]
    names = np.array([*task.labels, INVALID], dtype=object)
    wrong = (before.predicted != before.actual) & (after.predicted != after.actual)
    return Flips(
        surest_first(fixed, confidence),
        surest_first(broken, confidence),
        int((wrong & (before.predicted != after.predicted)).sum()),
        names[before.predicted],
        names[after.predicted],
        confidence,
    )


def surest_first(chosen: np.ndarray, confidence: np.ndarray | None) -> np.ndarray:
    """The numbers of the chosen rows by falling confidence; equals, and all without any, in the table's order."""
    rows = np.flatnonzero(chosen)
    return rows if confidence is None else rows[np.argsort(-confidence[rows], kind="stable")]


def _same(before: Answers, after: Answers) -> bool:
    if not np.array_equal(before.predicted, after.predicted):
        return False
    if before.probabilities is None or after.probabilities is None:
        return before.probabilities is after.probabilities
    return np.array_equal(before.probabilities, after.probabilities)
