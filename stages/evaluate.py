"""Predictions become numbers: metrics of both parts, decision thresholds chosen on validation, and data for plots."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from stages.common.errors import UserError, run_stage
from stages.common.measuring import curves, generated_texts, multi_label, reading_list, single_label
from stages.common.measuring.answers import remedy
from stages.common.measuring.evaluation_plots import DRAWN, write_plots
from stages.common.measuring.slices import slice_rows
from stages.common.params import load_params
from stages.common.progress import progress
from stages.common.schema.task import GenerationTask, Task
from stages.common.tables import read_json, read_table, write_json

PREDICTORS = ("adapter", "base", "tfidf", "majority")
SPLITS = Path("data/splits")
PREDICTIONS = Path("data/predictions")
TRAINING_LOG = Path("models/adapter/training_log")
METRICS = {"test": Path("metrics/metrics.json"), "validation": Path("metrics/validation.json")}
TRAINING_METRICS = Path("metrics/training.json")
PLOTS = Path("metrics/evaluation")
DECISION = Path("models/decision.json")
EXAMPLES = Path("data/examples.parquet")
READING_LIST = Path("data/reading_list.csv")


def measures_of(task: Task) -> ModuleType:
    """The module that measures answers to this kind of task; all three have the same functions."""
    if isinstance(task, GenerationTask):
        return generated_texts
    return multi_label if task.multi_label else single_label


def read_split(part: str) -> pa.Table:
    """Id, label and slice of a part's rows.

    Raises:
        UserError: it has no rows.
    """
    path = SPLITS / f"{part}.parquet"
    table = read_table(path, ["id", "label", "slice"])
    if not table.num_rows:
        raise UserError(f"{path}: has no rows to evaluate. Raise split.{part}_share, then run `dvc repro`.")
    return table


def read_part(part: str, split: pa.Table, task: Task) -> dict[str, Any]:
    """Each predictor's answers to a part, checked to be answers to the very rows of its split, in their order.

    Raises:
        UserError: the split has other labels, or a file's ids or labels are not the split's.
    """
    split_path, measures = SPLITS / f"{part}.parquet", measures_of(task)
    ids, actual = split["id"].to_pylist(), measures.truth(split_path, split["label"].to_pylist(), task)
    answers = {}
    for name in PREDICTORS:
        path = PREDICTIONS / name / f"{part}.parquet"
        answers[name] = measures.read(path, task)
        found = answers[name].actual
        _check_rows(path, split_path, answers[name].ids, ids, "ids")
        _check_rows(path, split_path, found.tolist() if isinstance(found, np.ndarray) else found, actual, "labels")
    return answers


def training_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of the training's summary; what it does not have (no best step, say) is left out."""
    return {name: value for name, value in summary.items() if isinstance(value, int | float) and math.isfinite(value)}


def write_rows_to_read(decided: dict[str, Any], split: pa.Table, task: Task, rows: np.ndarray) -> None:
    """Write data/examples.parquet and data/reading_list.csv; the latter has rows with two labels alone."""
    texts = split.append_column("text", read_table(SPLITS / "test.parquet", ["text"])["text"])
    shown = {name: measures_of(task).predictions(decided[name], rows, task) for name in ("adapter", "base")}
    reading_list.write_examples(EXAMPLES, texts.select(["id", "text", "label"]), rows, shown)
    listed: list[curves.Row] = []
    if not isinstance(task, GenerationTask) and task.positive_label is not None:
        positive = task.labels.index(task.positive_label)
        listed = reading_list.rows_in_order(decided["adapter"], positive, split["slice"].to_pylist())
    curves.write_csv(READING_LIST, reading_list.COLUMNS, listed)


def main() -> None:
    """Write metrics/*.json, metrics/evaluation/, models/decision.json, and what people read in data/."""
    params = load_params("evaluate", "task")
    task, measures = params.task, measures_of(params.task)
    splits = {part: read_split(part) for part in METRICS}
    parts = {part: read_part(part, split, task) for part, split in splits.items()}
    rules = {name: measures.decision_rule(parts["validation"][name], task, params.evaluate) for name in PREDICTORS}
    decided = {
        part: {name: measures.decide(answers[name], rules[name], task) for name in PREDICTORS}
        for part, answers in parts.items()
    }
    blocks: dict[str, dict[str, Any]] = {part: {} for part in METRICS}
    with progress(len(METRICS) * len(PREDICTORS), "scoring", "predictor") as bar:
        for part, answers in decided.items():
            slices = slice_rows(splits[part]["slice"].to_pylist())
            for name in PREDICTORS:
                blocks[part][name] = measures.score(answers[name], rules[name], task, params.evaluate, slices)
                bar.update()
    drawn = {name: decided["test"][name] for name in DRAWN}
    write_plots(PLOTS, measures.plot_tables(drawn, blocks["test"], task, params.evaluate), TRAINING_LOG)
    examples = measures.example_rows(decided["test"]["adapter"], reading_list.LISTED_EXAMPLES, params.evaluate)
    write_rows_to_read(decided["test"], splits["test"], task, examples)
    for part, path in METRICS.items():
        write_json(path, blocks[part])
    write_json(TRAINING_METRICS, training_metrics(read_json(TRAINING_LOG / "summary.json")))
    write_json(DECISION, rules)
    key, title = measures.HEADLINE
    shown = ", ".join(f"{name} {block[key]:.3f}" for name, block in blocks["test"].items())
    print(f"evaluate: {blocks['test']['adapter']['n']:,} test rows, {title}: {shown}")


def _check_rows(path: Path, split_path: Path, found: list[Any], expected: list[Any], what: str) -> None:
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False), start=1)
    different = next((row for row, (one, other) in pairs if one != other), min(len(found), len(expected)) + 1)
    raise UserError(
        f"{path}: its {what} are not those of {split_path}: {len(found):,} rows against {len(expected):,}, the first "
        f"difference in row {different:,}. {remedy(path)}"
    )


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
