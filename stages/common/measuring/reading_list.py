"""What people read after the numbers: rows to look at with their texts, and a screening's reading list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.common.measuring import curves
from stages.common.measuring.answers import Answers
from stages.common.spreadsheets import neutral
from stages.common.tables import open_table

LISTED_EXAMPLES = 20
COLUMNS = ["rank", "id", "slice", "probability", "selected"]
EXAMPLES_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "label", "adapter", "base")])


def rows_in_order(answers: Answers, positive: int, slices: Sequence[str | None]) -> list[curves.Row]:
    """All rows in the order in which they should be read: by falling probability of the positive label.

    Args:
        answers: decisions made, of n rows; rows of equal probability keep their order.
        positive: code of the positive label.
        slices: each row's slice, or None.

    Returns:
        Rank from 1 on, id, slice (an empty cell where there is none), probability, and whether the row was decided
        positive, as `true` or `false`. No rows where answers were generated: they have no order. People open this list
        in spreadsheets, so ids and slices are as `neutral` makes them; the predictions have them as they are.
    """
    if answers.probabilities is None:
        return []
    scores = answers.probabilities[:, positive]
    order = np.argsort(-scores, kind="stable").tolist()
    chosen = answers.predicted == positive
    shown = [None if part is None else neutral(part) for part in slices]
    return [
        (rank, neutral(answers.ids[row]), shown[row], float(scores[row]), "true" if chosen[row] else "false")
        for rank, row in enumerate(order, start=1)
    ]


def write_examples(path: Path, split: pa.Table, rows: np.ndarray, answers: Mapping[str, list[str]]) -> None:
    """Write rows to look at with their texts, labels and the answers of adapter and base.

    Args:
        path: the Parquet file; it holds texts, so it belongs in DVC's cache and not in Git.
        split: id, text and label of the whole part.
        rows: numbers of m rows, in the order to be written.
        answers: `adapter` and `base`: m answers each.
    """
    columns = split.take(pa.array(rows, pa.int64())).to_pydict() | dict(answers)
    with open_table(path, EXAMPLES_SCHEMA) as writer:
        writer.add_batch(pa.RecordBatch.from_pydict(columns, schema=EXAMPLES_SCHEMA))
