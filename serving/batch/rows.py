"""Rows to be answered, out of the command line, a table, or lines of text: each with its id, none dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from serving.batch.files import name_of, read_lines, read_table
from serving.batch.processes import has_gpu
from stages.common.schema.ingest import Conversation
from stages.common.sources.cells import (
    Parts,
    RefusedRow,
    as_list,
    parse_pattern,
    require_characters,
    single_column,
    text_reader,
    value_reader,
)
from stages.common.sources.conversations import FORMATS as TURNS
from stages.common.sources.conversations import Message, messages_maker

Content = str | list[Message]
# Answered at a time: most rows, and the characters behind which no further row is taken. A GPU wants several batches of
# 32,768 tokens; a CPU core took 3 to 8 % longer for 5,000 rows at a time than for 256, which also show lines soon.
AT_ONCE = {"cuda": (10_000, 8_000_000), "cpu": (256, 2_000_000)}


class Row(NamedTuple):
    """One row of the input.

    Attributes:
        id: of its id column, else SOURCE:NUMBER.
        content: a text, or the turns of a conversation, the user's last; None when it cannot be answered.
        problem: why not; None when it can.
    """

    id: str
    content: Content | None
    problem: str | None


class Columns(NamedTuple):
    """Where a table's rows have what is needed.

    Attributes:
        text: a column, or a pattern over columns as in ingest.columns.text.
        id: likewise; None: rows are named SOURCE:NUMBER.
        turns: how the cells of `text` write conversations, a key of TURNS; None: they are texts.
        kind: the adapter's kind of task.
    """

    text: str
    id: str | None
    turns: str | None
    kind: str


def text_rows(texts: Sequence[str]) -> Iterator[Row]:
    """The texts of the command line, numbered from 1."""
    for number, text in enumerate(texts, start=1):
        yield _row(f"text:{number}", _text, text)


def line_rows(file: str, encoding: str) -> Iterator[Row]:
    """One text a line, of a file or, with "-", of stdin; an empty line is a row that cannot be answered.

    Raises:
        UserError: see `read_lines`.
    """
    for number, line in read_lines(file, encoding):
        yield _row(f"{name_of(file)}:{number}", lambda text: _decoded(text, encoding), line)


def row_maker(columns: Columns) -> tuple[list[str], Callable[[str, Any], Row]]:
    """What a table's rows are made of, and what makes them.

    Args:
        columns: where they have what is needed.

    Returns:
        The columns that are read, and what takes a row's own name and its values in that order (or a text that says why
        there are none).

    Raises:
        UserError: a pattern is wrong.
    """
    text = single_column(columns.text, "--column") if columns.turns else _pattern(columns.text, "--column")
    identifier = _pattern(columns.id, "--id-column") if columns.id is not None else []
    needed = list(dict.fromkeys(column for _, column in [*text, *identifier] if column is not None))
    read_id = text_reader(identifier, needed) if identifier else lambda values: ""
    read_content = _content_reader(columns, text, needed)

    def make(origin: str, values: Any) -> Row:
        if isinstance(values, str):
            return Row(origin, None, values)
        named = _row(origin, read_id, values)
        # A row without a usable id keeps its place under the name that it has anyway.
        return named if named.problem else _row(str(named.content or origin), read_content, values)

    return needed, make


def table_rows(file: str, form: str, encoding: str, columns: Columns) -> Iterator[Row]:
    """The rows of a table; NUMBER is that of the reader, with CSV, TSV and JSON Lines the line.

    Raises:
        UserError: a pattern is wrong, or see `read_table`.
    """
    needed, make = row_maker(columns)
    for number, values in read_table(file, form, encoding, needed):
        yield make(f"{name_of(file)}:{number}", values)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in batches of as many as are answered at once on this machine; none is empty."""
    most_rows, most_characters = AT_ONCE["cuda" if has_gpu() else "cpu"]
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.content) if isinstance(row.content, str) else sum(map(_length, row.content or []))
        if len(batch) >= most_rows or characters >= most_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _length(message: Message) -> int:
    return len(message["content"])


def _row(identifier: str, read: Callable[[Any], Content], value: Any) -> Row:
    try:
        return Row(identifier, read(value), None)
    except RefusedRow as refused:
        return Row(identifier, None, refused.reason)


def _text(text: str) -> str:
    """The text as `ingest` would take it."""
    if not text.strip():
        raise RefusedRow("the text is empty", "empty text")
    require_characters(text, "text")
    return text.strip()


def _decoded(line: str, encoding: str) -> str:
    # What the encoding has no character for; no text holds these.
    if any("\udc80" <= character <= "\udcff" for character in line):
        raise RefusedRow(f"is not {encoding} text; --encoding names another encoding", "not text")
    return _text(line)


def _pattern(value: str, option: str) -> Parts:
    # As in YAML's double quotes: recipes have patterns like that, and a shell hands backslash and n through.
    return parse_pattern(value.replace(r"\n", "\n").replace(r"\t", "\t") if "{" in value else value, option)


def _content_reader(columns: Columns, parts: Parts, needed: list[str]) -> Callable[[Sequence[Any]], Content]:
    if columns.turns is None:
        read_text = text_reader(parts, needed)
        return lambda values: _text(read_text(values))
    read_cell, turns_of = value_reader(parts, needed), _turns_reader(columns.turns, columns.kind)
    return lambda values: turns_of(read_cell(values))


def _turns_reader(turns: str, kind: str) -> Callable[[Any], Content]:
    """From a cell to the turns before the wanted answer, or to the question alone where the task has one exchange."""
    assert kind in ("question_answering", "chat"), "the command line is checked"
    form = Conversation(column="conversation", format=turns)  # type: ignore[arg-type]
    messages_of = messages_maker(form, kind)  # type: ignore[arg-type]
    role_key, content_key, roles = TURNS[turns]
    answering = next(name for name, role in roles.items() if role == "assistant")

    def read(cell: Any) -> Content:
        found = as_list(cell, "the conversation")
        last = found[-1] if found else None
        if isinstance(last, dict) and roles.get(str(last.get(role_key))) == "user":
            # What is to be answered: `ingest` takes conversations with their answers, and checks them.
            found = [*found, {role_key: answering, content_key: "?"}]
        messages = messages_of(found)[:-1]
        return messages if kind == "chat" else messages[0]["content"]

    return read
