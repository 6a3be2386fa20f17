"""What a table's cells hold, as text or list, and the patterns that put cells together."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from stages.common.errors import UserError

# How much of a value a message shows.
SHOWN_CHARACTERS = 60
# Literals, each followed by a column, or by None.
Parts = list[tuple[str, str | None]]


class RefusedRow(Exception):  # noqa: N818 - it is about a row, and no error of the program
    """Why a row becomes no record.

    Args:
        reason: what is wrong with this row.
        kind: the same for all rows with this fault, to count them by. It goes into the report and so into Git: it must
            not hold what a cell held.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


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


def as_list(value: Any, what: str) -> list[Any]:
    """A cell as list, as JSON Lines and Parquet have it, or as a JSON text, as CSV can hold it.

    Args:
        value: the cell; null, NaN and empty texts are an empty list.
        what: what the cell is, for messages.

    Raises:
        RefusedRow: it is no list, and no text of one.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            reason = f"{what} {shown(value)} is no list in JSON, as json.dumps writes it"
            raise RefusedRow(reason, f"{what} is no list") from None
    elif value is None or value != value or isinstance(value, str):
        return []
    if not isinstance(value, list):
        raise RefusedRow(f"{what} is a {type(value).__name__}, not a list", f"{what} is no list")
    return value


def require_characters(text: str, what: str) -> None:
    """Refuse what Parquet's texts, or programs that read them, cannot hold.

    Args:
        text: any text.
        what: what it is, for messages.

    Raises:
        RefusedRow: it holds a NUL byte or half of a surrogate pair.
    """
    if "\0" in text:
        raise RefusedRow(f"a NUL byte is in its {what}", "NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedRow(f"half of a surrogate pair is in its {what}", "broken Unicode") from None


def parse_pattern(pattern: str, key: str) -> Parts:
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


def single_column(column: str, key: str) -> Parts:
    """The same for a column whose cells are lists, which no pattern can put together.

    Raises:
        UserError: it is a pattern.
    """
    if "{" in column:
        raise UserError(f"{key}: {column!r} is a pattern. Give the name of one column: its cells are lists.")
    return [("", column)]


def text_reader(parts: Parts, needed: list[str]) -> Callable[[Sequence[Any]], str]:
    """From a row's values to a text; empty when all its columns are, whatever stands between them.

    Args:
        parts: from `parse_pattern`.
        needed: the columns of the values, in their order.
    """
    positions = [(literal, None if column is None else needed.index(column)) for literal, column in parts]
    if len(parts) == 1 and not parts[0][0]:
        value_of = value_reader(parts, needed)
        return lambda values: as_text(value_of(values))

    def read(values: Sequence[Any]) -> str:
        cells = [(literal, "" if i is None else as_text(values[i])) for literal, i in positions]
        if not any(cell.strip() for _, cell in cells):
            return ""
        return "".join(literal + cell for literal, cell in cells)

    return read


def value_reader(parts: Parts, needed: list[str]) -> Callable[[Sequence[Any]], Any]:
    """From a row's values to one of them as it is.

    Args:
        parts: of one column, without a literal.
        needed: the columns of the values, in their order.
    """
    ((_, column),) = parts
    assert column is not None
    position = needed.index(column)
    return lambda values: values[position]
