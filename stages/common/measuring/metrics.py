"""Numbers out of predictions: pure functions over arrays, with scikit-learn's definitions wherever it has them.

Labels are codes 0 to k-1 in the order of task.labels; k stands for an answer that is no label (`<invalid>`). It is a
column of the confusion matrix and never a class of its own: it counts as wrong for every label.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Numbers in the resampled matrices that the bootstrap holds at a time.
RESAMPLED_CELLS = 2_000_000


class LabelScores(NamedTuple):
    """Precision, recall, F1 and support (rows) of each label, each an array of shape (..., k)."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


class CalibrationBins(NamedTuple):
    """Rows, mean confidence and accuracy of each bin that holds rows, and the bin's number."""

    number: np.ndarray
    rows: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


# --- decisions --------------------------------------------------------------------------------------------------------


def confusion_matrix(actual: np.ndarray, predicted: np.ndarray, label_count: int) -> np.ndarray:
    """Rows by true label and prediction, where scikit-learn's function would drop invalid answers silently.

    Args:
        actual: codes from 0 to k-1, shape (n,).
        predicted: codes from 0 to k, shape (n,).
        label_count: k.

    Returns:
        Counts of shape (k, k + 1), the last column for `<invalid>`; their sum is n.
    """
    cells = actual * (label_count + 1) + predicted
    matrix = np.bincount(cells, minlength=label_count * (label_count + 1)).reshape(label_count, label_count + 1)
    assert matrix.sum() == len(actual), "every row is in the matrix"
    return matrix


def per_label_scores(matrix: np.ndarray) -> LabelScores:
    """Each label's scores; 0 where a denominator is 0 (scikit-learn's `zero_division=0`).

    Args:
        matrix: counts as `confusion_matrix` makes them, or several such matrices: shape (..., k, k + 1).
    """
    correct, support, answered = _margins(matrix)
    return LabelScores(
        _ratio(correct, answered), _ratio(correct, support), _ratio(2 * correct, support + answered), support
    )


def decision_scores(matrix: np.ndarray) -> dict[str, float]:
    """Accuracy, micro- and macro-averages over all k labels, and the share of invalid answers.

    A label without rows and answers has an F1 of 0 and counts in the macro-averages: they are over task.labels,
    whatever the data. Invalid answers make `f1_micro` differ from accuracy, since precision leaves them out.

    Args:
        matrix: counts as `confusion_matrix` makes them, of at least one row.
    """
    rows = matrix.sum()
    correct, support, answered = (margin.sum() for margin in _margins(matrix))
    scores = per_label_scores(matrix)
    return {
        "accuracy": float(correct / rows),
        "f1_micro": float(2 * correct / (support + answered)),
        "f1_macro": float(scores.f1.mean()),
        "precision_macro": float(scores.precision.mean()),
        "recall_macro": float(scores.recall.mean()),
        "invalid_rate": float(matrix[:, -1].sum() / rows),
    }


def two_class_scores(matrix: np.ndarray, positive: int) -> dict[str, float]:
    """Counts and rates of a decision between two labels.

    An invalid answer is the wrong one: a false negative where the row is positive, a false positive where it is
    negative (somebody has to look at it). So the four counts have the sum n, and accuracy is (tp + tn) / n.

    Args:
        matrix: counts of shape (2, 3).
        positive: code of the positive label.

    Returns:
        tp, fp, tn, fn, precision, recall with its exact 95 % interval, specificity; a rate without rows is 0. The
        interval is exact because a resampled recall of 1 would always be 1, however few rows it comes from.
    """
    negative = 1 - positive
    tp, tn = int(matrix[positive, positive]), int(matrix[negative, negative])
    fn, fp = int(matrix[positive].sum()) - tp, int(matrix[negative].sum()) - tn
    low, high = exact_interval(tp, tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "recall_low": low,
        "recall_high": high,
        "specificity": tn / (tn + fp) if tn + fp else 0.0,
    }


