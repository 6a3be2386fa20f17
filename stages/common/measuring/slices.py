"""Numbers for the rows of each slice: the topics of a screening, say, or the sources of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.common.measuring.metrics import exact_interval, per_label_scores

Slices = dict[str, np.ndarray]


def slice_rows(values: Sequence[str | None]) -> Slices:
    """The row numbers of each slice, names sorted; a row without a slice is in none, and without any there is none."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None:
            rows.setdefault(value, []).append(row)
    return {name: np.array(rows[name]) for name in sorted(rows)}


def screening_scores(matrix: np.ndarray, positive: int) -> dict[str, float]:
    """What a decision between two labels does to the rows of one slice.

    Unlike those of the whole part, rates without rows are left out: a recall of 0 would read as papers missed.

    Args:
        matrix: counts of shape (2, 3), as `confusion_matrix` makes them.
        positive: code of the positive label.

    Returns:
        n, support (positive rows), recall with its exact 95 % interval, precision, and rows_selected.
    """
    found, support = int(matrix[positive, positive]), int(matrix[positive].sum())
    # As in `two_class_scores`, an invalid answer to a negative row is a false positive.
    wrong = int(matrix[1 - positive].sum() - matrix[1 - positive, 1 - positive])
    scores: dict[str, float] = {"n": int(matrix.sum()), "support": support}
    if support:
        low, high = exact_interval(found, support)
        scores |= {"recall": found / support, "recall_low": low, "recall_high": high}
    if found + wrong:
        scores["precision"] = found / (found + wrong)
    return scores | {"rows_selected": rows_selected(matrix, positive)}


def rows_selected(matrix: np.ndarray, positive: int) -> int:
    """Rows that somebody still has to read: all that were not decided negative, invalid answers among them."""
    return int(matrix.sum() - matrix[:, 1 - positive].sum())


def label_scores(matrix: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 of one slice with several labels.

    The macro-average is over the labels that the slice's rows or answers have: a topic without a label is no failure.

    Args:
        matrix: counts of shape (k, k + 1), as `confusion_matrix` makes them, of at least one row.
    """
    seen = (matrix.sum(axis=1) + matrix[:, :-1].sum(axis=0)) > 0
    return {
        "n": int(matrix.sum()),
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "f1_macro": float(per_label_scores(matrix).f1[seen].mean()),
    }
