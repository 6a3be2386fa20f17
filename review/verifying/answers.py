"""A row's second answer held against its first: the same, but for what the order of sums and rounding may change."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stages.common.labels import split_labels
from stages.common.predictions import probability_column

LOG_LIKELIHOOD, TOKENS = "reference_log_likelihood", "reference_tokens"
PROBABILITY = probability_column("")
# More rows than these are counted, not named.
MOST_NAMED = 5


class Bounds(NamedTuple):
    """How far a row's second answer may be from its first.

    Attributes:
        probability: of a label, at most; of a reference's tokens the mean log-likelihood, in nats.
        mean: of all differences together, at most.
        close_call: another label may be decided on where the first probabilities of both are as near as this.
        other_answers: share of generated answers that may be others.
    """

    probability: float
    mean: float
    close_call: float
    other_answers: float


# float32 both times: sums in another order. docs/review.md has what was measured.
EXACT = Bounds(probability=1e-3, mean=1e-3, close_call=2e-3, other_answers=0.0)
# Of 2,000 rows in bfloat16 no probability was off by more than .157, and all by .005 on average (docs/performance.md).
ROUNDED = Bounds(probability=0.25, mean=0.03, close_call=0.15, other_answers=0.1)


class Compared(NamedTuple):
    """What the answers to some rows came to.

    Attributes:
        farthest: the largest difference of a score.
        differences: what is beyond the bounds, in words.
    """

    farthest: float
    differences: list[str]


def compare_answers(committed: pa.Table, again: pa.Table, bounds: Bounds, several: bool) -> Compared:
    """What differs between two prediction tables of the same rows.

    Args:
        committed: the first answers.
        again: the second ones.
        bounds: how far they may be apart.
        several: whether a row can have several labels.
    """
    alike = ["id", "label", *([TOKENS] if TOKENS in again.column_names else [])]
    if committed.column_names != again.column_names or any(committed[name] != again[name] for name in alike):
        return Compared(math.inf, ["it has not the columns, the rows and the labels that `infer` writes"])
    distances = _distances(committed, again)
    found = _other_scores(committed, again, distances, bounds)
    mean = float(distances.mean()) if distances.size else 0.0
    if not found and mean > bounds.mean:
        found.append(f"scores are off by {mean:.3g} on average; {bounds.mean:g} may be rounding")
    found += _other_decisions(committed, again, bounds, several)
    more = [f"and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else []
    return Compared(float(distances.max(initial=0.0)), found[:MOST_NAMED] + more)


def _distances(committed: pa.Table, again: pa.Table) -> np.ndarray:
    """How far scores are apart, (rows, scores); infinitely where only one side has one."""
    columns = []
    for name in _scores(committed):
        one, other = (table[name].to_numpy().astype(np.float64) for table in (committed, again))
        absent = np.isnan(one) & np.isnan(other)
        columns.append(np.where(absent, 0.0, np.nan_to_num(np.abs(one - other), nan=math.inf)))
    apart = np.column_stack(columns) if columns else np.zeros((len(committed), 0))
    if TOKENS in again.column_names:
        apart = apart / np.reshape(again[TOKENS].to_numpy(), (-1, 1))
    return apart


def _other_scores(committed: pa.Table, again: pa.Table, distances: np.ndarray, bounds: Bounds) -> list[str]:
    found, ids = [], committed["id"].to_pylist()
    for row in np.flatnonzero((distances > bounds.probability).any(axis=1)):
        column = _scores(committed)[int(distances[row].argmax())]
        one, other = (table[column][int(row)].as_py() for table in (committed, again))
        found.append(f"row {ids[row]!r}, {column}: committed {one}, re-scored {other}")
    return found


def _other_decisions(committed: pa.Table, again: pa.Table, bounds: Bounds, several: bool) -> list[str]:
    ids, before, after = (
        column.to_pylist() for column in (committed["id"], committed["prediction"], again["prediction"])
    )
    rows = [row for row, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    names = [name for name in _scores(again) if name.startswith(PROBABILITY) and not again[name].null_count]
    if names:
        odds = committed.select(names).rename_columns([name.removeprefix(PROBABILITY) for name in names]).to_pylist()
        is_close = _is_close_set if several else _is_close
        rows = [row for row in rows if not is_close(odds[row], before[row], after[row], bounds)]
    elif len(rows) <= bounds.other_answers * len(before):
        rows = []
    return [f"row {ids[row]!r}: committed {before[row]!r}, re-scored {after[row]!r}" for row in rows]


def _is_close(odds: dict[str, float], before: str, after: str, bounds: Bounds) -> bool:
    """Whether rounding may have decided between two labels of a row."""
    return before in odds and after in odds and abs(odds[before] - odds[after]) <= bounds.close_call


def _is_close_set(odds: dict[str, float], before: str, after: str, bounds: Bounds) -> bool:
    """The same where each label applies from a probability of one half on."""
    try:
        moved = set(split_labels(before)) ^ set(split_labels(after))
    except ValueError:
        return False
    return all(abs(odds.get(label, math.inf) - 0.5) <= bounds.close_call / 2 for label in moved)


def _scores(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(PROBABILITY) or name == LOG_LIKELIHOOD]