def bootstrap_intervals(matrix: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    """95 % percentile intervals of accuracy, macro-F1 and macro-recall (Efron 1979).

    All of them follow from the confusion matrix alone, and resampling n rows with replacement makes its cells
    multinomial with the observed shares; so cells are drawn instead of rows, which is the same in distribution.

    Args:
        matrix: counts as `confusion_matrix` makes them, of at least one row.
        samples: number of resamples.
        seed: of the draws.

    Returns:
        accuracy_low, accuracy_high, f1_macro_low, f1_macro_high, recall_macro_low, recall_macro_high.
    """
    generator, rows = np.random.default_rng(seed), matrix.sum()
    cells = np.flatnonzero(matrix)
    shares = matrix.flat[cells] / rows
    values = np.empty((samples, 3))
    step = max(1, RESAMPLED_CELLS // matrix.size)
    for start in range(0, samples, step):
        drawn = np.zeros((min(step, samples - start), *matrix.shape), matrix.dtype)
        drawn.reshape(len(drawn), -1)[:, cells] = generator.multinomial(rows, shares, len(drawn))
        scores, correct = per_label_scores(drawn), np.trace(drawn, axis1=1, axis2=2)
        averages = correct / rows, scores.f1.mean(axis=1), scores.recall.mean(axis=1)
        values[start : start + step] = np.stack(averages, axis=1)
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return {
        f"{name}_{end}": float(edge[index])
        for index, name in enumerate(("accuracy", "f1_macro", "recall_macro"))
        for end, edge in (("low", low), ("high", high))
    }


def exact_interval(found: int, total: int) -> tuple[float, float]:
    """The two-sided 95 % interval of a share (Clopper & Pearson 1934); from 0 to 1 without rows.

    Args:
        found: from 0 to `total`.
        total: how many there are to find.
    """
    # Two labels and slices need it; other tasks are spared a tenth of a second.
    from scipy.special import betaincinv

    low = float(betaincinv(found, total - found + 1, 0.025)) if found else 0.0
    high = float(betaincinv(found + 1, total - found, 0.975)) if found < total else 1.0
    return low, high


def _margins(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct answers, rows and answers of each label."""
    return np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-1), matrix[..., :-1].sum(axis=-2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


# --- probabilities ----------------------------------------------------------------------------------------------------


def probability_scores(actual: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    """How good the probabilities are, whatever is decided with them.

    - `log_loss`: mean negative log-probability of the true label, in nats; probabilities are clipped to
      [eps, 1 - eps] with float64's eps of 2.2e-16, as in scikit-learn, so that it is at most 36.04.
    - `brier`: mean over rows of the squared differences between probability and truth (0 or 1), summed over the
      labels: from 0 to 2 (Brier 1950, "Verification of forecasts expressed in terms of probability").
    - `ece`: expected calibration error of the likeliest label, in bins of equal width (Guo et al. 2017, "On
      calibration of modern neural networks", equation 3).

    Args:
        actual: codes from 0 to k-1, shape (n,), n >= 1.
        probabilities: shape (n, k), rows summing to 1.
        bins: of `ece`.
    """
    epsilon = np.finfo(np.float64).eps
    of_truth = probabilities[np.arange(len(actual)), actual]
    truth = np.eye(probabilities.shape[1])[actual]
    table = calibration_bins(*confidence_and_correctness(actual, probabilities), bins)
    gaps = np.abs(table.accuracy - table.confidence)
    return {
        "log_loss": float(-np.log(np.clip(of_truth, epsilon, 1 - epsilon)).mean()),
        "brier": float(((probabilities - truth) ** 2).sum(axis=1).mean()),
        "ece": float((gaps * table.rows).sum() / len(actual)),
    }


def confidence_and_correctness(actual: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's largest probability, and whether its label (the first of equals) is the true one."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == actual


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int) -> CalibrationBins:
    """Rows sorted into bins ((i-1)/bins, i/bins] of confidence; 0 falls into the first, empty bins are left out."""
    number = np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0, bins - 1)
    rows = np.bincount(number, minlength=bins)
    filled = np.flatnonzero(rows)
    means = [np.bincount(number, weights, minlength=bins)[filled] / rows[filled] for weights in (confidence, correct)]
    return CalibrationBins(filled, rows[filled], *means)
