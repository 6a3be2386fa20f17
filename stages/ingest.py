"""Turn the source's tables, whatever their form, into one typed table without refused rows or exact duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.common.errors import UserError, listing, run_stage
from stages.common.params import load_params
from stages.common.progress import progress
from stages.common.schema.ingest import AliasLabel, Ingest, ListLabel
from stages.common.schema.task import ClassificationTask, Task
from stages.common.sources.columns import SPLITS, make_mapping
from stages.common.sources.duplicates import RepeatedTexts, repeated_texts
from stages.common.sources.gather import (
    LISTED_REFUSALS,
    SCHEMA,
    Gathered,
    Rows,
    Source,
    gather,
    unique_rows,
)
from stages.common.sources.opening import distinct_files, open_source
from stages.common.sources.requirements import label_counts, require_labels, slice_counts
from stages.common.sources.selection import choose_exemplars, draw_rows, without_exemplars
from stages.common.tables import iter_batches, open_table, rows_at, scratch_folder, write_json

RECORDS = Path("data/records.parquet")
EXEMPLARS = Path("data/exemplars.parquet")
REPORT = Path("data/reports/ingest.json")
# No output of the stage: `dvc checkout` refuses to replace an output that a failed run left behind.
REFUSED_REPORT = Path("data/reports/ingest-refused.json")
LISTED_TEXTS = 100
LISTED_ROWS_PER_TEXT = 10


def require_few_refusals(gathered: Gathered, params: Ingest, task: Task) -> None:
    """Stop when a source has no rows, or too large a share of all rows was refused.

    Raises:
        UserError: lists the first of them, what they have in common, and where all of them are.
    """
    refusals, read = gathered.refusals, gathered.rows_read
    for source in gathered.sources:
        names = [file.name for file in source.files]
        if not any(gathered.rows_per_file[name] for name in names):
            least = "one row a label" if isinstance(task, ClassificationTask) else "one row"
            raise UserError(f"{listing(names)}: no rows. Put at least {least} there.")
    if refusals.count <= params.max_refused_share * read:
        return
    write_json(REFUSED_REPORT, refusal_report(gathered))
    lines = [f"{row['file']} row {row['row']:,}: {row['reason']}" for row in refusals.first(10)]
    kinds = [f"{count:,} x {kind}" for kind, count in refusals.kinds.most_common()]
    allowed = f" Labels allowed: {listing(allowed_labels(params, task), 100)}." if task.kind == "classification" else ""
    raise UserError(
        f"{refusals.count:,} of {read:,} rows cannot be used, a share of {refusals.count / read:.2%}; "
        f"ingest.max_refused_share allows {params.max_refused_share:.2%}.\n  " + "\n  ".join(lines) + "\n"
        f"In all: {listing(kinds)}.{allowed}\n"
        f"The first {LISTED_REFUSALS:,} are in {REFUSED_REPORT}. Correct the rows or ingest.columns, or raise "
        "ingest.max_refused_share to go on without them."
    )


def allowed_labels(params: Ingest, task: ClassificationTask) -> list[str]:
    """What the cells of the sources' label columns may hold, quoted."""
    names: list[str] = []
    for columns in (params.columns, *(further.columns for further in params.further_sources)):
        aliases = columns.label.aliases if isinstance(columns.label, AliasLabel | ListLabel) else None
        names += task.labels if aliases is None else aliases
    return [repr(name) for name in dict.fromkeys(names)]


def refusal_report(gathered: Gathered) -> dict[str, Any]:
    """The refused rows as the reports show them."""
    return {
        "rows_read": gathered.rows_read,
        "rows_per_file": gathered.rows_per_file,
        "rows_refused": gathered.refusals.count,
        "refused_by_reason": dict(gathered.refusals.kinds.most_common()),
        "refused": gathered.refusals.first(),
    }


def write_rows(spool: Path, kept: NDArray[np.intp], exemplars: list[int]) -> None:
    """Write data/records.parquet and data/exemplars.parquet from the spool; both, or none when that fails."""
    chosen = rows_at(spool, exemplars, SCHEMA.names)
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
    found = rows_at(spool, [position for rows in positions for position in rows], ["id"])
    ids = [[found[position]["id"] for position in rows] for rows in positions]
    return {"texts": repeated.texts, "rows": repeated.rows, "ids": ids}


