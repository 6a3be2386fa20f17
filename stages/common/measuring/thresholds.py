"""The probability from which on a label is given: fixed, best on validation, or with a promise about other texts."""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np

from stages.common.errors import UserError
from stages.common.measuring.ranking import choose_threshold
from stages.common.schema.measuring import BestF1Threshold, FixedThreshold, RecallThreshold

Threshold = FixedThreshold | BestF1Threshold | RecallThreshold


def label_threshold(label: str, truth: np.ndarray, scores: np.ndarray, threshold: Threshold) -> float:
    """The threshold of one label, as `evaluate.threshold` asks for it.

    Args:
        label: its name, for messages.
        truth: whether each validation row has it, shape (n,).
        scores: its probabilities, shape (n,).
        threshold: the method and what it needs.

    Raises:
        UserError: the threshold is to be chosen on rows of which none, or too few, have the label.
    """
    if isinstance(threshold, FixedThreshold):
        return threshold.value
    if not truth.any():
        raise UserError(
            f"data/splits/validation.parquet: no row has the label {label!r}, so evaluate.threshold "
            f"cannot be chosen by {threshold.method!r}. Raise split.validation_share, or use a fixed threshold."
        )
    if isinstance(threshold, BestF1Threshold):
        return choose_threshold(truth, scores, "max_f1")
    if threshold.confidence is None:
        return choose_threshold(truth, scores, "recall", threshold.recall)
    needed = positives_needed(threshold.recall, threshold.confidence)
    if truth.sum() < needed:
        raise UserError(
            f"data/splits/validation.parquet: {truth.sum():,} rows have the label {label!r}, too few for "
            f"evaluate.threshold to promise a recall of {threshold.recall} with confidence {threshold.confidence}: "
            f"that needs {needed:,}. Raise split.validation_share, lower recall or confidence, or set confidence to "
            f"null, for a threshold that reaches the recall on validation and promises nothing."
        )
    return promised_threshold(scores[truth], threshold.recall, threshold.confidence)


def promised_threshold(positive_scores: np.ndarray, recall: float, confidence: float) -> float:
    """The highest threshold whose recall on all texts of this kind is at least `recall`, with this confidence.

    It is the smallest j of the P scores, falling, at which the lower end of the one-sided Clopper-Pearson interval for
    j found of P is at least `recall`. The share of all positive texts above the j-th of P scores has the distribution
    Beta(j, P - j + 1) or lies higher (ties), whatever the scores' own distribution: a tolerance limit (Wilks 1941,
    "Determination of sample sizes for setting tolerance limits"). So the promise holds although the threshold is
    chosen on the very rows that vouch for it.

    Args:
        positive_scores: probabilities of the P positive rows, P at least `positives_needed`.
        recall: above 0 and below 1.
        confidence: above 0.5 and below 1.
    """
    count = len(positive_scores)
    assert count >= positives_needed(recall, confidence), "the caller has refused too few rows"
    found = 1 + bisect.bisect_left(
        range(1, count + 1), recall, key=lambda found: recall_lower_bound(found, count, confidence)
    )
    # For P rows that just suffice rounding may put the bound a hair below; all of them is the answer then.
    return float(np.sort(positive_scores)[::-1][min(found, count) - 1])


def promise(threshold: Threshold, found: int, positive: int) -> dict[str, Any]:
    """What a threshold promises of other texts, for models/decision.json; nothing without a confidence.

    Args:
        threshold: the method and what it needs.
        found: positive validation rows that the chosen threshold finds.
        positive: positive validation rows.
    """
    if not isinstance(threshold, RecallThreshold) or threshold.confidence is None:
        return {}
    return {
        "recall_promised": threshold.recall,
        "confidence": threshold.confidence,
        "recall_lower_bound": recall_lower_bound(found, positive, threshold.confidence),
    }


def recall_lower_bound(found: int, positive: int, confidence: float) -> float:
    """The lower end of the one-sided interval around found / positive (Clopper & Pearson 1934); 0 if none was found."""
    from scipy.special import betaincinv  # as in `exact_interval`

    return float(betaincinv(found, positive - found + 1, 1 - confidence)) if found else 0.0


def positives_needed(recall: float, confidence: float) -> int:
    """The fewest positive rows that can vouch for a recall: P with recall ** P <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(recall))
