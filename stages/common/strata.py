"""What the parts of a data set are to have equal shares of."""

from __future__ import annotations

import numpy as np

from stages.common.labels import split_labels
from stages.common.leakage import Flags, Integers


def applying_labels(cells: list[str], labels: list[str], several: bool) -> Flags:
    """Which labels each cell of the column `label` names.

    Args:
        cells: of n rows.
        labels: task.labels; empty where answers are texts.
        several: whether a cell holds any number of labels, see `join_labels`.

    Returns:
        bool (n, number of labels).
    """
    applies = np.zeros((len(cells), len(labels)), np.bool_)
    index = {label: number for number, label in enumerate(labels)}
    if labels:
        for row, cell in enumerate(cells):
            applies[row, [index[label] for label in (split_labels(cell) if several else [cell])]] = True
    return applies


def strata_of(labels: Flags) -> Integers:
    """What rows are stratified by: the label that each has; of several the rarest in all rows, the first of equal ones.

    Args:
        labels: bool (n, number of labels).

    Returns:
        int (n,); a row without any label counts as one of another label, the number of labels. All 0 without labels.
    """
    frequency = labels.sum(axis=0)
    rarest_first = np.argsort(frequency, kind="stable")
    strata = np.full(len(labels), labels.shape[1], np.int64)
    for label in rarest_first[::-1]:
        strata[labels[:, label]] = label
    return strata


def most_frequent(groups: Integers, strata: Integers, n_strata: int) -> Integers:
    """For each group, in order: its rows' most frequent stratum, the first of equal ones.

    Args:
        groups: int (n,), from 0, none left out.
        strata: int (n,), from 0.
        n_strata: above all of them.

    Returns:
        int (number of groups,).
    """
    pairs, counts = np.unique(groups * n_strata + strata, return_counts=True)
    pair_groups, pair_strata = np.divmod(pairs, n_strata)
    order = np.lexsort((pair_strata, -counts, pair_groups))
    _, first = np.unique(pair_groups[order], return_index=True)
    found: Integers = pair_strata[order][first]
    return found
