"""A folder with all that evaluate reads: splits, predictions of some worth, a training log, params.yaml."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from stages.common.labels import INVALID, join_labels
from stages.common.predictions import write_predictions

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = {"adapter": 2.0, "base": 0.5, "tfidf": 1.0, "majority": 0.0}


class Work:
    """The folder, and what evaluate made of it."""

    def __init__(
        self,
        folder: Path,
        labels: list[str],
        rows: int = 120,
        multi_label: bool = False,
        slices: list[str] | None = None,
        **changed: Any,
    ) -> None:
        self.folder, self.labels, self.multi_label = folder, labels, multi_label
        self.edit_params(labels, changed)
        generator = np.random.default_rng(0)
        for part in ("validation", "test"):
            ids = [f"{part}-{row}" for row in range(rows)]
            actual = np.zeros((rows, len(labels)), dtype=bool)
            if multi_label:
                actual = generator.random(actual.shape) < 0.3
            else:
                codes = generator.integers(0, len(labels), rows)
                codes[: len(labels)] = np.arange(len(labels))[:rows]
                actual[np.arange(rows), codes] = True
            self.write_split(part, ids, self.cells(actual), slices)
            for name, strength in STRENGTHS.items():
                logits = generator.normal(size=actual.shape) * (strength > 0)
                odds = np.exp(logits + strength * actual)
                self.write(name, part, odds / (1 + odds if multi_label else odds.sum(axis=1, keepdims=True)))
        write_training_log(folder)

    def edit_params(self, labels: list[str], changed: dict[str, Any]) -> None:
        positive = labels[1] if len(labels) == 2 and not self.multi_label else None
        threshold = {"method": "max_f1"} if positive or self.multi_label else None
        task = {"labels": labels, "multi_label": self.multi_label, "positive_label": positive}
        edit_params(self.folder, task, {"threshold": threshold} | changed)

    def cells(self, sets: np.ndarray) -> list[str]:
        """Rows of a bool matrix as the tables hold them."""
        listed = [[label for label, applies in zip(self.labels, row, strict=True) if applies] for row in sets]
        return [join_labels(row) if self.multi_label else row[0] for row in listed]

    def write_split(self, part: str, ids: list[str], labels: list[str], slices: list[str] | None = None) -> None:
        write_split(self.folder, part, ids, labels, slices)

    def split(self, part: str) -> tuple[list[str], list[str]]:
        table = pq.read_table(self.folder / f"data/splits/{part}.parquet")
        return table["id"].to_pylist(), table["label"].to_pylist()

    def write(
        self, name: str, part: str, probabilities: np.ndarray | None, predictions: list[str] | None = None
    ) -> None:
        ids, labels = self.split(part)
        if predictions is None:
            assert probabilities is not None
            likeliest = probabilities == probabilities.max(axis=1, keepdims=True)
            predictions = self.cells(probabilities >= 0.5 if self.multi_label else likeliest)
        path = self.folder / f"data/predictions/{name}/{part}.parquet"
        write_predictions(path, ids, labels, predictions, probabilities, self.labels, multi_label=self.multi_label)

    def write_generated(self, name: str, invalid: int) -> None:
        """Right answers without probabilities, but for the first rows, whose answers are invalid."""
        for part in ("validation", "test"):
            answers = self.split(part)[1]
            self.write(name, part, None, [INVALID] * invalid + answers[invalid:])

    def probabilities(self, name: str, part: str) -> np.ndarray:
        table = pq.read_table(self.folder / f"data/predictions/{name}/{part}.parquet")
        return np.stack([table[f"probability.{label}"].to_numpy() for label in self.labels], axis=1)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def csv(self, name: str) -> list[dict[str, str]]:
        with (self.folder / f"metrics/evaluation/{name}.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def reading_list(self) -> list[dict[str, str]]:
        with (self.folder / "data/reading_list.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def examples(self) -> list[dict[str, str]]:
        return pq.read_table(self.folder / "data/examples.parquet").to_pylist()

    def everything(self) -> dict[str, bytes]:
        named = [self.folder / name for name in ("models/decision.json", "data/reading_list.csv")]
        paths = [*(self.folder / "metrics").rglob("*.*"), *named]
        return {str(path): path.read_bytes() for path in paths}


def edit_params(folder: Path, task: dict[str, Any], evaluate: dict[str, Any]) -> None:
    """Write the default recipe with some keys of these two blocks changed."""
    yaml = YAML()
    values = yaml.load(ROOT / "recipes/tweet-sentiment.yaml")
    values["task"] |= task
    values["evaluate"] |= {"bootstrap_samples": 100} | evaluate
    yaml.dump(values, folder / "params.yaml")


def write_split(folder: Path, part: str, ids: list[str], labels: list[str], slices: list[str] | None) -> None:
    """Write a split; slices, where given, are repeated over its rows."""
    (folder / "data/splits").mkdir(parents=True, exist_ok=True)
    columns = {"id": ids, "text": [f"secret text of {row}" for row in ids], "label": labels}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    of_rows = [slices[row % len(slices)] if slices else None for row in range(len(ids))]
    table = table.append_column("slice", pa.array(of_rows, pa.string()))
    pq.write_table(table, folder / f"data/splits/{part}.parquet")


def write_training_log(folder: Path) -> None:
    """Write what DVCLive and the finetune stage leave: 399 steps, no best one."""
    log = folder / "models/adapter/training_log/plots/metrics"
    for name in ("train", "eval"):
        (log / name).mkdir(parents=True)
        lines = [f"{step}\t{1 / step}" for step in range(1, 400)]
        (log / name / "loss.tsv").write_text("\n".join(["step\tloss", *lines]) + "\n")
    summary = {"steps": 399, "epochs": 1.5, "best_step": None, "final_train_loss": math.nan}
    (folder / "models/adapter/training_log/summary.json").write_text(json.dumps(summary))


def finite_numbers_only(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite_numbers_only(item) for item in value.values())
    return isinstance(value, int | float) and math.isfinite(value)
