"""The rows of a Parquet file from any one on."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.batch.piece import DamagedFileError, NumberedRow, Piece, damage
from stages.common.errors import UserError
from stages.common.sources.readers import BYTES_OF_A_ROW, MAX_CELL_CHARACTERS, decoded_bytes
from stages.common.sources.streams import DAMAGED, Allowance

# Read and made into Python's objects at a time.
ROWS_PER_BATCH = 1_000


class ParquetRows:
    """The rows of a Parquet file from any one on: entered at a row group, and read forwards as pieces come in order."""

    def __init__(self, table: pq.ParquetFile, name: str, columns: list[str], allowance: Allowance) -> None:
        self._table, self._name, self._columns, self._allowance = table, name, columns, allowance
        metadata = table.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.count = metadata.num_rows
        self._starts = [0, *itertools.accumulate(sizes)][: len(sizes)]
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._held: pa.RecordBatch | None = None
        self._place = 0

    def rows(self, piece: Piece) -> Iterator[NumberedRow]:
        """The rows of a piece with their numbers; one of which Python can hold no value is a text that says so.

        Raises:
            DamagedFileError: a part of the file cannot be decoded, or what was read comes to more than the allowance.
        """
        try:
            self._go_to(piece.first)
            while (left := piece.first + piece.rows - self._place) > 0:
                first = self._place + 1
                batch = self._take(left)
                arrays = [batch.column(column) for column in self._columns]
                size = sum(map(decoded_bytes, arrays))
                self._allowance.take(size + BYTES_OF_A_ROW * batch.num_rows)
                yield from enumerate(_values(arrays, one_by_one=size > MAX_CELL_CHARACTERS), start=first)
        except UserError as error:
            self._batches = None
            raise DamagedFileError(str(error)) from None
        except (pa.ArrowException, *DAMAGED) as error:
            self._batches = None
            raise damage(error, self._name, f"row {self._place:,}") from None

    def can_reach(self, piece: Piece) -> bool:
        """Whether a piece can be read: any can."""
        return True

    def _go_to(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if self._batches is None or row < self._place or self._starts[group] > self._place:
            # Of several groups at once pyarrow makes common batches, and a damaged group would take whole ones with it.
            self._batches = itertools.chain.from_iterable(
                self._table.iter_batches(ROWS_PER_BATCH, row_groups=[number], columns=self._columns)
                for number in range(group, len(self._starts))
            )
            self._held, self._place = None, self._starts[group]
        while self._place < row:
            self._take(row - self._place)

    def _take(self, most: int) -> pa.RecordBatch:
        """The next rows, at least one."""
        while self._held is None or not self._held.num_rows:
            assert self._batches is not None, "_go_to was first"
            self._held = next(self._batches, None)
            if self._held is None:
                self._batches = None
                raise EOFError("it has fewer rows than its footer says")
        count = min(most, self._held.num_rows)
        taken, self._held = self._held.slice(0, count), self._held.slice(count)
        self._place += count
        return taken


def _values(columns: list[pa.Array], *, one_by_one: bool) -> Iterable[list[Any] | str]:
    """The values of each row, or why there are none."""
    if not one_by_one:
        # Bytes that are no UTF-8, a time beyond the year 9999: one such cell is the problem of its row alone.
        with contextlib.suppress(ValueError, OverflowError):
            plain = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in columns]
            return map(list, zip(*[column.to_pylist() for column in plain], strict=True))
    return map(_values_of_row, zip(*columns, strict=True))


def _values_of_row(cells: tuple[pa.Scalar, ...]) -> list[Any] | str:
    try:
        return [cell.as_py() for cell in cells]
    except (ValueError, OverflowError) as error:
        return f"holds a value that cannot be used ({str(error)[:100]})"
