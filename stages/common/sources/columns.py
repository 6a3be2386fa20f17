"""From a source's row to a record: which column, or pattern over columns, each field comes from."""

from __future__ import annotations

import bisect
import math
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from stages.common.errors import UserError
from stages.common.params import AliasLabel, BinLabel, Columns
from stages.common.text_keys import group_key

SPLITS = ("train", "validation", "test")
# How much of a value a message shows.
SHOWN_CHARACTERS = 60


class RefusedRow(Exception):  # noqa: N818 - it is about a row, and no error of the program
    """Why a row becomes no record.

    Args:
        reason: what is wrong with this row.
        kind: the same for all rows with this fault, to count them by.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


class Record(NamedTuple):
    """One row of data/records.parquet."""

    id: str
    text: str
    label: str
    group: str
    split: str | None
    origin: str


class Mapping(NamedTuple):
    """How rows become records.

    Args:
        columns: the columns that are needed, in the order in which `make` takes their values.
        grouped: whether groups come from a column; else they come from the text.
        make: from (values, origin, split published by the file's place or None) to a record; raises RefusedRow.
    """

    columns: list[str]
    grouped: bool
    make: Callable[[Sequence[Any], str, str | None], Record]


def shown(value: object) -> str:
    """A value as messages show it: quoted, short, and without anything that could steer a terminal."""
    text = str(value)
    return ascii_controls(repr(text[:SHOWN_CHARACTERS])) + ("…" if len(text) > SHOWN_CHARACTERS else "")


def ascii_controls(text: str) -> str:
    """The text with what UTF-8 cannot hold (lone surrogates) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_text(value: Any) -> str:
    """A cell as text: null and NaN are empty, numbers are written as in JSON.

    Raises:
        RefusedRow: the value is a list, an object or anything else that is no single text.
    """
    if type(value) is str:
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal):
        return str(value)
    raise RefusedRow(f"{shown(value)} is a {type(value).__name__}, not a text or number", "not a text")


def parse_pattern(pattern: str, key: str) -> list[tuple[str, str | None]]:
    """A column's name, or a pattern such as "{title}: {abstract}", as literals each followed by a column (or None).

    Nothing but a column's name can stand between braces: a pattern never reaches attributes, indices or formats.

    Args:
        pattern: a pattern if it contains "{", else a column's name. Doubled braces stand for single ones.
        key: where params.yaml says it, for messages.

    Raises:
        UserError: the pattern is not of that form.
    """
    if "{" not in pattern:
        return [("", pattern)]
    advice = "Write {COLUMN} for a column's value, and {{ or }} for a brace."
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(f"{key}: {pattern!r} is no pattern ({error}). {advice}") from None
    for _, column, specification, conversion in parts:
        if column == "" or specification or conversion:
            raise UserError(f"{key}: {pattern!r} has something else than a column's name between braces. {advice}")
    if all(column is None for _, column, _, _ in parts):
        raise UserError(f"{key}: {pattern!r} names no column. {advice}")
    return [(literal, column) for literal, column, _, _ in parts]


def make_mapping(columns: Columns, labels: list[str]) -> Mapping:
    """Prepare the way from rows to records.

    Args:
        columns: params.ingest.columns.
        labels: params.task.labels.

    Raises:
        UserError: a pattern is wrong.
    """
    label = columns.label if isinstance(columns.label, str) else columns.label.column
    fields = {"id": columns.id, "text": columns.text, "label": label, "group": columns.group, "split": columns.split}
    patterns = {
        name: parse_pattern(value, f"ingest.columns.{name}") for name, value in fields.items() if value is not None
    }
    needed = list(dict.fromkeys(column for parts in patterns.values() for _, column in parts if column is not None))
    read = {name: _reader(parts, needed) for name, parts in patterns.items()}
    label_of = _label_maker(columns.label, labels)
    read_id, read_group, read_split = read.get("id"), read.get("group"), read.get("split")
    read_text, read_label = read["text"], read["label"]

    def make(values: Sequence[Any], origin: str, split: str | None) -> Record:
        text = read_text(values).strip()
        identifier = (read_id(values) if read_id else "") or origin
        _check_characters(text, identifier)
        label = label_of(read_label(values))
        if read_split:
            split = _check_split(read_split(values))
        if read_group:
            value = read_group(values)
            if not value.strip():
                raise RefusedRow("the group is empty", "empty group")
            group = group_key(ascii_controls(value))
        else:
            group = group_key(text)
        return Record(identifier, text, label, group, split, origin)

    return Mapping(needed, columns.group is not None, make)


def _reader(parts: list[tuple[str, str | None]], needed: list[str]) -> Callable[[Sequence[Any]], str]:
    """From a row's values to a field; empty when all its columns are, whatever stands between them."""
    positions = [(literal, None if column is None else needed.index(column)) for literal, column in parts]
    if len(parts) == 1 and not parts[0][0]:
        position = positions[0][1]
        assert position is not None
        return lambda values: as_text(values[position])

    def read(values: Sequence[Any]) -> str:
        cells = [(literal, "" if i is None else as_text(values[i])) for literal, i in positions]
        if not any(cell.strip() for _, cell in cells):
            return ""
        return "".join(literal + cell for literal, cell in cells)

    return read


def _check_characters(text: str, identifier: str) -> None:
    if not text:
        raise RefusedRow("the text is empty", "empty text")
    both = text + identifier
    if "\0" in both:
        raise RefusedRow("a NUL byte is in its text or id", "NUL byte")
    try:
        both.encode()
    except UnicodeEncodeError:
        raise RefusedRow("half of a surrogate pair is in its text or id", "broken Unicode") from None


def _check_split(value: str) -> str:
    if value not in SPLITS:
        raise RefusedRow(f"split {shown(value)} is none of {', '.join(SPLITS)}", "unknown split")
    return value


def _label_maker(source: str | AliasLabel | BinLabel, labels: list[str]) -> Callable[[str], str]:
    if isinstance(source, BinLabel):
        return lambda value: labels[bisect.bisect_left(source.bins, _number(value))]
    known = source.aliases if isinstance(source, AliasLabel) else {label: label for label in labels}

    def label_of(value: str) -> str:
        label = known.get(value)
        if label is not None:
            return label
        if not value.strip():
            raise RefusedRow("the label is empty", "empty label")
        # The kind goes into the report and so into Git: it must not hold what a cell held.
        raise RefusedRow(f"unknown label {shown(value)}", "unknown label")

    return label_of


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        reason = f"the label's value {shown(value)} is no number" if value.strip() else "the label's value is empty"
        raise RefusedRow(reason, "label value is no number")
    return number
