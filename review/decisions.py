"""Decisions for one label: their metrics for many confusion matrices at once, resampled and permuted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from review.changes import Resampled
from review.statistics import resampled_cells, swap_p
from stages.common.measuring.answers import Answers
from stages.common.measuring.single_label import positive_code
from stages.common.schema.task import ClassificationTask


class Cells(NamedTuple):
    """Rows of one label and one pair of predictions are alike to every metric of decisions.

    Attributes:
        actual: label of each of the c cells, shape (c,).
        before: prediction of the first side, shape (c,); k stands for `<invalid>`.
        after: of the second.
        counts: rows in the cell, above 0.
    """

    actual: np.ndarray
    before: np.ndarray
    after: np.ndarray
    counts: np.ndarray


def joint_cells(before: Answers, after: Answers, label_count: int) -> Cells:
    """Count rows by label and both predictions."""
    width = label_count + 1
    codes = (before.actual * width + before.predicted) * width + after.predicted
    found, counts = np.unique(codes, return_counts=True)
    return Cells(found // width**2, found // width % width, found % width, counts)


def decision_values(
    correct: np.ndarray, answered: np.ndarray, support: np.ndarray, invalid: np.ndarray, positive: int | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The numbers of `decision_scores` and `two_class_scores` for many confusion matrices at once.

    Args:
        correct: right answers of each label, shape (s, k).
        answered: answers of each label, shape (s, k).
        support: rows of each label, shape (s, k).
        invalid: answers that are no label, shape (s,).
        positive: code of the positive label of two; or None.

    Returns:
        Each metric, shape (s,), and the F1 of each label, shape (s, k); ratios without rows are 0.
    """
    rows, right = support.sum(axis=1), correct.sum(axis=1)
    f1, recall = ratio(2 * correct, support + answered), ratio(correct, support)
    values = {
        "accuracy": right / rows,
        "f1_micro": 2 * right / (rows + answered.sum(axis=1)),
        "f1_macro": f1.mean(axis=1),
        "precision_macro": ratio(correct, answered).mean(axis=1),
        "recall_macro": recall.mean(axis=1),
        "invalid_rate": invalid / rows,
    }
    if positive is not None:
        found, negatives = correct[:, positive], support[:, 1 - positive]
        # An invalid answer to a negative row is a false positive, as in `two_class_scores`.
        wrong = negatives - correct[:, 1 - positive]
        values |= {
            "precision": ratio(found, found + wrong),
            "recall": recall[:, positive],
            "specificity": recall[:, 1 - positive],
        }
    return values, f1


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotients; 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator != 0)


def resampled_decisions(cells: Cells, task: ClassificationTask, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Differences of the metrics of decisions in resamples of rows, shape (samples,)."""
    k, positive, resampled = len(task.labels), positive_code(task), Resampled()
    sides = [_counted(cells.actual, predicted, k) for predicted in (cells.before, cells.after)]
    labels = _indicator(cells.actual, np.ones(len(cells.actual)), k)
    for drawn in resampled_cells(cells.counts, samples, seed):
        support = drawn @ labels
        values = [decision_values(*_split(drawn @ side, k, support), positive)[0] for side in sides]
        resampled.add(*values)
    return resampled.differences()


def permuted_decisions(cells: Cells, task: ClassificationTask, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """P-values of the metrics of decisions, and of each label's F1 with Holm's correction."""
    k, positive = len(task.labels), positive_code(task)
    before, after = (_counted(cells.actual, predicted, k) for predicted in (cells.before, cells.after))
    totals = [cells.counts @ side for side in (before, after)]
    support = cells.counts @ _indicator(cells.actual, np.ones(len(cells.actual)), k)
    differ = cells.before != cells.after
    moved = (after - before)[differ]

    def difference(swapped: np.ndarray) -> np.ndarray:
        """Differences of metrics and labels after `swapped` was added to the first side and taken from the second."""
        sides = [
            decision_values(*_split(total + sign * swapped, k, support[None]), positive)
            for total, sign in zip(totals, (1, -1), strict=True)
        ]
        names = list(sides[0][0])
        metrics = np.stack([sides[1][0][name] - sides[0][0][name] for name in names], axis=1)
        return np.concatenate([metrics, sides[1][1] - sides[0][1]], axis=1)

    names = list(decision_values(*_split(totals[0][None], k, support[None]), positive)[0])
    p_values, p_of_labels = swap_p(difference, moved, cells.counts[differ], seed, k)
    return dict(zip(names, p_values.tolist(), strict=True)), p_of_labels


def _counted(actual: np.ndarray, predicted: np.ndarray, label_count: int) -> sparse.csr_array:
    """What a cell's rows add to right answers and answers of each label, and to invalid answers: (c, 2k + 1)."""
    right = _indicator(actual, predicted == actual, label_count)
    # The prediction k, an invalid answer, has the last column.
    return sparse.csr_array(sparse.hstack([right, _indicator(predicted, np.ones(len(predicted)), label_count + 1)]))


def _indicator(columns: np.ndarray, values: np.ndarray, width: int) -> sparse.csr_array:
    rows = np.arange(len(columns))
    return sparse.csr_array((values.astype(np.float64), (rows, columns)), shape=(len(columns), width))


def _split(
    sums: np.ndarray, label_count: int, support: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, answers, rows and invalid answers out of sums of `_counted`."""
    correct, answered, invalid = np.split(sums, [label_count, 2 * label_count], axis=1)
    return correct, answered, np.broadcast_to(support, correct.shape), invalid[:, 0]
