"""What differs beside the predictions: parameters, the rows of a part, the predictors that no training touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# A predictor that training cannot change.
BASELINES = ("base", "tfidf", "majority")
# Another processor moves the base's log loss by some millionths.
BASELINE_TOLERANCE = 1e-4


class Rows(NamedTuple):
    """The rows of a part on one side: ids, labels (or references) and, where they are known, texts."""

    ids: list[str]
    labels: list[str]
    texts: dict[str, str] | None


class RowChanges(NamedTuple):
    """How the rows of a part differ.

    Attributes:
        before: number of rows on the first side.
        after: on the second.
        added: ids that only the second side has, in its order.
        removed: ids that only the first has.
        relabelled: id, label before and label after.
        text_changed: ids whose text is another one; None where it is not known.
        kept: row numbers of the common rows on the first side and on the second, each in the second's order: those
            with the same id and label and, as far as texts are known, the same text.
    """

    before: int
    after: int
    added: list[str]
    removed: list[str]
    relabelled: list[tuple[str, str, str]]
    text_changed: list[str] | None
    kept: tuple[np.ndarray, np.ndarray]

    @property
    def same(self) -> bool:
        """Whether all rows are known to be common ones."""
        return len(self.kept[0]) == self.before == self.after and self.text_changed is not None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, as `dvc params diff` names them; lists and empty blocks are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_parameters(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """The keys whose value changed: `key`, and `before` and `after` unless the key is absent there."""
    old, new = flatten(before), flatten(after)
    return [
        {"key": key} | ({"before": old[key]} if key in old else {}) | ({"after": new[key]} if key in new else {})
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def numbers_of(block: dict[str, Any]) -> dict[str, float]:
    """The numbers of a block of metrics.json, without those of labels and slices."""
    return {name: value for name, value in block.items() if not isinstance(value, dict)}


def changed_rows(before: Rows, after: Rows, texts_are_same: bool) -> RowChanges:
    """Compare the rows of a part by id.

    Args:
        before: of the first side.
        after: of the second.
        texts_are_same: whether no text needs to be looked at, since the files that hold them are the same.
    """
    places = {row_id: row for row, row_id in enumerate(before.ids)}
    shared = [(places[row_id], row) for row, row_id in enumerate(after.ids) if row_id in places]
    relabelled = [
        (after.ids[new], before.labels[old], after.labels[new])
        for old, new in shared
        if before.labels[old] != after.labels[new]
    ]
    text_changed = [] if texts_are_same else _changed_texts(before, after, [after.ids[new] for _, new in shared])
    dropped = {row_id for row_id, *_ in relabelled} | set(text_changed or [])
    kept = [pair for pair in shared if after.ids[pair[1]] not in dropped]
    known = {after.ids[new] for _, new in shared}
    columns = np.array(kept, np.int64).reshape(-1, 2)
    return RowChanges(
        len(before.ids),
        len(after.ids),
        added=[row_id for row_id in after.ids if row_id not in known],
        removed=[row_id for row_id in before.ids if row_id not in known],
        relabelled=relabelled,
        text_changed=text_changed,
        kept=(columns[:, 0], columns[:, 1]),
    )


def moved_baselines(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The predictors that no training touches and whose numbers differ nevertheless.

    Args:
        before: blocks of metrics.json.
        after: of the second side.

    Returns:
        By predictor and metric, the values before and after; ends of intervals and numbers of labels are left out.
    """
    moved = {}
    for name in BASELINES:
        old, new = (numbers_of(blocks.get(name, {})) for blocks in (before, after))
        metrics = {
            metric: [value, new[metric]]
            for metric, value in old.items()
            if metric in new
            and not metric.endswith(("_low", "_high"))
            and abs(new[metric] - value) > BASELINE_TOLERANCE
        }
        if metrics:
            moved[name] = metrics
    return moved


def take(answers: Any, rows: np.ndarray) -> Any:
    """Some rows of a predictor's answers (`Answers`, `LabelSets` or `Texts`), in the order given."""
    if np.array_equal(rows, np.arange(len(answers.ids))):
        return answers
    columns = {name: _take(column, rows) for name, column in answers._asdict().items()}
    return answers._replace(**columns)


def _take(column: Sequence[str] | np.ndarray | None, rows: np.ndarray) -> Any:
    if column is None or isinstance(column, np.ndarray):
        return None if column is None else column[rows]
    return [column[row] for row in rows]


def _changed_texts(before: Rows, after: Rows, ids: list[str]) -> list[str] | None:
    if before.texts is None or after.texts is None:
        return None
    old, new = before.texts, after.texts
    return [row_id for row_id in ids if old.get(row_id) != new.get(row_id)]
