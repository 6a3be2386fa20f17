"""Rows out of what people paste or upload; within limits, each with its id, none dropped."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

from serving.batch.rows import Columns, Row, table_rows, text_rows
from stages.common.errors import UserError

# A page is for looking at answers; whoever comes next waits until they are there.
MOST_ROWS = 2_000
MOST_PASTED_CHARACTERS = 200_000
MOST_FILE_MIB = 10
# What messages say about the command line of `serving.predict`, and what to say here.
_SAVE_IT = " Save it as UTF-8 (in Excel: CSV UTF-8)."
_SAID_HERE = (
    (r" Give with --encoding .*?, or save the file as UTF-8\.", _SAVE_IT),
    (r" If it is UTF-16, give --encoding utf-16-le\.", _SAVE_IT),
    (r'Name others with --column \(.*?\) and --id-column\.', "Choose another column."),
    (r", or give --format tsv for tabs", ""),
    (r"--(id-)?column", "the column"),
)  # fmt: skip


def pasted_rows(text: str, by_line: bool) -> list[Row]:
    """The texts in a text field: one a line, an empty line too being a row, or all of it.

    Raises:
        UserError: there is none, or there are too many rows or characters.
    """
    if not text.strip():
        raise UserError("There is no text yet: write or paste one.")
    if len(text) > MOST_PASTED_CHARACTERS:
        raise UserError(
            f"These are {len(text):,} characters, and the field takes {MOST_PASTED_CHARACTERS:,}. Upload a CSV file "
            "or use python -m serving.predict."
        )
    # As in a file, the last line may end or not.
    return _limited(list(text_rows(text.removesuffix("\n").split("\n") if by_line else [text])))


def csv_columns(path: Path) -> list[str]:
    """The columns that the first row of a CSV file names.

    Raises:
        UserError: they cannot be read, or the file is no CSV.
    """
    try:
        # A byte order mark, which spreadsheets write, is no part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((cells for cells in csv.reader(file) if cells), [])
    except UnicodeError:
        raise UserError(f"{path.name} is not UTF-8 text.{_SAVE_IT}") from None
    except csv.Error as error:
        raise UserError(f"{path.name} is not usable as CSV: its first row is broken ({error}).") from None
    # UTF-16 without a mark, which can be read as UTF-8.
    if "\0" in "".join(header):
        raise UserError(f"{path.name} is not UTF-8 text.{_SAVE_IT}")
    if not header:
        raise UserError(f"{path.name} is empty. Its first row should name the columns.")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise UserError(f"The cells of {path.name} are separated by ; or tabs. Save it with commas.")
    return list(dict.fromkeys(header))


def csv_rows(path: Path, text_column: str, id_column: str | None) -> list[Row]:
    """The rows of a CSV file in UTF-8.

    Args:
        path: the file.
        text_column: the column with the texts.
        id_column: the column with the rows' ids; None: FILE:LINE.

    Raises:
        UserError: the file is damaged or no UTF-8, lacks a column, or has no row or too many.
    """
    try:
        rows = table_rows(str(path), "csv", "utf-8", Columns(text_column, id_column, None, "classification"))
        found = list(itertools.islice(rows, MOST_ROWS + 1))
    except UserError as error:
        message = str(error)
        for words, here in _SAID_HERE:
            message = re.sub(words, here, message, flags=re.DOTALL)
        raise UserError(message) from None
    if not found:
        raise UserError(f"{path.name} has no row below the one that names the columns.")
    return _limited(found)


def _limited(rows: list[Row]) -> list[Row]:
    if len(rows) > MOST_ROWS:
        raise UserError(
            f"These are more than {MOST_ROWS:,} rows, the most that this page answers at once. Split them, or use "
            "python -m serving.predict, which takes files of any size."
        )
    return rows
