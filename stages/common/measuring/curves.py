"""Data for `dvc plots`: tables of few, rounded rows, so that Git's diffs of them stay small."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.labels import INVALID
from stages.common.measuring.metrics import calibration_bins, confidence_and_correctness
from stages.common.measuring.ranking import operating_points
from stages.common.spreadsheets import csv_text
from stages.common.tables import write_text

POINTS = 200
DECIMALS = 4
LISTED_MISTAKES = 20

Row = Sequence[Any]
# A table's name → its rows.
Tables = dict[str, list[Row]]


def confusion_rows(matrix: np.ndarray, labels: Sequence[str]) -> list[Row]:
    """Label, prediction and count for every cell of a (k, k + 1) matrix, `<invalid>` last."""
    return [
        (label, prediction, int(matrix[row, column]))
        for row, label in enumerate(labels)
        for column, prediction in enumerate([*labels, INVALID])
    ]


def ranking_rows(truth: np.ndarray, scores: np.ndarray) -> tuple[list[Row], list[Row]]:
    """The precision-recall curve and the ROC curve, over all thresholds.

    Args:
        truth: whether each row is positive, shape (n,); with several labels, each row once for each label.
        scores: the probabilities, shape (n,).

    Returns:
        Recall and precision, from the highest threshold on; false and true positive rate, from (0, 0) on. Both are
        empty when all rows are of one kind.
    """
    if truth.all() or not truth.any():
        return [], []
    _, found, selected = operating_points(truth, scores)
    recall, false_rate = found / truth.sum(), (selected - found) / (~truth).sum()
    return thin(recall, found / selected), thin(np.append(0, false_rate), np.append(0, recall))


def reliability_rows(actual: np.ndarray, probabilities: np.ndarray, bins: int) -> list[Row]:
    """Mean confidence, accuracy and rows of each bin of confidence in the likeliest label that holds rows."""
    return bin_rows(*confidence_and_correctness(actual, probabilities), bins)


def bin_rows(confidence: np.ndarray, correct: np.ndarray, bins: int) -> list[Row]:
    """Mean confidence, share of what is true, and rows of each bin of confidence that holds rows."""
    table = calibration_bins(confidence, correct, bins)
    return [
        (round(float(confidence), DECIMALS), round(float(accuracy), DECIMALS), int(rows))
        for confidence, accuracy, rows in zip(table.confidence, table.accuracy, table.rows, strict=True)
    ]


def coverage_rows(actual: np.ndarray, probabilities: np.ndarray) -> list[Row]:
    """Share of the rows answered, surest first, and the likeliest label's accuracy among them.

    Rows of equal confidence keep the order of the table.
    """
    confidence, correct = confidence_and_correctness(actual, probabilities)
    answered = np.arange(1, len(actual) + 1)
    accuracy = np.cumsum(correct[np.argsort(-confidence, kind="stable")]) / answered
    return thin(answered / len(actual), accuracy)


def one_against_rest(actual: np.ndarray, probabilities: np.ndarray, positive: int | None) -> tuple[np.ndarray, ...]:
    """What precision-recall and ROC curves are drawn from.

    Args:
        actual: codes, shape (n,).
        probabilities: shape (n, k).
        positive: with two labels the positive one's code; otherwise None, for the micro-average: every row once for
            each label.

    Returns:
        Truth and scores, of shape (n,) or (n * k,).
    """
    if positive is not None:
        return actual == positive, probabilities[:, positive]
    truth = np.zeros(probabilities.shape, dtype=bool)
    truth[np.arange(len(actual)), actual] = True
    return truth.ravel(), probabilities.ravel()


def loss_rows(path: Path) -> list[Row]:
    """Step and loss out of a DVCLive table."""
    with path.open(encoding="utf-8", newline="") as file:
        points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file, delimiter="\t")]
    kept = np.unique(np.linspace(0, len(points) - 1, min(POINTS, len(points))).round().astype(int))
    return [(points[index][0], round(points[index][1], DECIMALS)) for index in kept]


def per_class_rows(blocks: Mapping[str, Any], names: Iterable[str]) -> list[Row]:
    """Predictor, label and F1 out of the blocks of metrics.json."""
    return [
        (name, label, round(scores["f1"], DECIMALS))
        for name in names
        for label, scores in blocks[name]["per_class"].items()
    ]


def rounded(value: float) -> float | None:
    """A number as the tables show it; NaN is an empty cell."""
    return None if math.isnan(value) else round(float(value), DECIMALS)


def thin(x: np.ndarray, y: np.ndarray) -> list[Row]:
    """At most `POINTS` points of a curve, evenly spaced along its length, both ends among them, rounded."""
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    kept = np.searchsorted(length, np.linspace(0, length[-1], POINTS - 1))
    kept = np.unique(np.append(kept, len(x) - 1))
    rounded = [(round(float(x[index]), DECIMALS), round(float(y[index]), DECIMALS)) for index in kept]
    return list(dict.fromkeys(rounded))


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV table; without rows it is the header alone, which `dvc plots` passes over in silence."""
    write_text(path, csv_text([header, *rows]))
