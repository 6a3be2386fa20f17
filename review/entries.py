"""The parts of a comparison's result: rows, metrics, labels and flips as values that JSON can hold."""

from __future__ import annotations

from typing import Any

from review.changes import Change, Comparison, Flips
from review.differences import RowChanges, numbers_of
from review.predictions import Predictions
from review.verdicts import SAME, UNKNOWN, WITHHELD, direction, noise_of, verdict
from stages.common.measuring.answers import Texts

LISTED_FLIPS = 20
# Numbers of metrics.json that are no metrics to compare.
COUNTS = {"n", "tp", "fp", "tn", "fn", "reference_words"}

Entry = dict[str, Any]


def row_entry(rows: RowChanges, show_labels: bool) -> Entry:
    """How the rows of a part differ.

    Args:
        rows: what differs.
        show_labels: whether labels may be shown: references are texts, which may have to stay out of Git.
    """
    return {
        "before": rows.before,
        "after": rows.after,
        "common": len(rows.kept[0]),
        "added": rows.added,
        "removed": rows.removed,
        "relabelled": [
            {"id": row_id} | ({"before": before, "after": after} if show_labels else {})
            for row_id, before, after in rows.relabelled
        ],
        "text_changed": rows.text_changed,
    }


def metric_entries(comparison: Comparison, noise: Entry | None, withheld: set[str] | None) -> dict[str, Entry]:
    """Each metric on the common rows.

    Args:
        comparison: of the common rows.
        noise: the content of metrics/noise.json, or None.
        withheld: metrics about which nothing is to be said; None for all of them.
    """
    entries = {}
    for name, change in comparison.metrics.items():
        said = SAME if comparison.same else verdict(name, change)
        if said is not None and (withheld is None or name in withheld):
            said = WITHHELD
        entries[name] = metric_entry(change, said) | {"noise": noise_of(noise, name, change)}
    return entries


def metric_entry(change: Change, said: str | None) -> Entry:
    """One metric, without what its noise is."""
    low, high = change.interval if change.interval is not None else (None, None)
    return {
        "before": change.before,
        "after": change.after,
        "difference": change.after - change.before,
        "low": low,
        "high": high,
        "p": change.p,
        "test": change.test,
        "verdict": said,
        "noise": None,
    }


def threshold_entry(predictions: tuple[Predictions, Predictions]) -> dict[str, Entry]:
    """The threshold of two labels, where both sides have one."""
    values = [one.rule.get("threshold") for one in predictions]
    if values[0] is None or values[1] is None:
        return {}
    return {"threshold": metric_entry(Change(values[0], values[1]), None)}


def class_entries(comparison: Comparison) -> dict[str, Entry]:
    """The F1 of each label."""
    return {
        label: {
            "before": change.before,
            "after": change.after,
            "difference": change.after - change.before,
            "support": change.support,
            "p": change.p,
        }
        for label, change in comparison.per_class.items()
    }


def flip_entry(
    flips: Flips, predictions: tuple[Predictions, Predictions], rows: RowChanges, texts: dict[str, str] | None
) -> Entry:
    """How many answers changed for better or worse, and the first of them.

    Args:
        flips: of the common rows.
        predictions: of both sides, all rows.
        rows: which are the common ones.
        texts: the second side's by id, where they may be shown.
    """
    return {
        "fixed": len(flips.fixed),
        "broken": len(flips.broken),
        "still_wrong": flips.still_wrong,
        "rows": {
            kind: [_flipped(flips, row, predictions, rows, texts) for row in listed[:LISTED_FLIPS].tolist()]
            for kind, listed in (("fixed", flips.fixed), ("broken", flips.broken))
        },
    }


def unpaired_entries(before: Entry, after: Entry, said: str) -> dict[str, Entry]:
    """Each metric of two blocks of metrics.json, with each side's own interval.

    Args:
        before: block of the first side.
        after: of the second.
        said: the verdict about all of them. "no change", where dvc.lock has the same predictions on both sides, is
            left to the equal ones: what differs was measured otherwise.
    """
    entries = {}
    others = numbers_of(after)
    for name, value in numbers_of(before).items():
        if name in COUNTS or name.endswith(("_low", "_high")) or name not in others:
            continue
        certain = said == SAME and value == others[name]
        change = Change(value, others[name], (0.0, 0.0) if certain else None, 1.0 if certain else None)
        here = UNKNOWN if said == SAME and not certain else said
        entries[name] = metric_entry(change, here if direction(name) else None) | {
            "own_intervals": [_interval(side, name) for side in (before, after)]
        }
    return entries


def unpaired_classes(before: Entry, after: Entry) -> dict[str, Entry]:
    """The F1 of each label in two blocks of metrics.json."""
    old, new = before.get("per_class", {}), after.get("per_class", {})
    return {
        label: {
            "before": scores["f1"],
            "after": new[label]["f1"],
            "difference": new[label]["f1"] - scores["f1"],
            "support": scores["support"],
            "p": None,
        }
        for label, scores in old.items()
        if label in new
    }


def _flipped(
    flips: Flips, row: int, predictions: tuple[Predictions, Predictions], rows: RowChanges, texts: dict[str, str] | None
) -> Entry:
    """A row; answers that are texts are shown where texts are."""
    place = int(rows.kept[1][row])
    row_id, answers = predictions[1].rows.ids[place], [one.answers for one in predictions]
    entry: Entry = {"id": row_id}
    if isinstance(answers[1], Texts):
        entry |= {"before": float(flips.before[row]), "after": float(flips.after[row])}
        if texts is not None:
            shown = [answers[0].predicted[int(rows.kept[0][row])], answers[1].predicted[place]]
            entry |= {"reference": answers[1].actual[place], "answers": shown}
    else:
        entry |= {"label": predictions[1].rows.labels[place], "before": flips.before[row], "after": flips.after[row]}
        entry["confidence"] = None if flips.confidence is None else float(flips.confidence[row])
    return entry | ({} if texts is None else {"text": texts.get(row_id, "")})


def _interval(block: Entry, name: str) -> list[float] | None:
    ends = [f"{name}_low", f"{name}_high"]
    return [block[end] for end in ends] if block.keys() >= set(ends) else None
