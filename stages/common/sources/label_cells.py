"""From a cell to a label of the task, or to several: as it is, through aliases, from a number, from a list."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

from stages.common.labels import join_labels
from stages.common.schema.ingest import AliasLabel, BinLabel, ListLabel
from stages.common.sources.cells import RefusedRow, as_list, as_text, shown


def label_maker(source: str | AliasLabel | BinLabel, labels: list[str]) -> Callable[[str], str]:
    """How a cell's text becomes one label; it raises RefusedRow for a text that does not.

    Args:
        source: params.ingest.columns.label.
        labels: params.task.labels.
    """
    if isinstance(source, BinLabel):
        return lambda value: labels[bisect.bisect_left(source.bins, _number(value))]
    known = _known(source.aliases if isinstance(source, AliasLabel) else None, labels)

    def label_of(value: str) -> str:
        label = known.get(value)
        if label is not None:
            return label
        if not value.strip():
            raise RefusedRow("the label is empty", "empty label")
        raise RefusedRow(f"unknown label {shown(value)}", "unknown label")

    return label_of


def list_maker(source: ListLabel, labels: list[str]) -> Callable[[Any], str]:
    """How a cell becomes several labels, written by `join_labels`; it raises RefusedRow for a cell that does not.

    With a separator, white space around a label is taken off, and nothing between two separators is no label.

    Args:
        source: params.ingest.columns.label.
        labels: params.task.labels, whose order the labels of a row take; each is there once.
    """
    known = _known(source.aliases, labels)

    def labels_of(value: Any) -> str:
        if source.separator is None:
            names = [as_text(item) for item in as_list(value, "the label")]
        else:
            names = [part for part in map(str.strip, as_text(value).split(source.separator)) if part]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise RefusedRow(f"unknown label {shown(unknown)} in the list {shown(value)}", "unknown label")
        found = {known[name] for name in names}
        return join_labels([label for label in labels if label in found])

    return labels_of


def _known(aliases: dict[str, str] | None, labels: list[str]) -> dict[str, str]:
    return {label: label for label in labels} if aliases is None else aliases


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        reason = f"the label's value {shown(value)} is no number" if value.strip() else "the label's value is empty"
        raise RefusedRow(reason, "label value is no number")
    return number
