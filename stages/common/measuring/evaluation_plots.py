"""The tables behind `dvc plots`; dvc.yaml and .dvc/plots/ say how each is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.common.measuring import curves
from stages.common.measuring.answers import Answers, mistakes, positive_code
from stages.common.measuring.metrics import confusion_matrix
from stages.common.params import Task
from stages.common.progress import progress

# The majority's probabilities are the same for every row: its curves would be points.
DRAWN = ("adapter", "base", "tfidf")
LISTED_MISTAKES = 20


def write_plots(
    folder: Path, answers: Mapping[str, Answers], blocks: Mapping[str, Any], task: Task, bins: int, training_log: Path
) -> None:
    """Write every table, even one without rows: DVC fails a stage whose outputs are missing.

    Args:
        folder: is emptied first.
        answers: each predictor's answers to test, decisions made.
        blocks: the content of metrics.json.
        task: the labels.
        bins: of the reliability plot.
        training_log: a DVCLive folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    adapter = answers["adapter"]
    confusion = curves.confusion_rows(
        confusion_matrix(adapter.actual, adapter.predicted, len(task.labels)), task.labels
    )
    curves.write_csv(folder / "confusion.csv", ["label", "prediction", "count"], confusion)
    curves.write_csv(
        folder / "misclassified.csv",
        ["id", "label", "prediction", "confidence"],
        [
            (*row, None if sure is None else round(sure, curves.DECIMALS))
            for *row, sure in mistakes(adapter, task.labels, LISTED_MISTAKES)
        ],
    )
    per_class = [
        (name, label, round(scores["f1"], curves.DECIMALS))
        for name in DRAWN
        for label, scores in blocks[name]["per_class"].items()
    ]
    curves.write_csv(folder / "per_class_f1.csv", ["series", "label", "f1"], per_class)
    losses = [
        (series, *row)
        for series, name in (("train", "train"), ("validation", "eval"))
        for row in curves.loss_rows(training_log / "plots/metrics" / name / "loss.tsv")
    ]
    curves.write_csv(folder / "loss.csv", ["series", "step", "loss"], losses)
    write_curves(folder, {name: answers[name] for name in DRAWN}, task, bins)


def write_curves(folder: Path, answers: Mapping[str, Answers], task: Task, bins: int) -> None:
    """Write the curves that need probabilities, for each predictor that has them."""
    columns = {
        "precision_recall": ["recall", "precision"],
        "roc": ["false_positive_rate", "true_positive_rate"],
        "reliability": ["confidence", "accuracy", "rows"],
        "coverage": ["coverage", "accuracy"],
    }
    tables: dict[str, list[curves.Row]] = {table: [] for table in columns}
    with progress(len(answers), "drawing curves", "predictor") as bar:
        for name, given in answers.items():
            for table, rows in _curves(given, task, bins).items():
                tables[table] += [(name, *row) for row in rows]
            bar.update()
    for table, rows in tables.items():
        curves.write_csv(folder / f"{table}.csv", ["series", *columns[table]], rows)


def _curves(answers: Answers, task: Task, bins: int) -> dict[str, list[curves.Row]]:
    if answers.probabilities is None:
        return {}
    truth, scores = curves.one_against_rest(answers.actual, answers.probabilities, positive_code(task))
    precision_recall, roc = curves.ranking_rows(truth, scores)
    return {
        "precision_recall": precision_recall,
        "roc": roc,
        "reliability": curves.reliability_rows(answers.actual, answers.probabilities, bins),
        "coverage": curves.coverage_rows(answers.actual, answers.probabilities),
    }
