"""Rows in files that are mapped into memory: written once, with what every start needs to know of all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from stages.common.errors import UserError
from stages.common.tables import ROWS_PER_GROUP, atomic_path, read_json, write_json


class Totals(NamedTuple):
    """What rows come to.

    Attributes:
        longest: tokens of the longest row, prompt and completion together.
        tokens: of all rows, prompts and completions.
        answers: tokens of all rows that have a loss: completions, and earlier answers of a conversation.
    """

    longest: int = 0
    tokens: int = 0
    answers: int = 0

    def with_rows(self, table: pa.Table | pa.RecordBatch) -> Totals:
        """These rows, and those of `table`, a batch of them."""
        completions = pc.list_value_length(table["completion_ids"])
        lengths = pc.add(pc.list_value_length(table["prompt_ids"]), completions)
        answers = pc.sum(completions).as_py() or 0
        if "prompt_answer_mask" in table.schema.names:
            answers += pc.sum(pc.list_flatten(table["prompt_answer_mask"])).as_py() or 0
        return Totals(
            max(self.longest, pc.max(lengths).as_py() or 0),
            self.tokens + (pc.sum(lengths).as_py() or 0),
            self.answers + answers,
        )


class CountedRows(Dataset):
    """Mapped rows that know their totals. What is derived from them, a selection say, is a plain data set again."""

    totals: Totals


def totals(rows: Dataset) -> Totals:
    """What rows come to; those of no file are counted now."""
    if isinstance(rows, CountedRows):
        return rows.totals
    found = Totals()
    for table in rows.with_format("arrow").iter(ROWS_PER_GROUP):
        found = found.with_rows(table)
    return found


def write_rows(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write rows of tokens, and their totals beside them."""
    found = Totals()

    def counted() -> Iterable[pa.RecordBatch]:
        nonlocal found
        for batch in batches:
            found = found.with_rows(batch)
            yield batch

    write_mapped(path, schema, counted())
    write_totals(path, found)


def read_rows_of(path: Path) -> CountedRows:
    """What `write_rows` has written, mapped.

    Raises:
        UserError: it is damaged.
    """
    try:
        rows = CountedRows.from_file(str(path))
        totals_of_rows = read_totals(path)
    except (pa.ArrowInvalid, OSError, TypeError, UserError) as error:
        raise UserError(
            f"{path}: these rows, which an earlier run converted, are damaged ({error}). Remove the folder "
            f"{path.parent} and run again: they are converted anew from data/splits."
        ) from None
    assert isinstance(rows, CountedRows)
    rows.totals = totals_of_rows
    return rows


def write_mapped(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write columns to be mapped; whole, also when the power fails: nobody compares them with their source again."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def write_totals(path: Path, found: Totals) -> None:
    """Write the totals of the rows in `path` beside it."""
    file = path.with_suffix(".json")
    write_json(file, found._asdict())
    with file.open("rb") as written:
        os.fsync(written.fileno())


def read_totals(path: Path) -> Totals:
    """The totals of the rows in `path`."""
    return Totals(**read_json(path.with_suffix(".json")))
