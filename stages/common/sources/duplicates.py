"""Which of many rows repeat an earlier one, from 64-bit digests: a million rows cost a few megabytes.

Two different values among a million share a 64-bit digest with a probability of 3e-8 (birthday bound, n^2 / 2^65).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def first_positions(digests: NDArray[np.int64]) -> NDArray[np.intp]:
    """For each value the position of the first one equal to it; its own position where it is the first.

    Args:
        digests: shape (rows,).

    Returns:
        Positions, shape (rows,).
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


class RepeatedTexts(NamedTuple):
    """Texts that occur more than once under the same text key.

    Args:
        texts: how many text keys.
        rows: how many rows have one of them.
        examples: row positions of the first keys, by first row; each ascending.
    """

    texts: int
    rows: int
    examples: list[list[int]]


def repeated_texts(
    keys: NDArray[np.uint64], differing: NDArray[np.int64], most_texts: int, most_rows: int
) -> RepeatedTexts:
    """Text keys whose rows differ in something else: their label (a contradiction), their wording (a near-duplicate).

    Args:
        keys: digest of each row's text key, shape (rows,).
        differing: what to compare, a number for each row, shape (rows,).
        most_texts: how many keys to give as examples.
        most_rows: how many rows of each to give.

    Returns:
        Counts and examples; all zero for no rows.
    """
    if not len(keys):
        return RepeatedTexts(0, 0, [])
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order]) != 0]))
    sizes = np.diff(np.append(starts, len(keys)))
    values = differing[order]
    differ = np.flatnonzero(np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts))
    # The sort is stable, so a key's first row is the first of its run.
    by_first_row = differ[np.argsort(order[starts[differ]], kind="stable")][:most_texts]
    examples = [order[starts[run] : starts[run] + min(int(sizes[run]), most_rows)].tolist() for run in by_first_row]
    return RepeatedTexts(len(differ), int(sizes[differ].sum()), examples)
