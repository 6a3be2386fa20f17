"""Time and memory of `review.compare` on synthetic predictions: `python -m benchmarks.compare --rows 100000`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.stages import PROJECT, in_own_process, measure
from stages.common.labels import join_labels
from stages.common.predictions import write_answers, write_predictions
from stages.common.tables import write_json
from tests.evaluated import edit_params
from tests.reviewed import Reviewed, edit_task_to_questions

COMMAND = [sys.executable, "-m", "review.compare", "HEAD~1", "HEAD", "--output", "comparison.md"]
SEED = 0
# Of one label: how many labels. Two have a ranking, and 77 a confusion matrix of 6,000 cells.
KINDS = {"2 labels": 2, "3 labels": 3, "77 labels": 77, "20 labels, several for a row": 20, "texts of 30 words": 0}
STRENGTHS = (1.0, 1.1)


def main() -> None:
    """Print a Markdown table: task, rows, seconds by the clock and of processor time, peak resident memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="test rows (default: 100,000)")
    parser.add_argument("--tasks", nargs="+", choices=KINDS, default=list(KINDS), metavar="TASK", help="default: all")
    options = parser.parse_args()
    rows = options.rows
    print("| task | test rows | seconds | CPU seconds | peak RSS, MiB |\n|---|---|---|---|---|", flush=True)
    for kind in options.tasks:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            folder = Path(name) / "project"
            in_own_process(prepare_project, folder, kind, rows)
            environment = os.environ | Reviewed(folder).environment | {"PYTHONPATH": str(PROJECT)}
            cost = measure(COMMAND, folder, environment)
        print(f"| {kind} | {rows:,} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {cost.peak_mib:,.0f} |", flush=True)


def prepare_project(folder: Path, kind: str, rows: int) -> None:
    """Make a repository whose last two commits have other predictions for the same rows."""
    folder.mkdir()
    project = Reviewed(folder)
    project.start()
    write_params(folder, kind)
    for part in ("validation", "test"):
        (folder / "data/splits").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"part": [part]}), folder / f"data/splits/{part}.parquet")
    for number, strength in enumerate(STRENGTHS):
        generator = np.random.default_rng([SEED, number])
        write_side(folder, kind, rows, strength, generator)
        project.commit(f"Side {number}", measure=False)


def write_params(folder: Path, kind: str) -> None:
    """Write params.yaml, and small files for all that is not compared."""
    labels, several = names_of(kind), "several" in kind
    positive = labels[1] if kind == "2 labels" else None
    threshold = {"method": "fixed", "value": 0.5} if several or positive else None
    task = {"labels": labels, "multi_label": several, "positive_label": positive}
    edit_params(folder, task, {"threshold": threshold, "bootstrap_samples": 2_000})
    if not labels:
        edit_task_to_questions(folder)
    write_json(folder / "metrics/metrics.json", {})
    write_json(folder / "metrics/validation.json", {})
    of_two = {"rule": "threshold", "positive_label": positive, "threshold": 0.5}
    of_sets = {"rule": "thresholds", "thresholds": dict.fromkeys(labels, 0.5)}
    write_json(folder / "models/decision.json", {"adapter": of_sets if several else of_two})
    for name in ("models/adapter", "data/predictions/base", "data/predictions/tfidf", "data/predictions/majority"):
        write_json(folder / name / "file.json", {})


def names_of(kind: str) -> list[str]:
    """The labels of a task."""
    return [f"label {number}" for number in range(KINDS[kind])]


def write_side(folder: Path, kind: str, rows: int, strength: float, generator: np.random.Generator) -> None:
    """Write predictions that lean towards the truth; about half of the rows that are wrong differ between sides."""
    labels, truth = names_of(kind), np.random.default_rng(SEED)
    for part, count in (("validation", 100), ("test", rows)):
        path, ids = folder / f"data/predictions/adapter/{part}.parquet", [f"row {row}" for row in range(count)]
        if not labels:
            words = np.array([f"word{number}" for number in range(1_000)])
            references = words[truth.integers(0, 1_000, (count, 30))]
            given = np.where(generator.random((count, 30)) < strength / 2, references, words[0])
            texts = [[" ".join(row) for row in table] for table in (references.tolist(), given.tolist())]
            likelihoods, tokens = -generator.random(count) * 60 / strength, truth.integers(31, 50, count)
            write_answers(path, ids, texts[0], texts[1], likelihoods, tokens)
            continue
        shape, several = (count, len(labels)), "several" in kind
        actual = (
            truth.random(shape) < 0.2 if several else np.eye(shape[1], dtype=bool)[truth.integers(0, shape[1], count)]
        )
        logits = (
            truth.normal(size=shape) + generator.normal(size=shape) / 2 + (2 * strength + shape[1] / 40) * actual - 1
        )
        odds = np.exp(logits)
        probabilities = odds / (1 + odds) if several else odds / odds.sum(axis=1, keepdims=True)
        given = probabilities >= 0.5 if several else probabilities == probabilities.max(axis=1, keepdims=True)
        cells = [[cell_of(labels, row, several) for row in table] for table in (actual, given)]
        write_predictions(path, ids, cells[0], cells[1], probabilities, labels, multi_label=several)


def cell_of(labels: list[str], row: np.ndarray, several: bool) -> str:
    """A row of labels as the tables hold it."""
    listed = [labels[place] for place in np.flatnonzero(row)]
    return join_labels(listed) if several else listed[0]


if __name__ == "__main__":
    main()
