"""How well probabilities rank the positive rows of two labels, and the threshold that turns them into decisions."""

from __future__ import annotations

from typing import Literal

import numpy as np


def ranking_scores(positive: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """How well scores put positive rows before negative ones.

    - `roc_auc`: area under the ROC curve.
    - `pr_auc`: average precision, the step-wise area under the precision-recall curve.
    - `wss_at_95`: work saved over sampling, (TN + FN) / n - 0.05, at the highest threshold that finds 95 % of the
      positive rows (Cohen et al. 2006, "Reducing workload in systematic review preparation"). Rows with one score
      are read together; -0.05 when all have to be read.

    Args:
        positive: whether each row is positive, shape (n,).
        scores: higher is more positive, shape (n,).

    Returns:
        The three numbers; those that need rows of both kinds (or positive ones) are left out where there are none.
    """
    if not positive.any():
        return {}
    # Takes half a second, which other tasks are spared.
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = {} if positive.all() else {"roc_auc": float(roc_auc_score(positive, scores))}
    return both | {
        "pr_auc": float(average_precision_score(positive, scores)),
        "wss_at_95": float((len(scores) - _first_reaching(positive, scores, 0.95)[1]) / len(scores) - 0.05),
    }


def scores_at_recall(positive: np.ndarray, scores: np.ndarray, recall: float) -> dict[str, float]:
    """What reading from the top costs until a recall is reached, on these very rows; rows with one score together.

    Args:
        positive: whether each row is positive, shape (n,).
        scores: higher is more positive, shape (n,).
        recall: above 0 and at most 1.

    Returns:
        wss_at_recall, work saved over sampling: (n - rows read) / n - (1 - recall); and precision_at_recall, the share
        of positive rows among those read. Both are left out where no row is positive.
    """
    if not positive.any():
        return {}
    found, read = _first_reaching(positive, scores, recall)
    return {
        "wss_at_recall": (len(scores) - read) / len(scores) - (1 - recall),
        "precision_at_recall": found / read,
    }


def _first_reaching(positive: np.ndarray, scores: np.ndarray, recall: float) -> tuple[int, int]:
    """Positive rows and all rows from the highest threshold on that reaches a recall."""
    _, found, selected = operating_points(positive, scores)
    place = np.argmax(found / positive.sum() >= recall)
    return int(found[place]), int(selected[place])


def operating_points(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold that differs: the distinct scores, falling.

    Returns:
        Thresholds, and for each the positive rows and all rows whose score is at least that.
    """
    # Not a stable sort: it takes four times as long, and of rows with one score only the last one's place counts.
    order = np.argsort(-scores)
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    return scores[order][last], np.cumsum(positive[order])[last], last + 1


def choose_threshold(
    positive: np.ndarray, scores: np.ndarray, method: Literal["max_f1", "recall"], recall: float | None = None
) -> float:
    """The probability from which on a row is called positive: one of `scores`, the highest where several do as well.

    Args:
        positive: whether each row is positive, at least one is; shape (n,).
        scores: probabilities of the positive label, shape (n,).
        method: the best F1, or a recall of at least `recall`.
        recall: for "recall", above 0 and at most 1.
    """
    assert positive.any(), "recall is undefined without positive rows"
    thresholds, found, selected = operating_points(positive, scores)
    if method == "recall":
        return float(thresholds[np.argmax(found / positive.sum() >= recall)])
    return float(thresholds[np.argmax(2 * found / (selected + positive.sum()))])
