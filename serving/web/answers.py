"""Rows with their answers, decided again whenever the page's threshold moves, and as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from serving.batch.rows import Row
from serving.common.adapter import Adapter
from serving.predictor import Predictor, decide
from stages.common.labels import join_labels
from stages.common.spreadsheets import neutral

# Answered at a time, between two moves of the progress bar.
ROWS_AT_ONCE = 64
# The least probability that is asked for at first: more likely than all other labels together.
LEAST_PROBABILITY = 0.5

SLIDER_STEP = 0.001

# A row of the page: id, text, and what `Predictor.predict` answers, or error.
Line = dict[str, Any]


class Threshold(NamedTuple):
    """The one number that can be moved in the page, if there is one.

    Attributes:
        decides: "positive": from which probability on the positive label is answered. "unsure": below which an answer
            is marked as unsure. "labels": each label has its own, which the page shows and does not move.
        value: at first.
        positive_label: with "positive".
    """

    decides: str
    value: float
    positive_label: str | None

    @property
    def at_first(self) -> float:
        """Where a slider with SLIDER_STEP stands for `value`."""
        return round(min(max(self.value, 0.0), 1.0), 3)

    def moved(self, position: float) -> float:
        """What a slider's position means: untouched it is `value` itself, whose further digits may decide a row."""
        return self.value if position == self.at_first else float(position)


def threshold_of(adapter: Adapter) -> Threshold:
    """What the adapter's kind of task and decision rule make of it."""
    if adapter.kind == "multi_label":
        return Threshold("labels", 0.0, None)
    if adapter.rule is not None and adapter.rule["rule"] == "threshold":
        return Threshold("positive", float(adapter.rule["threshold"]), str(adapter.rule["positive_label"]))
    return Threshold("unsure", LEAST_PROBABILITY, None)


def answer_rows(predictor: Predictor, rows: Sequence[Row], advance: Callable[[int], object]) -> list[Line]:
    """Answer rows in their order; those without a text keep their place, with an error.

    Args:
        predictor: of a classification adapter.
        rows: n rows.
        advance: is told how many are done, from 0 to n.
    """
    lines: list[Line] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        advance(start)
        batch = rows[start : start + ROWS_AT_ONCE]
        answers = iter(predictor.predict([row.content for row in batch if row.content is not None]))
        for row in batch:
            found = {"error": row.problem} if row.content is None else next(answers)
            lines.append({"id": row.id, "text": row.content or "", **found})
    advance(len(rows))
    return lines


def decided(line: Line, threshold: Threshold, position: float) -> Line:
    """A row as the page's threshold makes it.

    Args:
        line: from `answer_rows`.
        threshold: the adapter's.
        position: where its slider stands.

    Returns:
        With "positive" label and threshold follow the slider; with "unsure" there is also `unsure`, whether the
        likeliest label has less than `least_probability`.
    """
    value = threshold.moved(position)
    if "error" in line or threshold.decides == "labels":
        return line
    if threshold.decides == "unsure":
        return line | {"unsure": max(line["probabilities"].values()) < value, "least_probability": value}
    rule = {"rule": "threshold", "positive_label": threshold.positive_label, "threshold": value}
    return line | decide(line["probabilities"], rule)


def as_csv(lines: Sequence[Line], labels: Sequence[str]) -> str:
    """The rows as CSV that spreadsheets open without computing anything.

    Cells that begin as a formula does get an apostrophe in front, which spreadsheets take for "this is text". Nothing
    else of ids and texts changes.

    Args:
        lines: decided, in order.
        labels: the adapter's, in order.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    rows = [_cells(line, labels) for line in lines]
    # Every row that has an answer has the same columns; so has one without, empty.
    names = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in ("shortened", "error") if name in names]
    columns = [name for name in names if name not in last] + last
    writer.writerow([neutral(name) for name in columns])
    writer.writerows([[neutral(row[name]) if name in row else "" for name in columns] for row in rows])
    return file.getvalue()


def _cells(line: Line, labels: Sequence[str]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name, value in line.items():
        if name == "labels":
            found[name] = join_labels(value)
        elif isinstance(value, Mapping):
            singular = {"probabilities": "probability", "thresholds": "threshold"}[name]
            found |= {f"{singular}.{label}": value[label] for label in labels}
        else:
            found[name] = value
    return {name: _text(value) for name, value in found.items()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
