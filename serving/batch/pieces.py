"""An input file looked through once, cut into pieces, and the rows of each piece without those before it.

JSON Lines are cut at lines: a line that is no row, being empty, counts too, so that a piece can have fewer rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from serving.batch.files import in_options
from serving.batch.folder import InputFile
from serving.batch.json_rows import BLOCK, JsonRows
from serving.batch.parquet_rows import ParquetRows
from serving.batch.piece import DamagedFileError, NumberedRow, Piece, damage
from stages.common.base import file_sha256
from stages.common.sources.readers import ROWS_THAT_SHOW_COLUMNS, require_columns
from stages.common.sources.streams import DAMAGED, Allowance, open_decompressed


class Survey(NamedTuple):
    """What is known of an input file before its rows are read.

    Attributes:
        sha256: of its bytes, in hexadecimal digits.
        rows: its rows, or lines.
        starts: for each piece the byte at which it starts, after decompression; none for Parquet, which has an index.
    """

    sha256: str
    rows: int
    starts: list[int]


def survey(file: InputFile, rows_per_piece: int, columns: list[str], encoding: str) -> Survey:
    """Read a file through, in constant memory.

    Args:
        file: the file.
        rows_per_piece: most rows in a piece.
        columns: those that it needs.
        encoding: of JSON Lines.

    Raises:
        UserError: it is damaged, lacks a column, or is a JSON list.
    """
    sha256 = file_sha256(file.path)
    with ExitStack() as stack, in_options():
        table = open_input(file, columns, encoding, stack)
        if isinstance(table, ParquetRows):
            return Survey(sha256, table.count, [])
        rows, starts = table.line_places(rows_per_piece)
    with ExitStack() as stack, in_options():
        table = open_input(file, columns, encoding, stack)
        assert isinstance(table, JsonRows)
        table.require_columns(min(rows, ROWS_THAT_SHOW_COLUMNS))
    return Survey(sha256, rows, starts)


def cut(found: Survey, rows_per_piece: int) -> list[Piece]:
    """The pieces of a file."""
    firsts = range(0, found.rows, rows_per_piece)
    starts = found.starts or [0] * len(firsts)
    return [
        Piece(first, min(rows_per_piece, found.rows - first), start)
        for first, start in zip(firsts, starts, strict=True)
    ]


def open_input(file: InputFile, columns: list[str], encoding: str, stack: ExitStack) -> JsonRows | ParquetRows:
    """The rows of a file, open until the stack closes.

    Raises:
        UserError: it is no such file, or lacks a column (of JSON Lines `survey` says that).
    """
    try:
        if file.form == "jsonl":
            stream = stack.enter_context(open_decompressed(file.path, file.name))
            return JsonRows(stream, file.name, columns, encoding)
        table = stack.enter_context(pq.ParquetFile(file.path, buffer_size=BLOCK))
        # A text that repeats is in memory once, however many rows name it.
        leaves = [table.schema.column(index) for index in range(len(table.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        table = stack.enter_context(
            pq.ParquetFile(file.path, metadata=table.metadata, buffer_size=BLOCK, read_dictionary=texts)
        )
    except (pa.ArrowException, *DAMAGED) as error:
        raise damage(error, file.name, "its beginning") from None
    require_columns(table.schema_arrow.names, columns, file.name)
    return ParquetRows(table, file.name, columns, Allowance(file.path, file.name))


class Reader:
    """Pieces of several files one after another, the file of the last piece being kept open."""

    def __init__(self, columns: list[str], encoding: str) -> None:
        self._columns, self._encoding = columns, encoding
        self._stack = ExitStack()
        self._file: InputFile | None = None
        self._table: JsonRows | ParquetRows | None = None

    def rows(self, file: InputFile, piece: Piece) -> Iterator[NumberedRow]:
        """The rows of a piece; see `JsonRows.rows` and `ParquetRows.rows`."""
        if self._table is None or file != self._file or not self._table.can_reach(piece):
            self._stack.close()
            self._table, self._file = None, file
            with in_options():
                self._table = open_input(file, self._columns, self._encoding, self._stack)
        try:
            yield from self._table.rows(piece)
        except DamagedFileError:
            # Where its stream stands now, nobody knows.
            self._table = None
            raise
