"""The parts of a data set, and the rows that would let one part be answered from memory of another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stages.common.errors import UserError

PARTS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
# In an array of parts: a row that is in none of them.
DROPPED = -1
LISTED_LEAKS = 10

Integers = npt.NDArray[np.int64]
# Of a row each is kept in memory, so they are small: a part, and a digest of a text.
Parts = npt.NDArray[np.int8]
Keys = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """The columns that decide about a row's part, n rows each.

    Attributes:
        strata: int (n,), what is shared out in equal parts: with one label for each text its index in task.labels; with
            several that of the rarest one, and for a text without any the number of labels; 0 where answers are texts.
        labels: bool (n, number of labels), the labels that each row has.
        groups: 64 bits (n,), the column `group`.
        texts: 64 bits (n,), equal for texts that are the same after normalisation.
        published: small int (n,), index into PARTS; or None when no split is published.
    """

    strata: Integers
    labels: Flags
    groups: Keys
    texts: Keys
    published: Parts | None


class Leak(NamedTuple):
    """Two rows, by position in the table, that share a text or a group and are in two parts."""

    row: int
    part: int
    other_row: int
    other_part: int


def drop_leaks(parts: Parts, rows: Rows) -> tuple[Parts, list[Leak]]:
    """Find the rows that share a text or a group with a row of a later part, in the order train, validation, test.

    Args:
        parts: small int (n,), index into PARTS.
        rows: see `Rows`.

    Returns:
        The parts with DROPPED for such rows, so that test keeps all; and a leak for each of them, in row order.
    """
    clean = parts.copy()
    leaks: list[Leak] = []
    keys = [np.unique(column, return_inverse=True)[1].astype(np.int32) for column in (rows.texts, rows.groups)]
    # Validation first: a row that it loses takes nothing out of train.
    for part, other_part in ((VALIDATION, TEST), (TRAIN, TEST), (TRAIN, VALIDATION)):
        for key_of_row in keys:
            # Assigned backwards, so that the first row of the other part is the one that is named.
            others = np.flatnonzero(clean == other_part)[::-1]
            row_with_key = np.full(key_of_row.max(initial=-1) + 1, -1, np.int32)
            row_with_key[key_of_row[others]] = others
            found = np.flatnonzero((clean == part) & (row_with_key[key_of_row] >= 0))
            leaks += [Leak(row, part, int(row_with_key[key_of_row[row]]), other_part) for row in found.tolist()]
            clean[found] = DROPPED
    return clean, sorted(leaks)


def leakage_error(leaks: list[Leak], ids: dict[int, str]) -> UserError:
    """The error that lists the first leaks by the ids of their rows, see `LISTED_LEAKS`."""
    pairs = [
        f"{ids[leak.row]} ({PARTS[leak.part]}) and {ids[leak.other_row]} ({PARTS[leak.other_part]})"
        for leak in leaks[:LISTED_LEAKS]
    ]
    more = [f"and {len(leaks) - LISTED_LEAKS:,} more"] if len(leaks) > LISTED_LEAKS else []
    listed = "\n  ".join(pairs + more)
    return UserError(
        f"split: {len(leaks):,} rows have the same text (but for case and punctuation) or the same group as a row of "
        f"another part, so that the numbers would measure memory:\n  {listed}\n"
        "Set split.leakage to drop: such rows are taken out of train (then validation), and test keeps all its rows. "
        "Where no split is published, ingest.columns.group: null keeps equal texts in one part."
    )
