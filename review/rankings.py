"""How well probabilities rank the positive rows, in many resamples at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Ranking(NamedTuple):
    """Rows in falling order of their score; rows of one score are a group, and some groups have positive rows.

    Attributes:
        order: row numbers, shape (n,).
        positive: places in `order` of the P positive rows, rising.
        first: of each group with positive rows, its first place in `order`, shape (g,).
        last: its last place, shape (g,).
        last_positive: which of the P positive rows is its last one, shape (g,).
    """

    order: np.ndarray
    positive: np.ndarray
    first: np.ndarray
    last: np.ndarray
    last_positive: np.ndarray


def rank(positive: np.ndarray, scores: np.ndarray) -> Ranking:
    """Sort once what every resample looks at.

    Args:
        positive: whether each row is positive, at least one is; shape (n,).
        scores: higher is more positive, shape (n,).
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    first = np.concatenate([[0], last[:-1] + 1])
    places = np.flatnonzero(positive[order])
    groups, last_positive = np.searchsorted(last, places), np.arange(len(places))
    ends = np.append(np.diff(groups) > 0, True)
    return Ranking(order, places, first[groups[ends]], last[groups[ends]], last_positive[ends])


def resampled_rankings(ranking: Ranking, weights: np.ndarray, recall: float | None) -> dict[str, np.ndarray]:
    """The numbers of `stages.common.measuring.ranking` for resamples; NaN where one has no rows of both kinds.

    With P, N the positive and negative rows, all weighted, and for the groups of equal score from the top p, q their
    positive and negative rows and F, R the positive and all rows up to there: average precision is the sum of
    p / P * F / R, and the area under the ROC curve that of p * (negative rows below + q / 2) / (P * N).

    Args:
        ranking: of n rows.
        weights: how often each row was drawn, shape (s, n).
        recall: of `evaluate.threshold`, whose cost is measured too; or None.

    Returns:
        roc_auc, pr_auc, wss_at_95 and, with a recall, wss_at_recall and precision_at_recall: shape (s,) each.
    """
    sorted_weights = weights[:, ranking.order]
    read_of_place = np.cumsum(sorted_weights, axis=1)
    found_of_place = np.cumsum(sorted_weights[:, ranking.positive], axis=1)
    rows, read = read_of_place[:, -1], read_of_place[:, ranking.last]
    before = read_of_place[:, ranking.first] - sorted_weights[:, ranking.first]
    found = found_of_place[:, ranking.last_positive]
    in_group = np.diff(found, axis=1, prepend=0)
    positive, tied = found[:, -1:], read - before - in_group
    negative = rows[:, None] - positive
    below = rows[:, None] - read - (positive - found)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.divide(found, read, out=np.zeros_like(found), where=read > 0)
        numbers = {
            "roc_auc": (in_group * (below + tied / 2)).sum(axis=1) / (positive * negative)[:, 0],
            "pr_auc": (in_group * precision).sum(axis=1) / positive[:, 0],
        }
        reached = found / positive
        for name, wanted in (("wss_at_95", 0.95), ("wss_at_recall", recall)):
            if wanted is None:
                continue
            place = np.argmax(reached >= wanted, axis=1)[:, None]
            needed = np.take_along_axis(read, place, axis=1)[:, 0]
            numbers[name] = np.where(positive[:, 0] > 0, (rows - needed) / rows - (1 - wanted), np.nan)
            if name == "wss_at_recall":
                precision_there = np.take_along_axis(found, place, axis=1)[:, 0] / needed
                numbers["precision_at_recall"] = np.where(positive[:, 0] > 0, precision_there, np.nan)
    return numbers
