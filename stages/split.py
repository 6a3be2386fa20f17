"""Train, validation and test: stratified, seeded, no group and no text in two of them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.common.contents import write_contents
from stages.common.errors import UserError, run_stage
from stages.common.leakage import (
    DROPPED,
    LISTED_LEAKS,
    PARTS,
    TEST,
    TRAIN,
    VALIDATION,
    Flags,
    Integers,
    Keys,
    Parts,
    Rows,
    drop_leaks,
    leakage_error,
)
from stages.common.params import load_params
from stages.common.progress import progress
from stages.common.prompting.kinds import prompt_kind, task_labels
from stages.common.schema.prompts import Split
from stages.common.schema.task import Task
from stages.common.strata import applying_labels, most_frequent, strata_of
from stages.common.tables import (
    iter_batches,
    open_parquet,
    open_table,
    row_count,
    rows_at,
    table_metadata,
    write_json,
)
from stages.common.text_keys import group_key

PROMPTS = Path("data/prompts.parquet")
SPLITS = Path("data/splits")
REPORT = Path("data/reports/split.json")
CONTENTS = Path("data/reports/contents.json")
COLUMNS = ["id", "text", "label", "group", "slice", "prompt", "completion"]
COLUMNS += ["prompt_ids", "prompt_answer_mask", "completion_ids"]
MOST_LISTED = 100


def main() -> None:
    """Split data/prompts.parquet."""
    params = load_params("split", "task")
    labels = task_labels(params.task)
    rows = read_rows(PROMPTS, params.task)
    parts = assign_parts(rows, labels, params.split)
    parts, leaks = drop_leaks(parts, rows)
    if leaks and params.split.leakage == "error":
        listed = [row for leak in leaks[:LISTED_LEAKS] for row in (leak.row, leak.other_row)]
        raise leakage_error(leaks, _ids(PROMPTS, listed))
    check_every_part(parts, rows, params.task, params.split)
    write_parts(PROMPTS, SPLITS, parts)
    write_contents(CONTENTS, SPLITS, table_metadata(PROMPTS, "begin_id"))
    report = split_report(parts, rows, labels)
    dropped_ids = _ids(PROMPTS, np.flatnonzero(parts == DROPPED)[:MOST_LISTED])
    write_json(REPORT, report | {"dropped_ids": list(dropped_ids.values())})
    print(f"split: {_summary(report)}")


def read_rows(prompts: Path, task: Task) -> Rows:
    """Read what decides about the parts; the texts themselves are not kept.

    Raises:
        UserError: some rows have a published split and others do not, or the prompts are of another task.
    """
    total = row_count(prompts)
    labels, kind = task_labels(task), prompt_kind(task)
    prompt_format = table_metadata(prompts, "prompt_format")
    if (prompt_format.get("kind"), prompt_format["labels"]) != (kind, labels):
        raise UserError(f"{prompts}: was made for another kind of task or other labels than {labels}. Run `dvc repro`.")
    part_index = {part: index for index, part in enumerate(PARTS)} | {None: DROPPED}
    flags = np.zeros((total, len(labels)), np.bool_)
    groups, texts, published = np.empty(total, np.uint64), np.empty(total, np.uint64), np.empty(total, np.int8)
    start = 0
    with progress(total, "reading texts") as bar:
        for batch in iter_batches(prompts, columns=["text", "label", "group", "split"]):
            here = slice(start, start + batch.num_rows)
            flags[here] = applying_labels(batch["label"].to_pylist(), labels, kind == "multi_label")
            groups[here] = _keys(batch["group"].to_pylist())
            texts[here] = _keys([group_key(text) for text in batch["text"].to_pylist()])
            published[here] = [part_index[part] for part in batch["split"].to_pylist()]
            start += batch.num_rows
            bar.update(batch.num_rows)
    without = np.flatnonzero(published == DROPPED)
    if 0 < len(without) < total:
        raise UserError(
            f"{prompts}: {len(without):,} of {total:,} rows have no published split, the first is "
            f"{_ids(prompts, without[:1])[int(without[0])]!r}. Give every row train, validation or test, in "
            "ingest.columns.split or by naming the splits in paths, in further sources too; or name splits in none."
        )
    return Rows(strata_of(flags), flags, groups, texts, published if not len(without) else None)


def _keys(digits: list[str]) -> Keys:
    return np.array([int(hexadecimal, 16) for hexadecimal in digits], np.uint64)


def assign_parts(rows: Rows, labels: list[str], params: Split) -> Parts:
    """Put every row into a part, groups whole, strata in equal shares; published parts stay as they are.

    What is missing is taken out of the published train (out of everything when nothing is published), test before
    validation. A share is one of all groups, rounded up. The result depends on the set of groups, not on their order.

    Args:
        rows: see `Rows`.
        labels: task.labels; empty where answers are texts.
        params: seed and shares.

    Returns:
        Small int (n,), index into PARTS. A group that a published split has in two parts stays in two.

    Raises:
        UserError: a published split without train, or too few groups for the parts to be made.
    """
    groups, group_of_row = np.unique(rows.groups, return_inverse=True)
    parts = np.zeros(len(rows.strata), np.int8) if rows.published is None else rows.published.copy()
    if not (parts == TRAIN).any():
        raise UserError(
            "split: the published split has no train rows, so there is nothing to train on or to take the other parts "
            "from. Add files or rows for train, or set ingest.columns.split (or the names of paths) to null."
        )
    wanted = [
        (part, share)
        for part, share in ((TEST, params.test_share), (VALIDATION, params.validation_share))
        if not (parts == part).any()
    ]
    in_train = parts == TRAIN
    _check_enough_groups(rows.labels[in_train], group_of_row[in_train], labels, wanted, params)
    strata = most_frequent(group_of_row[in_train], rows.strata[in_train], len(labels) + 1)
    pool = np.unique(group_of_row[in_train])
    # A label that is hardly ever a group's most frequent one cannot be shared out by whole groups on its own.
    counts = np.bincount(strata, minlength=len(labels) + 1)
    strata[counts[strata] <= len(wanted)] = counts.argmax()
    for part, share in wanted:
        size = _ceil(share * len(groups))
        kept, taken = _take(pool, strata, size, part, params)
        parts[in_train & np.isin(group_of_row, pool[taken])] = part
        pool, strata = pool[kept], strata[kept]
    return parts


def _take(pool: Integers, strata: Integers, size: int, part: int, params: Split) -> tuple[Integers, Integers]:
    """Positions in `pool` of the groups that stay, and of the `size` groups that are taken, stratified."""
    from sklearn.model_selection import train_test_split  # 0.8 s, which a published split is spared

    n_strata = len(np.unique(strata))
    if size < n_strata or len(pool) - size < n_strata or np.unique(strata, return_counts=True)[1].min() < 2:
        raise UserError(
            f"split.{PARTS[part]}_share: {len(pool):,} groups are too few to take {size:,} for {PARTS[part]} and leave "
            f"train some{f' of each of {n_strata} labels' if n_strata > 1 else ''}. "
            f"{'Raise' if size < n_strata else 'Lower'} split.{PARTS[part]}_share, add rows, or group them by a finer "
            "column in ingest.columns.group."
        )
    kept, taken = train_test_split(np.arange(len(pool)), test_size=size, stratify=strata, random_state=params.seed)
    return kept, taken


def _check_enough_groups(
    label_rows: Flags, groups: Integers, labels: list[str], wanted: list[tuple[int, float]], params: Split
) -> None:
    for index, label in enumerate(labels if wanted else []):
        count = len(np.unique(groups[label_rows[:, index]]))
        if count <= len(wanted):
            raise _too_few(label, True, count, "to share out", params)


def check_every_part(parts: Parts, rows: Rows, task: Task, params: Split) -> None:
    """Make sure that there is something to learn, to choose on and to measure: for each label, where there are labels.

    Raises:
        UserError: a part is empty, or lacks a label, or with multi_label a text without it.
    """
    labels, several = task_labels(task), prompt_kind(task) == "multi_label"
    for part, name in enumerate(PARTS):
        inside = rows.labels[parts == part]
        if not labels and not len(inside):
            raise UserError(f"split: no rows are left in {name}. Add some, or set ingest.columns.split to null.")
        for index, label in enumerate(labels):
            having = rows.labels[:, index]
            if not inside[:, index].any():
                groups = len(np.unique(rows.groups[having]))
                raise _too_few(label, True, groups, f"and none of them is in {name}", params)
            if several and inside[:, index].all():
                groups = len(np.unique(rows.groups[~having]))
                raise _too_few(label, False, groups, f"and none of them is in {name}", params)


def _too_few(label: str, applies: bool, groups: int, why: str, params: Split) -> UserError:
    needed = _ceil(1 / min(params.validation_share, params.test_share))
    has, it, rows = ("has", "it", "with") if applies else ("is lacking in", "a text without it", "without")
    return UserError(
        f"split: label {label!r} {has} {groups:,} groups of equal texts (or of one value of ingest.columns.group) "
        f"{why}; about {needed:,} are needed so that train, validation and test each have {it}. Add rows {rows} this "
        "label, make split.validation_share and split.test_share larger, or take the label out of task.labels or join "
        "it with another one through aliases in ingest.columns.label."
    )


def write_parts(prompts: Path, folder: Path, parts: Parts) -> None:
    """Write the rows of each part to folder/PART.parquet, in their order, with the prompt format in the footer."""
    with open_parquet(prompts) as table:
        schema = pa.schema([table.schema_arrow.field(name) for name in COLUMNS])
    metadata = {"prompt_format": table_metadata(prompts, "prompt_format")}
    with ExitStack() as stack:
        tables = [stack.enter_context(open_table(folder / f"{part}.parquet", schema, metadata)) for part in PARTS]
        bar = stack.enter_context(progress(len(parts), "writing parts"))
        start = 0
        for batch in iter_batches(prompts, columns=COLUMNS):
            here = parts[start : start + batch.num_rows]
            for part, table in enumerate(tables):
                table.add_batch(batch.filter(pa.array(here == part)))
            start += batch.num_rows
            bar.update(batch.num_rows)


def split_report(parts: Parts, rows: Rows, labels: list[str]) -> dict[str, Any]:
    """Counts for the report: rows, groups and, with labels, rows of each in every part; and rows dropped from all."""
    report: dict[str, Any] = {"published": rows.published is not None}
    for part, name in enumerate(PARTS):
        inside = parts == part
        report[name] = {"rows": int(inside.sum()), "groups": len(np.unique(rows.groups[inside]))}
        if labels:
            counts = rows.labels[inside].sum(axis=0).tolist()
            report[name]["labels"] = dict(zip(labels, counts, strict=True))
    report["dropped"] = int((parts == DROPPED).sum())
    return report


def _summary(report: dict[str, Any]) -> str:
    """One line for the terminal."""
    shown = []
    for name in PARTS:
        part = report[name]
        shares = [f"{label} {count / part['rows']:.1%}" for label, count in part.get("labels", {}).items()]
        shown.append(f"{name} {part['rows']:,} rows" + (f" ({', '.join(shares)})" if shares else ""))
    dropped = f"; {report['dropped']:,} rows dropped for leakage" if report["dropped"] else ""
    return "; ".join(shown) + dropped


def _ceil(value: float) -> int:
    # 0.07 * 100 is 7.000000000000001, and eight groups would be taken for seven.
    return math.ceil(round(value, 9))


def _ids(prompts: Path, positions: npt.ArrayLike) -> dict[int, str]:
    return {position: row["id"] for position, row in rows_at(prompts, positions, ["id"]).items()}


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