def ingest(sources: list[Source], params: Ingest, task: Task, spool: Path) -> dict[str, Any]:
    """Read the sources, decide which rows stay, and write records and exemplars.

    Args:
        sources: the tables of params.ingest.source, then those of each further source.
        params: params.ingest.
        task: params.task.
        spool: a path for the valid rows in between.

    Returns:
        The report, for data/reports/ingest.json.

    Raises:
        UserError: too many rows are refused, fewer are left than are wanted, or a label has none.
    """
    labels = task.labels if isinstance(task, ClassificationTask) and not task.multi_label else []
    size = sum(file.path.stat().st_size for source in sources for file in source.files)
    with progress(size, "reading the source", "B") as bar:
        gathered = gather(sources, labels, spool, bar.update)
    unique = unique_rows(gathered, spool)
    require_few_refusals(gathered, params, task)
    exemplars = choose_exemplars(gathered.rows[unique], labels, params.exemplars_per_label, params.seed)
    others = unique[without_exemplars(gathered.rows[unique], exemplars)]
    kept = others[draw_from_sources(gathered, gathered.rows[others], params)]
    rows = gathered.rows[kept]
    per_label = label_counts(rows, kept, spool, task)
    require_labels(len(kept), per_label, task)
    per_slice = slice_counts(kept, spool)
    repeated = {
        name: repeated_texts(rows["key"], rows[column], LISTED_TEXTS, LISTED_ROWS_PER_TEXT)
        for name, column in (("contradicting_labels", "label"), ("near_duplicates", "text"))
    }
    write_rows(spool, kept, [int(unique[position]) for position in exemplars])
    return {
        **refusal_report(gathered),
        "max_refused_share": params.max_refused_share,
        "exact_duplicates_removed": gathered.rows_read - gathered.refusals.count - len(unique),
        "exemplars": len(exemplars),
        "removed_with_exemplars": len(unique) - len(others) - len(exemplars),
        "rows_not_drawn": len(others) - len(kept),
        "rows_kept": len(kept),
        "rows_per_source": source_report(gathered, rows),
        "rows_per_label": per_label,
        "rows_per_published_split": {s: int((rows["split"] == number).sum()) for number, s in enumerate(SPLITS)},
        "rows_per_slice": per_slice,
        **{name: texts_report(texts, kept, spool) for name, texts in repeated.items()},
    }


def draw_from_sources(gathered: Gathered, rows: Rows, params: Ingest) -> NDArray[np.bool_]:
    """Which of the rows stay when each source gives as many as are wanted of it; shape (rows,).

    Raises:
        UserError: a source has fewer.
    """
    stays = np.zeros(len(rows), np.bool_)
    wanted = [params.rows, *(further.rows for further in params.further_sources)]
    for number, (source, count) in enumerate(zip(gathered.sources, wanted, strict=True)):
        of_source = np.flatnonzero(gathered.source_of(rows) == number)
        # Every source draws for itself: [seed, 0] would be the seed of the exemplars.
        seed = [params.seed, number + 1]
        stays[of_source] = draw_rows(rows["split"][of_source], count, seed, f"{source.key}.rows")
    return stays


def source_report(gathered: Gathered, kept: Rows) -> dict[str, dict[str, int]]:
    """How many rows each source had, and how many of them stay."""
    numbers = gathered.source_of(kept)
    return {
        source.key: {
            "read": sum(gathered.rows_per_file[file.name] for file in source.files),
            "kept": int((numbers == number).sum()),
        }
        for number, source in enumerate(gathered.sources)
    }


@contextmanager
def open_sources(params: Ingest, task: Task) -> Iterator[list[Source]]:
    """The tables of all sources, fetched first where they lie elsewhere.

    Raises:
        UserError: a source cannot be fetched, publishes splits twice, or has a wrong pattern for its columns.
    """
    blocks = [("ingest", params.source, params.columns)]
    for number, further in enumerate(params.further_sources):
        blocks.append((f"ingest.further_sources.{number}", further.source, further.columns))
    sources: list[Source] = []
    with ExitStack() as opened:
        for key, source, columns in blocks:
            files = opened.enter_context(open_source(source, f"{key}.source"))
            if columns.split is not None and any(file.split for file in files):
                raise UserError(
                    f"{key}.columns.split: {columns.split!r} contradicts {key}.source.paths, which names the splits "
                    "already. Set it to null, or list the paths without splits."
                )
            files = distinct_files(files, [file for earlier in sources for file in earlier.files], key)
            sources.append(Source(key, files, make_mapping(columns, task, f"{key}.columns")))
        yield sources


def main() -> None:
    """Write data/records.parquet, data/exemplars.parquet and data/reports/ingest.json."""
    params = load_params("task", "ingest")
    REFUSED_REPORT.unlink(missing_ok=True)
    with scratch_folder(RECORDS) as folder, open_sources(params.ingest, params.task) as sources:
        report = ingest(sources, params.ingest, params.task, folder / "spool.parquet")
    write_json(REPORT, report)
    print(summary(report))


def summary(report: dict[str, Any]) -> str:
    """The report in one line."""
    counts = {label: f"{count:,}" for label, count in report["rows_per_label"].items()}
    sources = report["rows_per_source"].items() if len(report["rows_per_source"]) > 1 else []
    counts |= {key: f"{source['kept']:,} of {source['read']:,}" for key, source in sources}
    details = f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if counts else ""
    drawn = f", {report['rows_not_drawn']:,} not drawn" if report["rows_not_drawn"] else ""
    return (
        f"ingest: {report['rows_kept']:,} of {report['rows_read']:,} rows kept{details}; "
        f"{report['rows_refused']:,} refused, {report['exact_duplicates_removed']:,} exact duplicates, "
        f"{report['exemplars']:,} exemplars and {report['removed_with_exemplars']:,} rows of their groups set aside"
        f"{drawn}"
    )


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
