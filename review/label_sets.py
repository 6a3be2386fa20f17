"""Two predictions of any number of labels for each text: metrics with paired intervals and tests, flipped rows."""

from __future__ import annotations

from itertools import compress

import numpy as np
from scipy import sparse

from review.changes import Change, ClassChange, Comparison, Flips, Resampled
from review.decisions import ratio
from review.labels import surest_first
from review.statistics import (
    mcnemar_exact,
    percentile_interval,
    resample_count,
    resampled_rows,
    sign_flip_p,
    swap_p,
)
from stages.common.labels import join_labels
from stages.common.measuring.answers import LabelSets
from stages.common.measuring.label_sets import binary_log_loss, set_scores
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import ClassificationTask

# Means over rows, in the order of `_row_columns`.
MEANS = ("accuracy", "f1_samples", "hamming_loss", "log_loss")


def metric_values(answers: LabelSets, task: ClassificationTask, evaluate: Evaluate) -> dict[str, float]:
    """The metrics of `evaluate`, by its own functions, without their intervals."""
    return set_scores(answers.actual, answers.predicted) | {
        "log_loss": binary_log_loss(answers.actual, answers.probabilities)
    }


def compare(before: LabelSets, after: LabelSets, task: ClassificationTask, evaluate: Evaluate) -> Comparison:
    """Compare decided answers to the same n >= 1 rows.

    Args:
        before: of the first side.
        after: of the second, for the same ids and labels in the same order.
        task: the labels.
        evaluate: number of resamples and seed.
    """
    columns = [_row_columns(side) for side in (before, after)]
    samples = resample_count(evaluate.bootstrap_samples, len(before.ids))
    differences = _resampled(before, after, columns, samples, evaluate.seed)
    right, was_right = ((side.actual == side.predicted).all(axis=1) for side in (after, before))
    fixed, broken = right & ~was_right, was_right & ~right
    p_values, p_of_labels = _permuted(before, after, evaluate.seed)
    means = sign_flip_p(columns[1] - columns[0], evaluate.seed)
    p_values |= dict(zip(MEANS, means.tolist(), strict=True))
    tests = dict.fromkeys(p_values, "permutation") | {"accuracy": "McNemar exact"}
    p_values["accuracy"] = mcnemar_exact(int(fixed.sum()), int(broken.sum()))
    values, others = metric_values(before, task, evaluate), metric_values(after, task, evaluate)
    f1 = [_f1(side.actual, side.predicted) for side in (before, after)]
    support = before.actual.sum(axis=0)
    return Comparison(
        {
            name: Change(
                value, others[name], percentile_interval(differences[name]), p_values.get(name), tests.get(name)
            )
            for name, value in values.items()
        },
        {
            label: ClassChange(float(f1[0][code]), float(f1[1][code]), int(support[code]), float(p_of_labels[code]))
            for code, label in enumerate(task.labels)
        },
        _flips(before, after, fixed, broken, task),
        same=np.array_equal(before.predicted, after.predicted)
        and np.array_equal(before.probabilities, after.probabilities),
        resamples=samples,
    )


