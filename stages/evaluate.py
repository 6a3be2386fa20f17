"""Predictions become numbers: metrics of both parts, decision thresholds chosen on validation, and data for plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.measuring.answers import Answers, decide, decision_rule, encode, positive_code, read_answers, remedy
from stages.common.measuring.evaluation_plots import write_plots
from stages.common.measuring.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    decision_scores,
    per_label_scores,
    probability_scores,
    two_class_scores,
)
from stages.common.measuring.ranking import ranking_scores
from stages.common.params import Evaluate, Task, load_params
from stages.common.progress import progress
from stages.common.tables import read_json, read_table, write_json

PREDICTORS = ("adapter", "base", "tfidf", "majority")
SPLITS = Path("data/splits")
PREDICTIONS = Path("data/predictions")
TRAINING_LOG = Path("models/adapter/training_log")
METRICS = {"test": Path("metrics/metrics.json"), "validation": Path("metrics/validation.json")}
TRAINING_METRICS = Path("metrics/training.json")
PLOTS = Path("metrics/evaluation")
DECISION = Path("models/decision.json")


def score(answers: Answers, rule: dict[str, Any], task: Task, params: Evaluate) -> dict[str, Any]:
    """A predictor's block of metrics.json.

    Numbers that need probabilities are left out where answers were generated; numbers that need positive and negative
    rows are left out where there are none.

    Args:
        answers: decisions made by `rule`, for at least one row.
        rule: as `decision_rule` made it.
        task: the labels.
        params: the evaluate block.
    """
    matrix, positive = confusion_matrix(answers.actual, answers.predicted, len(task.labels)), positive_code(task)
    block: dict[str, Any] = {"n": len(answers.ids), **decision_scores(matrix)}
    if answers.probabilities is not None:
        block |= probability_scores(answers.actual, answers.probabilities, params.calibration_bins)
    block |= bootstrap_intervals(matrix, params.bootstrap_samples, params.seed, positive)
    if positive is not None:
        block |= two_class_scores(matrix, positive)
        if answers.probabilities is not None:
            block |= ranking_scores(answers.actual == positive, answers.probabilities[:, positive])
            block["threshold"] = rule["threshold"]
    return block | {"per_class": per_class(matrix, task.labels)}


def per_class(matrix: np.ndarray, labels: list[str]) -> dict[str, dict[str, float]]:
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


def training_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of the training's summary; what it does not have (no best step, say) is left out."""
    return {name: value for name, value in summary.items() if isinstance(value, int | float) and math.isfinite(value)}


def read_part(part: str, labels: list[str]) -> dict[str, Answers]:
    """Each predictor's answers to a part, checked to be answers to the very rows of its split, in their order.

    Raises:
        UserError: the split has no rows or other labels, or a file's ids or labels are not the split's.
    """
    split_path = SPLITS / f"{part}.parquet"
    table = read_table(split_path, ["id", "label"])
    ids, actual = table["id"].to_pylist(), encode(split_path, table["label"].to_pylist(), labels)
    if not ids:
        raise UserError(f"{split_path}: has no rows to evaluate. Raise split.{part}_share, then run `dvc repro`.")
    answers = {}
    for name in PREDICTORS:
        path = PREDICTIONS / name / f"{part}.parquet"
        answers[name] = read_answers(path, labels)
        _check_rows(path, split_path, answers[name].ids, ids, "ids")
        _check_rows(path, split_path, answers[name].actual.tolist(), actual.tolist(), "labels")
    return answers


def _check_rows(path: Path, split_path: Path, found: list[Any], expected: list[Any], what: str) -> None:
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False), start=1)
    different = next((row for row, (one, other) in pairs if one != other), min(len(found), len(expected)) + 1)
    raise UserError(
        f"{path}: its {what} are not those of {split_path}: {len(found):,} rows against {len(expected):,}, the first "
        f"difference in row {different:,}. {remedy(path)}"
    )


def main() -> None:
    """Write metrics/*.json, metrics/evaluation/ and models/decision.json."""
    params = load_params("evaluate", "task")
    task = params.task
    parts = {part: read_part(part, task.labels) for part in METRICS}
    rules = {name: decision_rule(parts["validation"][name], task, params.evaluate) for name in PREDICTORS}
    decided = {
        part: {name: decide(answers[name], rules[name], task) for name in PREDICTORS} for part, answers in parts.items()
    }
    blocks: dict[str, dict[str, Any]] = {part: {} for part in METRICS}
    with progress(len(METRICS) * len(PREDICTORS), "scoring", "predictor") as bar:
        for part, answers in decided.items():
            for name in PREDICTORS:
                blocks[part][name] = score(answers[name], rules[name], task, params.evaluate)
                bar.update()
    write_plots(PLOTS, decided["test"], blocks["test"], task, params.evaluate.calibration_bins, TRAINING_LOG)
    for part, path in METRICS.items():
        write_json(path, blocks[part])
    write_json(TRAINING_METRICS, training_metrics(read_json(TRAINING_LOG / "summary.json")))
    write_json(DECISION, rules)
    shown = ", ".join(f"{name} {block['f1_macro']:.3f}" for name, block in blocks["test"].items())
    print(f"evaluate: {blocks['test']['adapter']['n']:,} test rows, macro-F1: {shown}")


if __name__ == "__main__":
    run_stage(main)
