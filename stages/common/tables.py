"""Reading and writing the pipeline's files: Parquet tables in bounded memory, JSON, and nothing half-written."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stages.common.errors import UserError

# Rows in a Parquet row group: large enough to compress well, small enough that a group of long texts is a few MB.
ROWS_PER_GROUP = 10_000


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, and is removed when the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; outputs are shared like any other file.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, on the same disk, that is removed when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.") as folder:
        yield Path(folder)


def _remove_leftovers(path: Path) -> None:
    """Temporary files and folders beside `path` of processes that were killed; names say which process it was."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _is_running(int(number)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # a signal that only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _waits_for_its_parent(process)


def _waits_for_its_parent(process: int) -> bool:
    """Whether it has ended and is only still listed, a zombie, as for seconds below an init that looks now and then."""
    try:
        # The name, in brackets, may hold anything: proc_pid_stat(5).
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"


class TableWriter:
    """Appends rows to a Parquet file, one row group in memory at a time.

    Args:
        path: the file, written whole or not at all when used through `open_table`.
        schema: column names and types; its metadata goes into the file.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows_written = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, a value for each column of the schema."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Append a whole batch whose columns are the schema's."""
        self._flush()
        if batch.num_rows:
            self._writer.write_batch(batch)
            self.rows_written += batch.num_rows

    def close(self) -> None:
        """Write what is still in memory and the file's footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self.rows_written += len(self._rows)
            self._rows = []


@contextmanager
def open_table(path: str | Path, schema: pa.Schema, metadata: dict[str, Any] | None = None) -> Iterator[TableWriter]:
    """Write the Parquet file `path` row by row; it appears when the block ends without an error.

    Args:
        path: the file to write.
        schema: column names and types.
        metadata: values that JSON can hold, stored in the file's footer under their keys.
    """
    if metadata:
        encoded = {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in metadata.items()}
        schema = schema.with_metadata(encoded)
    with atomic_path(path) as temporary:
        writer = TableWriter(temporary, schema)
        yield writer
        writer.close()


@contextmanager
def open_parquet(path: str | Path) -> Iterator[pq.ParquetFile]:
    """One of the pipeline's own tables, to read from.

    Raises:
        UserError: the file is damaged, cut short or no Parquet.
    """
    # Arrow's errors for files that are absent or no files have neither a name nor always a number; Python's do.
    Path(path).open("rb").close()
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except pa.ArrowInvalid as error:
        problem = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: is damaged or no Parquet file ({problem}). Run `dvc repro` to make it.") from None


def read_table(path: str | Path, columns: list[str]) -> pa.Table:
    """Some columns of a whole table."""
    with open_parquet(path) as table:
        return table.read(columns)


def row_count(path: str | Path) -> int:
    """How many rows a table has, from its footer."""
    with open_parquet(path) as table:
        return table.metadata.num_rows


def table_metadata(path: str | Path, key: str) -> Any:
    """The JSON value that `open_table` stored under `key`.

    Raises:
        UserError: the file holds none, so it was not written by this pipeline.
    """
    with open_parquet(path) as table:
        metadata = table.schema_arrow.metadata or {}
    if key.encode() not in metadata:
        raise UserError(f"{path}: holds no {key!r}: it was not written by this pipeline. Run `dvc repro` to make it.")
    return json.loads(metadata[key.encode()])


def iter_batches(path: str | Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The table in batches of at most `ROWS_PER_GROUP` rows, so that any table fits in memory."""
    with open_parquet(path) as table:
        yield from batches_of(table, ROWS_PER_GROUP, columns)


def batches_of(table: pq.ParquetFile, rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """An open table in batches of at most so many rows, some row groups in memory at a time.

    Arrow, asked for all row groups at once, keeps what it has read of each until the end: the whole file.
    """
    groups: list[int] = []
    held = 0
    for number in range(table.num_row_groups):
        size = table.metadata.row_group(number).num_rows
        if groups and held + size > rows:
            yield from table.iter_batches(batch_size=rows, row_groups=groups, columns=columns)
            groups, held = [], 0
        groups.append(number)
        held += size
    yield from table.iter_batches(batch_size=rows, row_groups=groups, columns=columns)


def rows_at(path: str | Path, positions: npt.ArrayLike, columns: list[str]) -> dict[int, dict[str, Any]]:
    """Some of a table's rows, by position; one pass, a batch in memory at a time."""
    wanted, start = np.unique(np.asarray(positions, np.intp)), 0
    found: dict[int, dict[str, Any]] = {}
    if not len(wanted):
        return {}
    for batch in iter_batches(path, columns):
        here = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
        if len(here):
            found.update(zip(here.tolist(), batch.take(pa.array(here - start)).to_pylist(), strict=True))
        start += batch.num_rows
    return found


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in the order given.

    Raises:
        ValueError: a number is not finite; JSON has no word for it, and `dvc metrics diff` could not read the file.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file is damaged, cut short or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON in UTF-8 ({error}). Restore it, or run `dvc repro`.") from None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
