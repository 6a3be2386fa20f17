"""Turn the source's tables, whatever their form, into one typed table without refused rows or exact duplicates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.common.errors import UserError, listing, run_stage
from stages.common.params import AliasLabel, Ingest, load_params
from stages.common.progress import progress
from stages.common.sources.columns import SPLITS, make_mapping
from stages.common.sources.duplicates import RepeatedTexts, repeated_texts
from stages.common.sources.gather import LISTED_REFUSALS, SCHEMA, Gathered, Rows, gather, spool_rows, unique_rows
from stages.common.sources.opening import SourceFile, open_source
from stages.common.tables import iter_batches, open_table, write_json

RECORDS = Path("data/records.parquet")
EXEMPLARS = Path("data/exemplars.parquet")
REPORT = Path("data/reports/ingest.json")
# No output of the stage: `dvc checkout` refuses to replace an output that a failed run left behind.
REFUSED_REPORT = Path("data/reports/ingest-refused.json")
LISTED_TEXTS = 100
LISTED_ROWS_PER_TEXT = 10


def require_few_refusals(gathered: Gathered, params: Ingest, labels: list[str]) -> None:
    """Stop when too large a share of the rows was refused.

    Raises:
        UserError: lists the first of them, what they have in common, and where all of them are.
    """
    refusals, read = gathered.refusals, gathered.rows_read
    if not read:
        raise UserError(f"{listing(list(gathered.rows_per_file))}: no rows. Put at least one row a label there.")
    if refusals.count <= params.max_refused_share * read:
        return
    write_json(REFUSED_REPORT, refusal_report(gathered))
    lines = [f"{row['file']} row {row['row']:,}: {row['reason']}" for row in refusals.first(10)]
    kinds = [f"{count:,} x {kind}" for kind, count in refusals.kinds.most_common()]
    label = params.columns.label
    allowed = list(label.aliases) if isinstance(label, AliasLabel) else labels
    raise UserError(
        f"{refusals.count:,} of {read:,} rows cannot be used, a share of {refusals.count / read:.2%}; "
        f"ingest.max_refused_share allows {params.max_refused_share:.2%}.\n  " + "\n  ".join(lines) + "\n"
        f"In all: {listing(kinds)}. Labels allowed: {listing([repr(name) for name in allowed], 100)}.\n"
        f"The first {LISTED_REFUSALS:,} are in {REFUSED_REPORT}. Correct the rows or ingest.columns, or raise "
        "ingest.max_refused_share to go on without them."
    )


def refusal_report(gathered: Gathered) -> dict[str, Any]:
    """The refused rows as the reports show them."""
    return {
        "rows_read": gathered.rows_read,
        "rows_per_file": gathered.rows_per_file,
        "rows_refused": gathered.refusals.count,
        "refused_by_reason": dict(gathered.refusals.kinds.most_common()),
        "refused": gathered.refusals.first(),
    }


def choose_exemplars(rows: Rows, labels: list[str], per_label: int, seed: int) -> list[int]:
    """Choose the rows that the prompt shows, no two of one group or text; from train where splits are published.

    Args:
        rows: digests of the rows to choose from, shape (rows,).
        labels: params.task.labels.
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


def require_labels(counts: dict[str, int]) -> None:
    """Stop when there is nothing to tell apart.

    Args:
        counts: rows left of each label of params.task.labels.

    Raises:
        UserError: a label has no row.
    """
    absent = [label for label, count in counts.items() if not count]
    present = [label for label, count in counts.items() if count]
    if len(present) == 1:
        raise UserError(
            f"all {counts[present[0]]:,} rows left have the label {present[0]!r}: there is nothing to tell apart. Add "
            "rows of the other labels, or check ingest.columns.label."
        )
    if absent:
        raise UserError(
            f"task.labels: no row is left with {listing([repr(label) for label in absent])}. Remove it from "
            "task.labels, add rows, or check ingest.columns.label."
        )


