"""Two predictions of one label for each text: metrics with paired intervals and tests, labels, flipped rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from review.changes import Change, ClassChange, Comparison, Flips, Resampled
from review.rankings import rank, resampled_rankings
from review.statistics import (
    holm,
    mcnemar_exact,
    percentile_interval,
    permutation_p,
    resample_count,
    resampled_cells,
    resampled_rows,
    sign_flip_p,
    swaps,
)
from stages.common.labels import INVALID
from stages.common.measuring.answers import Answers
from stages.common.measuring.metrics import (
    calibration_bins,
    confidence_and_correctness,
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
    differences = _resampled_decisions(cells, task, evaluate)
    samples = resample_count(evaluate.bootstrap_samples, len(before.ids))
    differences |= _resampled_probabilities(before, after, task, evaluate, samples)
    right, was_right = after.predicted == after.actual, before.predicted == before.actual
    fixed, broken = right & ~was_right, was_right & ~right
    p_values, p_of_labels = _permuted(cells, task, evaluate.seed)
    p_values |= _flipped_signs(before, after, evaluate.seed)
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
    f1, recall = _ratio(2 * correct, support + answered), _ratio(correct, support)
    values = {
        "accuracy": right / rows,
        "f1_micro": 2 * right / (rows + answered.sum(axis=1)),
        "f1_macro": f1.mean(axis=1),
        "precision_macro": _ratio(correct, answered).mean(axis=1),
        "recall_macro": recall.mean(axis=1),
        "invalid_rate": invalid / rows,
    }
    if positive is not None:
        found, negatives = correct[:, positive], support[:, 1 - positive]
        # An invalid answer to a negative row is a false positive, as in `two_class_scores`.
        wrong = negatives - correct[:, 1 - positive]
        values |= {
            "precision": _ratio(found, found + wrong),
            "recall": recall[:, positive],
            "specificity": recall[:, 1 - positive],
        }
    return values, f1


def _resampled_decisions(cells: Cells, task: ClassificationTask, evaluate: Evaluate) -> dict[str, np.ndarray]:
    k, positive, resampled = len(task.labels), positive_code(task), Resampled()
    sides = [_counted(cells.actual, predicted, k) for predicted in (cells.before, cells.after)]
    labels = _indicator(cells.actual, np.ones(len(cells.actual)), k)
    samples = resample_count(evaluate.bootstrap_samples, len(cells.counts))
    for drawn in resampled_cells(cells.counts, samples, evaluate.seed):
        support = drawn @ labels
        values = [decision_values(*_split(drawn @ side, k, support), positive)[0] for side in sides]
        resampled.add(*values)
    return resampled.differences()


def _permuted(cells: Cells, task: ClassificationTask, seed: int) -> tuple[dict[str, float], np.ndarray]:
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
    observed = difference(np.zeros((1, 2 * k + 1)))[0]
    permuted = [difference(drawn @ moved) for drawn in swaps(cells.counts[differ], seed)]
    p_values = permutation_p(observed, np.concatenate(permuted)) if permuted else np.ones(len(observed))
    return dict(zip(names, p_values[: len(names)].tolist(), strict=True)), holm(p_values[len(names) :])


def _resampled_probabilities(
    before: Answers, after: Answers, task: ClassificationTask, evaluate: Evaluate, samples: int
) -> dict[str, np.ndarray]:
    """Differences of the metrics that look at probabilities; none where a side has none."""
    if before.probabilities is None or after.probabilities is None:
        return {}
    bins, positive, resampled = evaluate.calibration_bins, positive_code(task), Resampled()
    assert bins is not None, "labels have calibration bins"
    columns = np.concatenate([_probability_columns(side, bins) for side in (before, after)], axis=1)
    is_positive = before.actual == positive
    rankings = (
        [
            rank(is_positive, side.probabilities[:, positive])
            for side in (before, after)
            if side.probabilities is not None
        ]
        if is_positive.any()
        else []
    )
    recall = evaluate.threshold.recall if isinstance(evaluate.threshold, RecallThreshold) else None
    for weights in resampled_rows(len(before.ids), samples, evaluate.seed):
        sums = np.split(weights @ columns / len(before.ids), 2, axis=1)
        values = [
            {"log_loss": side[:, 0], "brier": side[:, 1], "ece": np.abs(side[:, 2:]).sum(axis=1)} for side in sums
        ]
        for side, ranking in zip(values, rankings, strict=False):
            side |= resampled_rankings(ranking, weights, recall)
        resampled.add(*values)
    return resampled.differences()


def _probability_columns(answers: Answers, bins: int) -> np.ndarray:
    """Each row's log loss and Brier score, and in the column of its bin how far its confidence is from being right.

    The calibration error is the sum over bins of rows / n * |accuracy - confidence|, so of |sum over its rows| / n.
    """
    rows, probabilities = np.arange(len(answers.ids)), answers.probabilities
    assert probabilities is not None, "the caller has looked"
    confidence, correct = confidence_and_correctness(answers.actual, probabilities)
    columns = np.zeros((len(rows), 2 + bins))
    columns[:, :2] = _losses(answers)
    edges = np.linspace(0, 1, bins + 1)
    number = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    columns[rows, 2 + number] = correct - confidence
    assert len(np.unique(number)) == len(calibration_bins(confidence, correct, bins).number), "the bins of `ece`"
    return columns


def _losses(answers: Answers) -> np.ndarray:
    """Each row's log loss and Brier score as `probability_scores` averages them, shape (n, 2)."""
    probabilities = answers.probabilities
    assert probabilities is not None, "the caller has looked"
    epsilon = np.finfo(np.float64).eps
    of_truth = probabilities[np.arange(len(probabilities)), answers.actual]
    squares = (probabilities**2).sum(axis=1) - 2 * of_truth + 1
    return np.stack([-np.log(np.clip(of_truth, epsilon, 1 - epsilon)), squares], axis=1)


def _flipped_signs(before: Answers, after: Answers, seed: int) -> dict[str, float]:
    if before.probabilities is None or after.probabilities is None:
        return {}
    p_values = sign_flip_p(_losses(after) - _losses(before), seed)
    return dict(zip(("log_loss", "brier"), p_values.tolist(), strict=True))


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


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator != 0)
