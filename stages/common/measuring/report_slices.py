"""The report's table of slices: the topics of a screening, say, or the sources of a mixture."""

from __future__ import annotations

from typing import Any

from stages.common.measuring.markdown import literal, markdown_table
from stages.common.measuring.report_columns import Column, interval, plain

LISTED_SLICES = 50


def slice_tables(per_slice: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each slice, in the given order, and what is to be said about it; nothing without slices.

    Args:
        per_slice: of a predictor's block.
    """
    if not per_slice:
        return []
    largest = sorted(per_slice, key=lambda name: -per_slice[name]["n"])[:LISTED_SLICES]
    columns = _slice_columns(next(iter(per_slice.values())))
    table = markdown_table(
        ["slice", *(title for title, _ in columns)],
        [
            [literal(name), *(show(scores) for _, show in columns)]
            for name, scores in per_slice.items()
            if name in largest
        ],
    )
    notes = []
    if len(largest) < len(per_slice):
        notes.append(
            f"The {len(largest):,} largest of {len(per_slice):,} slices; `metrics/metrics.json` has all of them."
        )
    if any("recall_low" in scores for scores in per_slice.values()):
        notes.append("These intervals are exact (Clopper & Pearson).")
    return [table, *([" ".join(notes)] if notes else [])]


def _slice_columns(scores: dict[str, Any]) -> list[Column]:
    rows = plain("rows", "n")
    if "rows_selected" in scores:
        positive = [plain("positive", "support"), interval("recall", "recall"), plain("precision", "precision")]
        return [rows, *positive, plain("rows to read", "rows_selected")]
    if "token_f1" in scores:
        return [rows, plain("token F1", "token_f1"), plain("ROUGE-L", "rouge_l")]
    return [rows, plain("accuracy", "accuracy"), plain("macro-F1", "f1_macro")]
