"""The tables behind `dvc plots`; dvc.yaml and .dvc/plots/ say how each is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.common.measuring import curves

# The majority's probabilities are the same for every row: its curves would be points.
DRAWN = ("adapter", "base", "tfidf")
COLUMNS = {
    "confusion": ["label", "prediction", "count"],
    "misclassified": ["id", "label", "prediction", "confidence"],
    "per_class_f1": ["series", "label", "f1"],
    "loss": ["series", "step", "loss"],
    "precision_recall": ["series", "recall", "precision"],
    "roc": ["series", "false_positive_rate", "true_positive_rate"],
    "reliability": ["series", "confidence", "accuracy", "rows"],
    "coverage": ["series", "coverage", "accuracy"],
}


def write_plots(folder: Path, tables: curves.Tables, training_log: Path) -> None:
    """Write every table, even one without rows: DVC fails a stage whose outputs are missing.

    Args:
        folder: is emptied first.
        tables: the rows of each table that applies to the task; the losses are added here.
        training_log: a DVCLive folder.
    """
    losses: list[curves.Row] = [
        (series, *row)
        for series, name in (("train", "train"), ("validation", "eval"))
        for row in curves.loss_rows(training_log / "plots/metrics" / name / "loss.tsv")
    ]
    tables = tables | {"loss": losses}
    assert set(tables) <= set(COLUMNS), "every table has its columns"
    shutil.rmtree(folder, ignore_errors=True)
    for name, columns in COLUMNS.items():
        curves.write_csv(folder / f"{name}.csv", columns, tables.get(name, []))
