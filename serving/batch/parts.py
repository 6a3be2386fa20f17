"""Answers on disk, a file for each piece of the input: whole or absent, whatever ends the process or the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.batch.answering import Tally
from serving.batch.output import write
from serving.common.adapter import Adapter
from stages.common.predictions import probability_column
from stages.common.sources.cells import ascii_controls
from stages.common.tables import TableWriter

Lines = list[dict[str, Any]]
TEMPORARY = ".tmp"
# What only a line without an answer, and only a shortened one, holds: inside a text the quotes have backslashes, and
# what stands behind a label of that name is a number.
_HAS_ERROR, _IS_SHORTENED = b'"error": "', b'"shortened": true'


@contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, on the disk itself; removed if that fails.

    The name is always the same: who writes has a lock, so that what a killed process left is written over.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_durable_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with durable_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def open_part(path: Path, adapter: Adapter) -> Iterator[Callable[[Lines], None]]:
    """What appends lines to a part, which appears when the block ends without an error.

    Args:
        path: its ending says whether it is Parquet or JSON Lines.
        adapter: whose answers they are.
    """
    with durable_path(path) as temporary:
        if path.suffix == ".parquet":
            writer = TableWriter(temporary, part_schema(adapter))

            def add(lines: Lines) -> None:
                for line in lines:
                    writer.add(_cells(line))

            yield add
            writer.close()
        else:
            with temporary.open("wb") as file:
                yield lambda lines: write(file, lines)


def part_schema(adapter: Adapter) -> pa.Schema:
    """The columns of Parquet parts; those of answers are null where there is an error."""
    if adapter.answers_with_texts:
        answers = [("answer", pa.string())]
    else:
        several = adapter.kind == "multi_label"
        answers = [("labels", pa.list_(pa.string())) if several else ("label", pa.string())]
        answers += [(probability_column(label), pa.float64()) for label in adapter.prompt_format.labels]
    return pa.schema([("id", pa.string()), *answers, ("shortened", pa.bool_()), ("error", pa.string())])


def _cells(line: dict[str, Any]) -> dict[str, Any]:
    """A line as a row of Parquet, which holds no half of a surrogate pair."""
    texts: dict[str, Any] = {name: ascii_controls(line[name]) for name in ("id", "answer", "error") if name in line}
    probabilities = {probability_column(label): value for label, value in line.get("probabilities", {}).items()}
    return {**line, **texts, **probabilities, "shortened": "shortened" in line}


def count_part(path: Path, tally: Tally) -> None:
    """Count the rows of a part on disk."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["id", "shortened", "error"]):
                rows = batch.filter(batch["error"].is_valid()).to_pylist()
                shortened = batch["shortened"].true_count
                tally.count(batch.num_rows, shortened, [f"{row['id']}: {row['error']}" for row in rows])
        return
    with path.open("rb") as file:
        for line in file:
            problems = []
            if _HAS_ERROR in line:
                row = json.loads(line)
                problems.append(f"{row['id']}: {row['error']}")
            tally.count(1, _IS_SHORTENED in line, problems)
