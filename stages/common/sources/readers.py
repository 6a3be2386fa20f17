"""Tables read row by row: CSV, TSV, JSON and Parquet, compressed or not, every row with its number."""

from __future__ import annotations

import codecs
import csv
import difflib
import functools
import io
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.common.errors import UserError, listing
from stages.common.schema.ingest import TableFormat
from stages.common.sources.json_objects import json_objects
from stages.common.sources.streams import (
    COMPRESSIONS,
    DAMAGED,
    Allowance,
    is_damage,
    lines_of,
    open_decompressed,
    seekable,
)
from stages.common.tables import batches_of

TYPES = {
    **{".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet"},
    # JSON Lines or a list of objects: the content tells which.
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"},
}
# A longer cell is no text any more but a quote that was never closed.
MAX_CELL_CHARACTERS = 32 * 1024 * 1024
# What a row takes in Parquet at least: in a file of one repeated value it would take nothing.
BYTES_OF_A_ROW = 64
# JSON Lines name their columns in each row, so "there is no such column" is decided on this many.
ROWS_THAT_SHOW_COLUMNS = 100

# A row's number and the values of the columns asked for; or, when the row cannot be used, a text that says why.
Row = tuple[int, Sequence[Any] | str]


def format_of(name: str) -> TableFormat:
    """The format that a file's name stands for: in UTF-8, quoted, the first row naming the columns.

    Raises:
        UserError: the name has no known ending.
    """
    stem = name.lower()
    for suffix in COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    for suffix, kind in TYPES.items():
        if stem.endswith(suffix):
            return TableFormat(
                type=kind,  # type: ignore[arg-type]
                column_names=None,
                quoting=True if kind in ("csv", "tsv") else None,
                encoding=None if kind == "parquet" else "utf-8",
            )
    raise UserError(
        f"{name}: its name does not say what kind of table it is. Known endings are {', '.join(TYPES)}, each also with "
        f"{', '.join(COMPRESSIONS)}; or set its source's format in params.yaml, for example "
        "{type: csv, column_names: null, quoting: true, encoding: utf-8}."
    )


def read_rows(
    path: Path, name: str, table_format: TableFormat, columns: list[str], on_bytes: Callable[[int], Any] | None = None
) -> Iterator[Row]:
    """Read a table row by row, in memory bounded by its longest row (or Parquet batch).

    Args:
        path: the file; gzip, bzip2, xz, Zstandard and zip (of one file) are recognised by their first bytes.
        name: what messages call it.
        table_format: how it is written.
        columns: the columns wanted; their order is that of the values.
        on_bytes: called with the number of bytes read since the last call, for a progress bar.

    Yields:
        Row number (CSV, TSV, JSON Lines: the line on which the row starts, from 1; else the row, from 1) and
        either the values, or a text that says why the row cannot be used.

    Raises:
        UserError: the file is empty or damaged, is not in its encoding, lacks a column, or decompresses to more than
            its `Allowance`.
    """
    parquet_rows = functools.partial(_parquet_rows, Allowance(path, name))
    readers: dict[str, Callable[..., Iterator[Row]]] = {
        **{"csv": _delimited_rows, "tsv": _delimited_rows, "jsonl": _json_rows, "parquet": parquet_rows}
    }
    if path.stat().st_size == 0:
        raise UserError(f"{name}: is empty. Put a table there, or take it out of its source's paths in params.yaml.")
    row = 0
    try:
        with open_decompressed(path, name, on_bytes) as stream:
            for row, values in readers[table_format.type](stream, name, table_format, columns):
                yield row, values
    except DAMAGED as error:
        if not is_damage(error):
            raise
        raise UserError(f"{name}: is damaged or incomplete after row {row:,} ({error}). Fetch it again.") from None
    except UnicodeError:
        raise UserError(_encoding_problem(path, name, table_format.encoding or "utf-8")) from None


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _delimited_rows(stream: IO[bytes], name: str, table_format: TableFormat, columns: list[str]) -> Iterator[Row]:
    # The limit is the csv module's own, for the whole process.
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(
        lines_of(_text_of(stream, name, table_format), name),
        delimiter="," if table_format.type == "csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if table_format.quoting else csv.QUOTE_NONE,
        # Not strict, a quote that is never closed would swallow the rest of the file without a word.
        strict=True,
    )
    header = table_format.column_names or _header(reader, name)
    pick = _picker(_positions(header, columns, name))
    width = len(header)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, _csv_problem(error)
            continue
        if len(cells) == width:
            yield number, pick(cells)
        elif cells:
            yield number, f"has {len(cells)} cells where there are {width} columns"


