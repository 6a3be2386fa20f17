"""Prediction files: one row for each row of a split, in its order, with a probability for each label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.common.labels import INVALID
from stages.common.tables import ROWS_PER_GROUP, open_table


def write_predictions(
    path: str | Path,
    ids: Sequence[str],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: np.ndarray | None,
    label_names: Sequence[str],
) -> None:
    """Write id, label, prediction and `probability.<label>` for each name; no rows give a file with columns alone.

    Args:
        path: the Parquet file, written whole or not at all.
        ids: n row ids, in the split's order.
        labels: n true labels.
        predictions: n predicted labels, each one of `label_names` or `<invalid>`.
        probabilities: float64 of shape (n, k), rows summing to 1; None (all null) where answers were generated.
        label_names: the k labels, in the order of the columns.
    """
    assert len(ids) == len(labels) == len(predictions), "one label and one prediction for each id"
    assert set(predictions) <= {*label_names, INVALID}, "a prediction is a label or <invalid>"
    strings = {"id": ids, "label": labels, "prediction": predictions}
    columns = {name: pa.array(values, pa.string()) for name, values in strings.items()}
    for index, name in enumerate(label_names):
        if probabilities is None:
            columns[probability_column(name)] = pa.nulls(len(ids), pa.float64())
        else:
            assert probabilities.shape == (len(ids), len(label_names)), "one probability for each row and label"
            columns[probability_column(name)] = pa.array(np.ascontiguousarray(probabilities[:, index]), pa.float64())
    table = pa.table(columns)
    with open_table(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=ROWS_PER_GROUP):
            writer.add_batch(batch)


def probability_column(label: str) -> str:
    """The name of a label's column."""
    return f"probability.{label}"
