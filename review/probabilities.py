"""Probabilities of one label: losses, calibration and rankings of two sides, resampled and permuted."""

from __future__ import annotations

import numpy as np

from review.changes import Resampled
from review.rankings import rank, resampled_rankings
from review.statistics import resampled_rows, sign_flip_p
from stages.common.measuring.answers import Answers
from stages.common.measuring.metrics import calibration_bins, confidence_and_correctness
from stages.common.measuring.single_label import positive_code
from stages.common.schema.measuring import Evaluate, RecallThreshold
from stages.common.schema.task import ClassificationTask


def resampled_probabilities(
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


def loss_p_values(before: Answers, after: Answers, seed: int) -> dict[str, float]:
    """P-values of log loss and Brier score; none where a side has no probabilities."""
    if before.probabilities is None or after.probabilities is None:
        return {}
    p_values = sign_flip_p(_losses(after) - _losses(before), seed)
    return dict(zip(("log_loss", "brier"), p_values.tolist(), strict=True))


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
