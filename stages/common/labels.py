"""Labels as the tables hold them: the one answer that is no label, and several labels in one cell."""

from __future__ import annotations

import json

# What a generated answer that matches no label is written as. It is part of the predictions' contract.
INVALID = "<invalid>"


def join_labels(labels: list[str]) -> str:
    """Several labels as one cell of a table: a JSON list.

    Args:
        labels: in the order of task.labels; empty gives "[]".
    """
    return json.dumps(labels, ensure_ascii=False)


def split_labels(cell: str) -> list[str]:
    """The labels that `join_labels` wrote into a cell, in their order."""
    labels: list[str] = json.loads(cell)
    return labels
