"""Prediction files: one row for each row of a split, in its order, with a probability for each label or a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.common.labels import INVALID, split_labels
from stages.common.tables import ROWS_PER_GROUP, open_table


def write_predictions(
    path: str | Path,
    ids: Sequence[str],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: np.ndarray | None,
    label_names: Sequence[str],
    *,
    multi_label: bool = False,
) -> None:
    """Write id, label, prediction and `probability.<label>` for each name; no rows give a file with columns alone.

    Args:
        path: the Parquet file, written whole or not at all.
        ids: n row ids, in the split's order.
        labels: n true labels; with several for a row, the cells that `join_labels` makes.
        predictions: n predicted labels, each one of `label_names` or `<invalid>`; or such cells.
        probabilities: float64 of shape (n, k); rows sum to 1, or with several labels for a row each number stands by
            itself. None (all null) where answers were generated.
        label_names: the k labels, in the order of the columns.
        multi_label: whether a row can have several labels, or none.
    """
    found = {label for cell in predictions for label in split_labels(cell)} if multi_label else set(predictions)
    assert found <= {*label_names, *(() if multi_label else (INVALID,))}, "a prediction is a label or <invalid>"
    columns = _strings(ids, labels, predictions)
    for index, name in enumerate(label_names):
        if probabilities is None:
            columns[probability_column(name)] = pa.nulls(len(ids), pa.float64())
        else:
            assert probabilities.shape == (len(ids), len(label_names)), "one probability for each row and label"
            columns[probability_column(name)] = pa.array(np.ascontiguousarray(probabilities[:, index]), pa.float64())
    _write(path, columns)


def write_answers(
    path: str | Path,
    ids: Sequence[str],
    references: Sequence[str],
    answers: Sequence[str],
    log_likelihoods: np.ndarray | None,
    tokens: np.ndarray | None,
) -> None:
    """Write id, label, prediction, `reference_log_likelihood` and `reference_tokens`; no rows give columns alone.

    Args:
        path: the Parquet file, written whole or not at all.
        ids: n row ids, in the split's order.
        references: n answers that people wrote.
        answers: n answers of the predictor; may be empty texts.
        log_likelihoods: natural logarithms of the references' likelihoods, (n,), at most 0; None (all null) for a
            predictor without any.
        tokens: how many tokens each reference has, its terminator included, (n,); None (all null) likewise.
    """
    columns = _strings(ids, references, answers)
    for name, values, kind in (
        ("reference_log_likelihood", log_likelihoods, pa.float64()),
        ("reference_tokens", tokens, pa.int64()),
    ):
        assert values is None or len(values) == len(ids), "one number for each row"
        columns[name] = pa.nulls(len(ids), kind) if values is None else pa.array(values, kind)
    _write(path, columns)


def probability_column(label: str) -> str:
    """The name of a label's column."""
    return f"probability.{label}"


def _strings(ids: Sequence[str], labels: Sequence[str], predictions: Sequence[str]) -> dict[str, pa.Array]:
    assert len(ids) == len(labels) == len(predictions), "one label and one prediction for each id"
    strings = {"id": ids, "label": labels, "prediction": predictions}
    return {name: pa.array(values, pa.string()) for name, values in strings.items()}


def _write(path: str | Path, columns: dict[str, pa.Array]) -> None:
    table = pa.table(columns)
    with open_table(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=ROWS_PER_GROUP):
            writer.add_batch(batch)