def _text_of(stream: IO[bytes], name: str, table_format: TableFormat) -> io.TextIOWrapper:
    assert table_format.encoding is not None, "params.py allows that with Parquet alone"
    try:
        encoding = codecs.lookup(table_format.encoding).name
        # A byte order mark, which spreadsheets write, is no part of the first column's name.
        return io.TextIOWrapper(stream, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="")
    except LookupError:
        raise UserError(
            f"{name}: its source's format.encoding {table_format.encoding!r} is unknown; utf-8, utf-16, cp1252 and "
            "the others in https://docs.python.org/3/library/codecs.html#standard-encodings are known."
        ) from None


def _header(reader: Any, name: str) -> list[str]:
    try:
        header = next((cells for cells in reader if cells), None)
    except csv.Error as error:
        raise UserError(f"{name}: its first row {_csv_problem(error)}; it should name the columns.") from None
    if header is None:
        raise UserError(f"{name}: holds nothing but empty lines. Put a table there, its first row naming the columns.")
    if any("\0" in cell for cell in header):
        raise UserError(
            f"{name}: its first row holds NUL bytes, as UTF-16 without a mark or a binary file does. If it is UTF-16, "
            "set its source's format.encoding in params.yaml to utf-16-le."
        )
    return list(header)


def _picker(positions: list[int]) -> Callable[[list[str]], Sequence[str]]:
    """Take the cells at some positions out of a row."""
    if len(positions) == 1:
        return lambda cells: (cells[positions[0]],)
    return operator.itemgetter(*positions)


def _positions(header: list[str], columns: list[str], name: str) -> list[int]:
    require_columns(header, columns, name)
    repeated = [column for column in columns if header.count(column) > 1]
    if repeated:
        raise UserError(f"{name}: has the column {listing([repr(c) for c in repeated])} more than once. Rename one.")
    return [header.index(column) for column in columns]


def require_columns(found: Sequence[str], wanted: list[str], name: str) -> None:
    """Check that a table has the columns that params.yaml names.

    Raises:
        UserError: some are missing; says which there are, and which are closest.
    """
    missing = [column for column in wanted if column not in found]
    if not missing:
        return
    close = [match for column in missing for match in difflib.get_close_matches(column, found, n=1)]
    hint = f" Did you mean {listing([repr(column) for column in close])}?" if close else ""
    if len(found) == 1 and (";" in found[0] or "\t" in found[0]):
        hint = " Its cells are separated by ; or tabs: save it with commas, or set format.type to tsv for tabs."
    raise UserError(
        f"{name}: has no column {listing([repr(column) for column in missing])}. It has "
        f"{listing([repr(column)[:80] for column in found], 30)}.{hint} Correct ingest.columns in params.yaml "
        "(of a further source, its columns; or format.column_names, where the first row names no columns)."
    )


