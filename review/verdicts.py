"""When a difference is called better, worse or noise."""

from __future__ import annotations

from typing import Any

from review.changes import Change
from review.statistics import noise_limit

SIGNIFICANT = 0.05
BETTER, WORSE, NOISE, SAME = "better", "worse", "within noise", "no change"
# Said of everything where the rows that both sides have in common are too few, or where predictions are missing.
WITHHELD, UNKNOWN = "withheld", "cannot tell"
# Beside names that end in _loss.
LOWER_IS_BETTER = {"brier", "ece", "perplexity", "invalid_rate", "empty_rate", "repetition_rate"}
# Neither more nor less of them is better by itself.
WITHOUT_DIRECTION = {"rows_selected", "threshold", "answer_words"}


def direction(name: str) -> int:
    """1 where a higher value is better, -1 where a lower one is, 0 where neither."""
    if name in WITHOUT_DIRECTION:
        return 0
    return -1 if name in LOWER_IS_BETTER or name.endswith("_loss") else 1


def verdict(name: str, change: Change) -> str | None:
    """What a paired comparison says about a metric; None where the metric has no direction or no interval.

    A test decides where there is one (p below 0.05), else the interval (without 0). A metric that no resample moves
    has not changed.
    """
    if not direction(name) or change.interval is None:
        return None
    low, high = change.interval
    difference = change.after - change.before
    if low == high == difference == 0:
        return SAME
    significant = change.p < SIGNIFICANT if change.p is not None else not low <= 0 <= high
    if not significant or difference == 0:
        return NOISE
    return BETTER if difference * direction(name) > 0 else WORSE


def noise_of(noise: dict[str, Any] | None, name: str, change: Change) -> dict[str, Any] | None:
    """Whether a difference is as small as what another seed of training makes.

    Args:
        noise: the content of metrics/noise.json; None where there is none.
        name: of the metric.
        change: the metric.

    Returns:
        `limit` (see `statistics.noise_limit`), `seeds` (their number) and `inside`; None where this metric's noise was
        not measured.
    """
    spread = {} if noise is None else noise["metrics"].get(f"adapter.{name}", {})
    if noise is None or "standard_deviation" not in spread or len(noise["seeds"]) < 2:
        return None
    limit = noise_limit(spread["standard_deviation"], len(noise["seeds"]))
    return {"limit": limit, "seeds": len(noise["seeds"]), "inside": abs(change.after - change.before) <= limit}
