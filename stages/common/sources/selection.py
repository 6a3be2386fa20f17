"""Which of the valid rows stay: exemplars leave with their groups, and a number of the others is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.common.errors import UserError
from stages.common.schema.ingest import Rows as Wanted
from stages.common.sources.columns import SPLITS
from stages.common.sources.gather import Rows


def choose_exemplars(rows: Rows, labels: list[str], per_label: int, seed: int) -> list[int]:
    """Choose the rows that the prompt shows, no two of one group or text; from train where splits are published.

    Args:
        rows: digests of the rows to choose from, shape (rows,).
        labels: params.task.labels; empty where a row has no label or several, and no exemplars are chosen.
        per_label: how many of each label.
        seed: of the choice.

    Returns:
        Positions in `rows`: one of each label, in their order, then the next one of each, and so on.

    Raises:
        UserError: a label has too few rows.
    """
    generator = np.random.default_rng(seed)
    published = bool((rows["split"] >= 0).any())
    chosen: list[list[int]] = []
    groups: set[int] = set()
    keys: set[int] = set()
    for number, label in enumerate(labels):
        candidates = np.flatnonzero((rows["label"] == number) & (rows["split"] <= 0))
        of_label: list[int] = []
        for position in generator.permutation(candidates).tolist():
            if len(of_label) == per_label:
                break
            group, key = int(rows["group"][position]), int(rows["key"][position])
            if group not in groups and key not in keys:
                of_label.append(position)
                groups.add(group)
                keys.add(key)
        if len(of_label) < per_label:
            raise UserError(
                f"ingest.exemplars_per_label: {per_label} rows of {label!r} are wanted, each of another group, but "
                f"{'the train split' if published else 'the table'} has only {len(of_label)}. Lower it."
            )
        chosen.append(of_label)
    return [position for one_of_each in zip(*chosen, strict=True) for position in one_of_each]


def without_exemplars(rows: Rows, exemplars: list[int]) -> NDArray[np.bool_]:
    """Which rows share neither group nor text key with an exemplar; shape (rows,)."""
    chosen = rows[exemplars]
    return ~(np.isin(rows["group"], chosen["group"]) | np.isin(rows["key"], chosen["key"]))


def draw_rows(splits: NDArray[np.int8], wanted: Wanted | None, seed: list[int], key: str) -> NDArray[np.bool_]:
    """Draw as many rows of a source as are wanted; a larger number, the same seed: the same rows and more.

    Args:
        splits: each row's published split as its number in SPLITS, -1 without one; shape (rows,).
        wanted: how many; or how many of each split named, the others staying whole; None: all.
        seed: of the draw.
        key: where params.yaml says it, for messages.

    Returns:
        Which rows stay; shape (rows,).

    Raises:
        UserError: there are fewer.
    """
    drawn = np.ones(len(splits), np.bool_)
    generator = np.random.default_rng(seed)
    counts: list[tuple[str | None, int]] = []
    if isinstance(wanted, dict):
        counts += sorted(wanted.items(), key=lambda item: SPLITS.index(item[0]))
    elif wanted is not None:
        counts.append((None, wanted))
    for split, count in counts:
        candidates = np.arange(len(splits)) if split is None else np.flatnonzero(splits == SPLITS.index(split))
        if len(candidates) < count:
            raise _too_few(len(candidates), count, key, split, bool((splits >= 0).any()))
        drawn[generator.permutation(candidates)[count:]] = False
    return drawn


def _too_few(there: int, count: int, key: str, split: str | None, published: bool) -> UserError:
    if split is not None and not published:
        return UserError(
            f"{key}.{split}: {count:,} rows of {split} are wanted, but the source publishes no split. Give one number "
            "for all of its rows, or name the splits in source.paths or columns.split."
        )
    where = f"{key}.{split}" if split else key
    of_split = f" of {split}" if split else ""
    return UserError(
        f"{where}: {count:,} rows{of_split} are wanted, but the source has only {there:,} that are no duplicates, not "
        "refused and in no group of an exemplar. Lower it, or set it to null for all rows."
    )