def count_values(correct: np.ndarray, answered: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of `set_scores` that follow from counts of each label, for many resamples at once.

    Args:
        correct: rows that have the label and were given it, shape (s, k).
        answered: rows that were given it, shape (s, k).
        support: rows that have it, shape (s, k).
    """
    return {
        "f1_micro": ratio(2 * correct.sum(axis=1), support.sum(axis=1) + answered.sum(axis=1)),
        "f1_macro": ratio(2 * correct, support + answered).mean(axis=1),
        "precision_macro": ratio(correct, answered).mean(axis=1),
        "recall_macro": ratio(correct, support).mean(axis=1),
    }


def _row_columns(answers: LabelSets) -> np.ndarray:
    """What `MEANS` are means of, shape (n, 4)."""
    actual, predicted = answers.actual, answers.predicted
    sizes, shared = actual.sum(axis=1) + predicted.sum(axis=1), (actual & predicted).sum(axis=1)
    epsilon = np.finfo(np.float64).eps
    of_truth = np.where(actual, answers.probabilities, 1 - answers.probabilities)
    return np.stack(
        [
            (actual == predicted).all(axis=1),
            np.divide(2 * shared, sizes, out=np.ones(len(actual)), where=sizes > 0),
            (actual != predicted).mean(axis=1),
            -np.log(np.clip(of_truth, epsilon, 1 - epsilon)).mean(axis=1),
        ],
        axis=1,
    )


def _resampled(
    before: LabelSets, after: LabelSets, columns: list[np.ndarray], samples: int, seed: int
) -> dict[str, np.ndarray]:
    rows, resampled = len(before.ids), Resampled()
    support = sparse.csr_array(before.actual.astype(np.float64))
    counted = [
        sparse.csr_array(np.concatenate([side.actual & side.predicted, side.predicted], axis=1).astype(np.float64))
        for side in (before, after)
    ]
    for weights in resampled_rows(rows, samples, seed):
        of_labels = weights @ support
        values = [
            count_values(*_halves(weights @ side), of_labels)
            | dict(zip(MEANS, (weights @ means / rows).T, strict=True))
            for side, means in zip(counted, columns, strict=True)
        ]
        resampled.add(*values)
    return resampled.differences()


def _permuted(before: LabelSets, after: LabelSets, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """P-values of the metrics that are no means of rows, and of each label's F1 with Holm's correction."""
    differ = (before.predicted != after.predicted).any(axis=1)
    support = before.actual.sum(axis=0)[None]
    counted = [
        np.concatenate([side.actual & side.predicted, side.predicted], axis=1).astype(np.float64)
        for side in (before, after)
    ]
    totals = [side.sum(axis=0) for side in counted]
    moved = sparse.csr_array(counted[1][differ] - counted[0][differ])

    def difference(swapped: np.ndarray) -> np.ndarray:
        """Differences of metrics and labels after `swapped` was added to the first side and taken from the second."""
        counts = [_halves(total + sign * swapped) for total, sign in zip(totals, (1, -1), strict=True)]
        values = [count_values(*side, support) for side in counts]
        f1 = [ratio(2 * correct, support + answered) for correct, answered in counts]
        metrics = np.stack([values[1][name] - values[0][name] for name in values[0]], axis=1)
        return np.concatenate([metrics, f1[1] - f1[0]], axis=1)

    each_once = np.ones(int(differ.sum()), np.int64)
    p_values, p_of_labels = swap_p(difference, moved, each_once, seed, before.actual.shape[1])
    names = list(count_values(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1))))
    return dict(zip(names, p_values.tolist(), strict=True)), p_of_labels


def _flips(
    before: LabelSets, after: LabelSets, fixed: np.ndarray, broken: np.ndarray, task: ClassificationTask
) -> Flips:
    """Confidence is the second side's in the surest of the decisions that changed."""
    decided = np.where(after.predicted, after.probabilities, 1 - after.probabilities)
    changed = before.predicted != after.predicted
    confidence = np.where(changed, decided, 0).max(axis=1)
    wrong = ~(fixed | broken) & (after.predicted != after.actual).any(axis=1)
    sets = [np.full(len(before.ids), "", dtype=object) for _ in range(2)]
    for row in np.flatnonzero(fixed | broken):
        for cells, side in zip(sets, (before, after), strict=True):
            cells[row] = join_labels(list(compress(task.labels, side.predicted[row])))
    return Flips(
        surest_first(fixed, confidence),
        surest_first(broken, confidence),
        int((wrong & changed.any(axis=1)).sum()),
        sets[0],
        sets[1],
        confidence,
    )


def _halves(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and answers of each label out of sums of both."""
    correct, answered = np.split(sums, 2, axis=1)
    return correct, answered


def _f1(actual: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return ratio(2 * (actual & predicted).sum(axis=0), actual.sum(axis=0) + predicted.sum(axis=0))