def _csv_problem(error: csv.Error) -> str:
    message = str(error)
    if "unexpected end of data" in message:
        return "opens a quote that is never closed"
    if "field limit" in message:
        return f"has a cell of more than {MAX_CELL_CHARACTERS:,} characters, or a quote that is never closed"
    if "expected after" in message:
        return "has text after a closing quote (a quote inside a quoted cell is written twice)"
    return f"is broken: {message}"


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(stream: IO[bytes], name: str, table_format: TableFormat, columns: list[str]) -> Iterator[Row]:
    rows = json_objects(_text_of(stream, name, table_format), name)
    first = list(itertools.islice(rows, ROWS_THAT_SHOW_COLUMNS))
    if not first:
        raise UserError(f"{name}: holds nothing but empty lines or an empty list. Put JSON objects there, one a line.")
    found = dict.fromkeys(key for _, row in first if isinstance(row, dict) for key in row)
    if found:
        require_columns(list(found), columns, name)
    for number, row in itertools.chain(first, rows):
        yield number, row if isinstance(row, str) else [row.get(column) for column in columns]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(
    allowance: Allowance, stream: IO[bytes], name: str, table_format: TableFormat, columns: list[str]
) -> Iterator[Row]:
    assert table_format.type == "parquet"
    with seekable(stream) as file:
        try:
            table = pq.ParquetFile(file)
            # Texts that repeat are decoded once: a bomb names one of a hundred megabytes in each of a million rows.
            texts = [leaf.path for leaf in _leaves(table.schema) if leaf.physical_type == "BYTE_ARRAY"]
            table = pq.ParquetFile(file, metadata=table.metadata, read_dictionary=texts)
        except pa.ArrowException as error:
            raise UserError(f"{name}: is no Parquet file ({str(error)[:200]}). Check its name or `format`.") from None
        _positions(table.schema_arrow.names, columns, name)
        number = 0
        try:
            for batch in batches_of(table, 4_000, columns):
                size = sum(map(decoded_bytes, batch.columns))
                allowance.take(size + BYTES_OF_A_ROW * batch.num_rows)
                arrays = [batch.column(column) for column in columns]
                for values in _rows_at_once(arrays) if size <= MAX_CELL_CHARACTERS else _rows_one_by_one(arrays):
                    number += 1
                    yield number, values
        except pa.ArrowException as error:
            raise UserError(f"{name}: is damaged after row {number:,} ({str(error)[:200]}). Fetch it again.") from None


def _leaves(schema: Any) -> Iterator[Any]:
    return (schema.column(index) for index in range(len(schema)))


def decoded_bytes(array: pa.Array) -> int:
    """What an array takes once each of its texts stands for itself, not for a place in a dictionary."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return pc.sum(lengths).as_py() or 0
    if pa.types.is_map(array.type):
        return decoded_bytes(array.keys) + decoded_bytes(array.items)
    if pa.types.is_struct(array.type):
        return sum(map(decoded_bytes, array.flatten()))
    return decoded_bytes(array.flatten()) if pa.types.is_nested(array.type) else int(array.nbytes)


def _rows_at_once(arrays: list[pa.Array]) -> Iterator[Sequence[Any] | str]:
    try:
        plain = [array.dictionary_decode() if pa.types.is_dictionary(array.type) else array for array in arrays]
        return zip(*(array.to_pylist() for array in plain), strict=True)
    except (ValueError, OverflowError):
        return _rows_one_by_one(arrays)


def _rows_one_by_one(arrays: list[pa.Array]) -> Iterator[Sequence[Any] | str]:
    for cells in zip(*arrays, strict=True):
        try:
            yield [cell.as_py() for cell in cells]
        except (ValueError, OverflowError) as error:
            yield f"holds a text that is not UTF-8, or a time that no calendar has ({error})"


# --- encodings --------------------------------------------------------------------------------------------------------


def _encoding_problem(path: Path, name: str, encoding: str) -> str:
    """Where a file stops being text in `encoding`; read again from the start, since readers decode ahead."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, head = 1, b""
    try:
        with open_decompressed(path, name) as stream:
            while piece := stream.read(1 << 20):
                head = head or piece[:4]
                line += decoder.decode(piece).count("\n")
            decoder.decode(b"", final=True)
    except UnicodeError as error:
        line += error.object[: error.start].count(b"\n") if isinstance(error, UnicodeDecodeError) else 0
        reason = getattr(error, "reason", str(error))
        remedy = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "the file's own (often cp1252 or utf-16)"
        return (
            f"{name}: line {line:,} is not {encoding} text ({reason}). Set its source's format.encoding to "
            f"{remedy}, or save the file as UTF-8."
        )
    except DAMAGED as error:
        if not is_damage(error):
            raise
        return f"{name}: is damaged or incomplete ({error}). Fetch it again."
    raise AssertionError("the second reading found nothing wrong")
