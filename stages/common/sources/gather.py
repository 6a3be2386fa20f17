"""One pass over each source: valid rows go to a file on disk, 64-bit digests of them stay in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.common.sources.cells import RefusedRow, shown
from stages.common.sources.columns import SPLITS, Mapping, Record
from stages.common.sources.duplicates import first_positions
from stages.common.sources.opening import SourceFile
from stages.common.sources.readers import read_rows
from stages.common.tables import iter_batches, open_table, rows_at
from stages.common.text_keys import group_key

SCHEMA = pa.schema([(name, pa.string()) for name in Record._fields])
# Rows written at once, unless their texts reach the second number first.
BATCH_ROWS = 10_000
BATCH_CHARACTERS = 16_000_000
LISTED_REFUSALS = 1_000
# All that is kept in memory of a row: where it came from, and 64-bit digests of what makes it a repetition.
DIGESTS = np.dtype(
    [
        *[("position", "i8"), ("file", "i4"), ("row", "i8"), ("identity", "i8"), ("id", "i8"), ("text", "i8")],
        *[("key", "u8"), ("group", "u8"), ("label", "i8"), ("split", "i1")],
    ]
)
Rows = NDArray[np.void]
# Position among all rows read, number of the file, row in it, record.
Batch = list[tuple[int, int, int, Record]]


@dataclass
class Refusals:
    """Rows that become no record: all are counted, the first are listed."""

    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def add(self, position: int, file: str, row: int, refused: RefusedRow) -> None:
        """Note a row; `position` is its place among all rows read."""
        self.count += 1
        self.kinds[refused.kind] += 1
        self.listed.append((position, {"file": file, "row": row, "reason": refused.reason}))
        if len(self.listed) >= 2 * LISTED_REFUSALS:
            self.listed = sorted(self.listed, key=lambda item: item[0])[:LISTED_REFUSALS]

    def first(self, most: int = LISTED_REFUSALS) -> list[dict[str, Any]]:
        """The first refused rows, in the order in which they were read."""
        return [row for _, row in sorted(self.listed, key=lambda item: item[0])[:most]]


class Source(NamedTuple):
    """A source's tables, and how their rows become records.

    Args:
        key: where params.yaml has it, for messages and reports.
        files: the tables; no name or origin is that of another source's table.
        mapping: how rows become records.
    """

    key: str
    files: list[SourceFile]
    mapping: Mapping


@dataclass
class Gathered:
    """What one pass over each source found: the valid rows lie in the spool, `rows` has their digests in its order."""

    sources: list[Source]
    rows_per_file: dict[str, int]
    refusals: Refusals
    rows: Rows

    @property
    def rows_read(self) -> int:
        """All rows, refused ones too."""
        return sum(self.rows_per_file.values())

    @property
    def files(self) -> list[SourceFile]:
        """The tables of all sources; the digests have positions in this list."""
        return [file for source in self.sources for file in source.files]

    def source_of(self, rows: Rows) -> NDArray[np.intp]:
        """The number of the source that each of the rows comes from; shape (rows,)."""
        numbers = np.repeat(np.arange(len(self.sources)), [len(source.files) for source in self.sources])
        return numbers[rows["file"]]


def gather(sources: list[Source], labels: list[str], spool: Path, on_bytes: Callable[[int], Any]) -> Gathered:
    """Read the sources once, one after the other, and write their valid rows to the Parquet file `spool`.

    Args:
        sources: the tables.
        labels: params.task.labels where each row has one of them; else empty.
        spool: the file to write; schema SCHEMA.
        on_bytes: called with the number of bytes read since the last call.

    Raises:
        UserError: a file cannot be read as a table with the columns wanted.
    """
    gathered = Gathered(sources, {}, Refusals(), np.empty(0, DIGESTS))
    gathered.rows_per_file.update((file.name, 0) for file in gathered.files)
    label_numbers = {label: number for number, label in enumerate(labels)}
    parts = [gathered.rows]
    with open_table(spool, SCHEMA) as table:
        for batch, grouped in _batches(gathered, on_bytes):
            parts.append(_digests(batch, label_numbers, grouped))
            columns = zip(*(record for *_, record in batch), strict=True)
            arrays = [pa.array(column, pa.string()) for column in columns]
            table.add_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    gathered.rows = np.concatenate(parts)
    return gathered


def _batches(gathered: Gathered, on_bytes: Callable[[int], Any]) -> Iterator[tuple[Batch, bool]]:
    """Batches of valid rows, and whether their groups come from a column; counts rows and refusals on the way."""
    batch: Batch = []
    position, file_number, characters = 0, -1, 0
    for source in gathered.sources:
        for file in source.files:
            file_number += 1
            for row, values in read_rows(file.path, file.name, file.format, source.mapping.columns, on_bytes):
                position += 1
                gathered.rows_per_file[file.name] += 1
                try:
                    if isinstance(values, str):
                        raise RefusedRow(values, "unreadable row")
                    record = source.mapping.make(values, f"{file.origin}:{row}", file.split)
                except RefusedRow as refused:
                    gathered.refusals.add(position, file.name, row, refused)
                    continue
                batch.append((position, file_number, row, record))
                characters += len(record.text) + len(record.label) + len(record.messages or "")
                if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                    yield batch, source.mapping.grouped
                    batch, characters = [], 0
        if batch:
            yield batch, source.mapping.grouped
            batch, characters = [], 0


def _digests(batch: Batch, label_numbers: dict[str, int], grouped: bool) -> Rows:
    split_numbers = {None: -1} | {split: number for number, split in enumerate(SPLITS)}
    digests = []
    for position, file, row, record in batch:
        text, label, group_number = record.text, record.label, int(record.group, 16)
        key = int(group_key(text), 16) if grouped else group_number
        identity = hash((text, label, record.group, record.split, record.slice, record.messages))
        numbers = (position, file, row, identity, hash(record.id), hash(text), key, group_number)
        label_number = label_numbers[label] if label_numbers else hash(label)
        digests.append((*numbers, label_number, split_numbers[record.split]))
    return np.array(digests, DIGESTS)


def unique_rows(gathered: Gathered, spool: Path) -> NDArray[np.intp]:
    """Leave out exact duplicates (all fields but the id the same), and refuse other rows whose id is taken.

    Args:
        gathered: its refusals grow.
        spool: the valid rows.

    Returns:
        Positions in the spool of the rows that stay, ascending.
    """
    files = gathered.files
    rows = gathered.rows
    everyone = np.arange(len(rows))
    distinct = everyone[first_positions(rows["identity"]) == everyone]
    holders = distinct[first_positions(rows["id"][distinct])]
    taken = holders != distinct
    late, early = distinct[taken], holders[taken]
    texts = rows_at(spool, late[:LISTED_REFUSALS], ["id"])
    for number, (position, holder) in enumerate(zip(late.tolist(), early.tolist(), strict=True)):
        row, first = rows[position], rows[holder]
        identifier = shown(texts[position]["id"]) if number < LISTED_REFUSALS else "…"
        reason = f"id {identifier} is already that of {files[first['file']].name} row {first['row']:,}"
        refused = RefusedRow(reason, "id is taken")
        gathered.refusals.add(int(row["position"]), files[row["file"]].name, int(row["row"]), refused)
    return distinct[~taken]


def spool_counts(spool: Path, positions: NDArray[np.intp], column: str) -> Counter[str]:
    """How often each value of a column occurs among some of the spool's rows (ascending); nulls are not counted."""
    counts: Counter[str] = Counter()
    start = 0
    for batch in iter_batches(spool, [column]):
        low, high = np.searchsorted(positions, [start, start + batch.num_rows])
        values = batch.column(0).take(pa.array(positions[low:high] - start)).drop_null()
        counts.update({item["values"]: item["counts"] for item in values.value_counts().to_pylist()})
        start += batch.num_rows
    return counts
