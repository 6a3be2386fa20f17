"""Answers read back from prediction files, and the rule that makes decisions out of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stages.common.errors import UserError
from stages.common.labels import INVALID
from stages.common.measuring.metrics import confusion_matrix, per_label_scores
from stages.common.measuring.ranking import choose_threshold
from stages.common.params import Evaluate, Task
from stages.common.predictions import probability_column
from stages.common.tables import open_parquet

# A row of probabilities may miss 1 by rounding, never by more.
SUM_TOLERANCE = 1e-6


class Answers(NamedTuple):
    """A predictor's answers to n rows, as codes in the order of the k labels.

    Attributes:
        ids: the rows' ids.
        actual: true labels, shape (n,).
        predicted: predicted labels, shape (n,); k stands for `<invalid>`.
        probabilities: shape (n, k), or None where answers were generated.
    """

    ids: list[str]
    actual: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None


def read_answers(path: Path, labels: Sequence[str]) -> Answers:
    """Read a prediction file and check that its numbers are probabilities of these labels.

    Args:
        path: a file that `write_predictions` wrote; its folder names the predictor.
        labels: the k labels, in order.

    Raises:
        UserError: the file is for other labels, or a row's probabilities are not finite, not within 0 and 1, or do
            not sum to 1 within 1e-6.
    """
    with open_parquet(path) as file:
        table = file.read()
    expected = ["id", "label", "prediction", *map(probability_column, labels)]
    if table.column_names != expected:
        raise UserError(
            f"{path}: has the columns {table.column_names}, but task.labels in params.yaml asks for {expected}. "
            f"{remedy(path)}"
        )
    return Answers(
        table["id"].to_pylist(),
        encode(path, table["label"].to_pylist(), labels),
        encode(path, table["prediction"].to_pylist(), [*labels, INVALID]),
        _probabilities(path, table.select(expected[3:])),
    )


def encode(path: Path, values: Sequence[str], allowed: Sequence[str]) -> np.ndarray:
    """Each value's place in `allowed`, shape (n,).

    Raises:
        UserError: a value has none; `path` and row are named.
    """
    codes = {label: code for code, label in enumerate(allowed)}
    for row, value in enumerate(values, start=1):
        if value not in codes:
            raise UserError(
                f"{path}: row {row:,} has {value!r}, which is none of {', '.join(allowed)}. Was it made for another "
                f"task.labels? {remedy(path)}"
            )
    return np.array([codes[value] for value in values], np.int64)


def remedy(path: Path) -> str:
    """Which stage makes a split or prediction file, as an instruction."""
    stages = {"splits": "split", "adapter": "infer", "base": "infer_base", "tfidf": "baseline", "majority": "baseline"}
    return f"Run `dvc repro --force --single-item {stages[path.parent.name]}`, then `dvc repro`."


def _probabilities(path: Path, table: pa.Table) -> np.ndarray | None:
    if table.num_rows and all(column.null_count == table.num_rows for column in table.columns):
        return None
    values = np.stack([column.to_numpy() for column in table.columns], axis=1).astype(np.float64)
    # Nulls become NaN, and NaN fails every comparison.
    good = ((values >= 0) & (values <= 1 + SUM_TOLERANCE)).all(axis=1)
    good &= np.abs(values.sum(axis=1) - 1) <= SUM_TOLERANCE
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"{path}: row {row + 1:,}: the probabilities {values[row].tolist()} are not finite numbers from 0 to 1 "
            f"with sum 1. {remedy(path)}"
        )
    return values


# --- decisions --------------------------------------------------------------------------------------------------------


def positive_code(task: Task) -> int | None:
    """With two labels, the positive one's code."""
    return None if task.positive_label is None else task.labels.index(task.positive_label)


def decision_rule(validation: Answers, task: Task, params: Evaluate) -> dict[str, Any]:
    """How a predictor's probabilities become a label, chosen on validation alone.

    Args:
        validation: the predictor's answers to validation.
        task: the labels.
        params: the evaluate block.

    Returns:
        `rule` "answer" (as generated, without probabilities), "argmax", or with two labels "threshold": then also
        positive_label, threshold (positive from this probability on), method, where it was chosen, and the positive
        label's precision, recall and f1 on validation.

    Raises:
        UserError: the threshold is to be chosen on rows of which none is positive.
    """
    if validation.probabilities is None:
        return {"rule": "answer"}
    positive = positive_code(task)
    if positive is None or params.threshold is None:
        return {"rule": "argmax"}
    truth, scores = validation.actual == positive, validation.probabilities[:, positive]
    rule = {
        "rule": "threshold",
        "positive_label": task.positive_label,
        "threshold": _threshold(truth, scores, params, task),
        "method": params.threshold.method,
        "chosen_on": "params.yaml" if params.threshold.method == "fixed" else "validation",
    }
    decided = decide(validation, rule, task)
    reached = per_label_scores(confusion_matrix(decided.actual, decided.predicted, 2))
    return rule | {name: float(getattr(reached, name)[positive]) for name in ("precision", "recall", "f1")}


def decide(answers: Answers, rule: dict[str, Any], task: Task) -> Answers:
    """The answers with their decisions made by `rule`."""
    if rule["rule"] != "threshold":
        return answers
    assert answers.probabilities is not None, "a threshold is chosen on probabilities"
    positive = task.labels.index(rule["positive_label"])
    above = answers.probabilities[:, positive] >= rule["threshold"]
    return answers._replace(predicted=np.where(above, positive, 1 - positive))


def mistakes(answers: Answers, labels: Sequence[str], most: int) -> list[tuple[str, str, str, float | None]]:
    """Id, label, prediction and confidence of wrongly answered rows, the surest first; never their texts.

    Confidence is the probability of the label that was decided on; None where answers were generated. Rows of equal
    confidence keep the order of the table.
    """
    wrong = np.flatnonzero(answers.predicted != answers.actual)
    confidence = np.full(len(wrong), math.nan)
    if answers.probabilities is not None:
        confidence = answers.probabilities[wrong, answers.predicted[wrong]]
    names = [*labels, INVALID]
    listed = []
    for place in np.argsort(-confidence, kind="stable")[:most]:
        row, sure = wrong[place], float(confidence[place])
        actual, predicted = names[answers.actual[row]], names[answers.predicted[row]]
        listed.append((answers.ids[row], actual, predicted, None if math.isnan(sure) else sure))
    return listed


def _threshold(truth: np.ndarray, scores: np.ndarray, params: Evaluate, task: Task) -> float:
    assert params.threshold is not None, "two labels have a threshold"
    if params.threshold.method == "fixed":
        return params.threshold.value
    if not truth.any():
        raise UserError(
            f"data/splits/validation.parquet: no row has the label {task.positive_label!r}, so evaluate.threshold "
            f"cannot be chosen by {params.threshold.method!r}. Raise split.validation_share, or use a fixed threshold."
        )
    target = params.threshold.recall if params.threshold.method == "recall" else None
    return choose_threshold(truth, scores, params.threshold.method, target)
