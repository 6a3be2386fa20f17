"""What a comparison of two sides on the same rows holds, whatever the task."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Change(NamedTuple):
    """One metric on the same rows.

    Attributes:
        before: its value on the first side.
        after: on the second.
        interval: 95 % paired-bootstrap interval of the difference; None where there is none.
        p: of a paired test; None where there is none.
        test: which one.
    """

    before: float
    after: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    test: str | None = None


class ClassChange(NamedTuple):
    """The F1 of one label; `p` is corrected over all labels (Holm)."""

    before: float
    after: float
    support: int
    p: float


class Flips(NamedTuple):
    """Rows whose answer became better or worse, the most telling first, as row numbers of the common rows.

    Attributes:
        fixed: rows that became right (of texts: closer to the reference).
        broken: rows that became wrong (farther).
        still_wrong: rows whose answer changed and is wrong on both sides (texts: scores alike).
        before: what each row listed in `fixed` and `broken` is shown with: label, set, or token F1.
        after: the same on the second side.
        confidence: of the second side in its answer, for each row; None where there is none.
    """

    fixed: np.ndarray
    broken: np.ndarray
    still_wrong: int
    before: np.ndarray
    after: np.ndarray
    confidence: np.ndarray | None


class Comparison(NamedTuple):
    """All that follows from two predictions for each of n rows.

    Attributes:
        metrics: by name, in the order to be shown.
        per_class: by label; empty where answers are texts.
        flips: rows whose answers changed for better or worse.
        same: whether the predictions of both sides are identical, probabilities included.
        resamples: of rows, of the bootstrap.
    """

    metrics: dict[str, Change]
    per_class: dict[str, ClassChange]
    flips: Flips
    same: bool
    resamples: int


class Resampled:
    """Differences of metrics in resamples, gathered chunk by chunk."""

    def __init__(self) -> None:
        self._chunks: dict[str, list[np.ndarray]] = {}

    def add(self, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
        """Add a chunk of resamples: values of each metric on both sides, shape (s,)."""
        for name in before.keys() & after.keys():
            self._chunks.setdefault(name, []).append(after[name] - before[name])

    def differences(self) -> dict[str, np.ndarray]:
        """All differences of each metric, shape (samples,)."""
        return {name: np.concatenate(chunks) for name, chunks in self._chunks.items()}