def write_rows(spool: Path, kept: NDArray[np.intp], exemplars: list[int]) -> None:
    """Write data/records.parquet and data/exemplars.parquet from the spool; both, or none when that fails."""
    chosen = spool_rows(spool, exemplars, SCHEMA.names)
    with open_table(EXEMPLARS, SCHEMA) as set_aside, open_table(RECORDS, SCHEMA) as records:
        for position in exemplars:
            set_aside.add(chosen[position])
        start = 0
        for batch in iter_batches(spool):
            low, high = np.searchsorted(kept, [start, start + batch.num_rows])
            records.add_batch(batch.take(pa.array(kept[low:high] - start)))
            start += batch.num_rows


def texts_report(repeated: RepeatedTexts, kept: NDArray[np.intp], spool: Path) -> dict[str, Any]:
    """Counts and ids of texts that occur more than once."""
    positions = [[int(kept[row]) for row in rows] for rows in repeated.examples]
    found = spool_rows(spool, [position for rows in positions for position in rows], ["id"])
    ids = [[found[position]["id"] for position in rows] for rows in positions]
    return {"texts": repeated.texts, "rows": repeated.rows, "ids": ids}


def ingest(files: list[SourceFile], params: Ingest, labels: list[str], spool: Path) -> dict[str, Any]:
    """Read the files, decide which rows stay, and write records and exemplars.

    Args:
        files: the source's tables.
        params: params.ingest.
        labels: params.task.labels.
        spool: a path for the valid rows in between.

    Returns:
        The report, for data/reports/ingest.json.

    Raises:
        UserError: splits are published twice, too many rows are refused, or a label has none.
    """
    if params.columns.split is not None and any(file.split for file in files):
        raise UserError(
            f"ingest.columns.split: {params.columns.split!r} contradicts ingest.source.paths, which names the splits "
            "already. Set it to null, or list the paths without splits."
        )
    mapping = make_mapping(params.columns, labels)
    with progress(sum(file.path.stat().st_size for file in files), "reading the source", "B") as bar:
        gathered = gather(files, mapping, labels, spool, bar.update)
    unique = unique_rows(gathered, files, spool)
    require_few_refusals(gathered, params, labels)
    rows = gathered.rows[unique]
    exemplars = choose_exemplars(rows, labels, params.exemplars_per_label, params.seed)
    stays = without_exemplars(rows, exemplars)
    kept, rows = unique[stays], rows[stays]
    counts = {label: int((rows["label"] == number).sum()) for number, label in enumerate(labels)}
    require_labels(counts)
    repeated = {
        name: repeated_texts(rows["key"], rows[column], LISTED_TEXTS, LISTED_ROWS_PER_TEXT)
        for name, column in (("contradicting_labels", "label"), ("near_duplicates", "text"))
    }
    write_rows(spool, kept, [int(unique[position]) for position in exemplars])
    exact_duplicates = gathered.rows_read - gathered.refusals.count - len(unique)
    return {
        **refusal_report(gathered),
        "max_refused_share": params.max_refused_share,
        "exact_duplicates_removed": exact_duplicates,
        "exemplars": len(exemplars),
        "removed_with_exemplars": len(unique) - len(kept) - len(exemplars),
        "rows_kept": len(kept),
        "rows_per_label": counts,
        "rows_per_published_split": {s: int((rows["split"] == number).sum()) for number, s in enumerate(SPLITS)},
        **{name: texts_report(texts, kept, spool) for name, texts in repeated.items()},
    }


def main() -> None:
    """Write data/records.parquet, data/exemplars.parquet and data/reports/ingest.json."""
    params = load_params("task", "ingest")
    REFUSED_REPORT.unlink(missing_ok=True)
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=RECORDS.parent, prefix=".ingest-") as folder,
        open_source(params.ingest.source) as files,
    ):
        report = ingest(files, params.ingest, params.task.labels, Path(folder) / "spool.parquet")
    write_json(REPORT, report)
    per_label = ", ".join(f"{label} {count:,}" for label, count in report["rows_per_label"].items())
    print(
        f"ingest: {report['rows_kept']:,} of {report['rows_read']:,} rows kept ({per_label}); "
        f"{report['rows_refused']:,} refused, {report['exact_duplicates_removed']:,} exact duplicates, "
        f"{report['exemplars']:,} exemplars and {report['removed_with_exemplars']:,} rows of their groups set aside"
    )


if __name__ == "__main__":
    run_stage(main)
