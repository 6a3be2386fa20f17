"""What makes a comparison less than it seems: results that belong to other parameters, files or predictions."""

from __future__ import annotations

import math
from typing import Any

from dvc.repo import Repo

from review.differences import RowChanges, changed_parameters, numbers_of
from review.revisions import ADAPTER, DECISION, Side, stale_outputs
from review.trials import configuration
from stages.common.errors import listing

# How far a number computed here may be from metrics.json's, relative to it: libraries may sum in another order.
TOLERANCE = 1e-6


def cautions_about(repo: Repo, side: Side) -> list[str]:
    """Whether a side's parameters, dvc.lock and files belong together."""
    found = []
    ran = {name: side.params.get(name) for name in side.locked if name in side.params}
    keys = [entry["key"] for entry in changed_parameters({name: side.locked[name] for name in ran}, ran)]
    if keys:
        found.append(
            f"{side.name}: params.yaml is not what its results were made with ({listing(keys)}): the parameters shown "
            "below are newer than the numbers. `dvc repro` makes them belong together."
        )
    if side.foreign:
        found.append(
            f"{side.name}: {listing(side.foreign)} is not what dvc.lock names: edited, or from an unfinished run. "
            "`dvc repro` makes it again."
        )
    if side.commit is None:
        stale = stale_outputs(repo, [ADAPTER, DECISION])
        if stale:
            found.append(
                f"{side.name}: {listing(stale)} is not what dvc.lock names: stale, or from an unfinished run. Run "
                "`dvc repro`, or `dvc checkout` for the committed one."
            )
    return found


def caution_about_metrics(side: Side, values: dict[str, float], ignored: set[str]) -> list[str]:
    """Whether metrics.json says what the predictions give.

    Args:
        side: whose metrics.
        values: computed from its predictions.
        ignored: metrics that were computed in another way.
    """
    committed = numbers_of(side.metrics["test"].get("adapter", {}))
    wrong = [
        f"{name} {committed[name]:.4f} instead of {value:.4f}"
        for name, value in values.items()
        if name in committed
        and name not in ignored
        and not math.isclose(committed[name], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    ]
    if not wrong:
        return []
    return [
        f"{side.name}: metrics/metrics.json does not say what the predictions give ({listing(wrong, 3)}). Run "
        "`dvc repro evaluate` there; what is shown below comes from the predictions."
    ]


def caution_about_noise(noise: dict[str, Any], sides: tuple[Side, Side]) -> list[str]:
    """Whether the spread over seeds was measured with what made the results of either side, by its dvc.lock."""
    if any(noise["parameters"] == _configuration(side) for side in sides):
        return []
    return [
        "metrics/noise.json was measured with other training parameters, data, prompts, base or code than either side "
        "has: what it calls noise may not be theirs. `python -m review.noise` measures it again."
    ]


def _configuration(side: Side) -> dict[str, Any] | None:
    """What made a side's results, the seed aside; None where its dvc.lock does not say it."""
    try:
        return configuration(side.lock)
    except (KeyError, TypeError, AttributeError):
        return None


def caution_about_texts(rows: RowChanges) -> list[str]:
    """Whether texts could be compared, where they may have changed."""
    if rows.text_changed is not None:
        return []
    return [
        "whether texts of test changed is not known: the splits are neither here nor in a remote on both sides. Rows "
        "are taken to be the same by id and label."
    ]
