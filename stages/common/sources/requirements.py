"""What has to hold of the rows that stay, so that there is something to learn and to measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.errors import UserError, listing
from stages.common.labels import split_labels
from stages.common.schema.task import GenerationTask, Task
from stages.common.sources.gather import Rows, spool_counts

# More than this is no slice column but a mistake: an id, or a text.
MOST_SLICES = 1_000


def label_counts(rows: Rows, kept: NDArray[np.intp], spool: Path, task: Task) -> dict[str, int]:
    """How many of the rows that stay have each label, in the order of task.labels; empty where labels are answers."""
    if isinstance(task, GenerationTask):
        return {}
    if not task.multi_label:
        return {label: int((rows["label"] == number).sum()) for number, label in enumerate(task.labels)}
    counts = dict.fromkeys(task.labels, 0)
    for cell, count in spool_counts(spool, kept, "label").items():
        for label in split_labels(cell):
            counts[label] += count
    return counts


def require_labels(count: int, per_label: dict[str, int], task: Task) -> None:
    """Stop when there is nothing to tell apart. Of questions and conversations any number can be learned from.

    Args:
        count: rows left.
        per_label: rows left of each label of params.task.labels; empty where labels are answers.
        task: params.task.

    Raises:
        UserError: a label has no row; or, where a row can have several labels, no row is without it.
    """
    if isinstance(task, GenerationTask):
        assert count, "a share of refused rows below 1 leaves a row"
        return
    if not task.multi_label:
        _require_two_labels(per_label)
    _require_every_label(per_label)
    always = [repr(label) for label, with_it in per_label.items() if with_it == count]
    if always:
        raise UserError(
            f"task.labels: all {count:,} rows left have {listing(always)}: there is nothing to tell apart. Remove it "
            "from task.labels, add rows without it, or check ingest.columns.label."
        )


def _require_two_labels(per_label: dict[str, int]) -> None:
    present = [label for label, count in per_label.items() if count]
    if len(present) == 1:
        raise UserError(
            f"all {per_label[present[0]]:,} rows left have the label {present[0]!r}: there is nothing to tell apart. "
            "Add rows of the other labels, or check ingest.columns.label."
        )


def _require_every_label(per_label: dict[str, int]) -> None:
    absent = [repr(label) for label, count in per_label.items() if not count]
    if absent:
        raise UserError(
            f"task.labels: no row is left with {listing(absent)}. Remove it from task.labels, add rows, or check "
            "ingest.columns.label."
        )


def slice_counts(kept: NDArray[np.intp], spool: Path) -> dict[str, int]:
    """How many of the rows that stay are in each slice, sorted by name; empty without slices.

    Raises:
        UserError: there are more slices than anybody could compare.
    """
    counts = spool_counts(spool, kept, "slice")
    if len(counts) > MOST_SLICES:
        raise UserError(
            f"ingest.columns.slice: has {len(counts):,} different values, and metrics would be given for each; at most "
            f"{MOST_SLICES:,} are. Choose a column with fewer, or null."
        )
    return dict(sorted(counts.items()))
