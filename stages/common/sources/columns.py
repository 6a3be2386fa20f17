"""From a source's row to a record: which column, or pattern over columns, each field comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stages.common.schema.ingest import AliasLabel, BinLabel, Columns, Conversation, ListLabel
from stages.common.schema.task import ClassificationTask, Task
from stages.common.sources.cells import (
    Parts,
    RefusedRow,
    ascii_controls,
    parse_pattern,
    require_characters,
    shown,
    single_column,
    text_reader,
    value_reader,
)
from stages.common.sources.conversations import Message, messages_maker, text_before_answer
from stages.common.sources.label_cells import label_maker, list_maker
from stages.common.text_keys import group_key

SPLITS = ("train", "validation", "test")


class Record(NamedTuple):
    """One row of data/records.parquet."""

    id: str
    text: str
    label: str
    group: str
    split: str | None
    slice: str | None
    messages: str | None
    origin: str


class Content(NamedTuple):
    """What a row says.

    Args:
        text: the text or question; of a conversation all turns before the last one.
        label: its label or answer.
        messages: in JSON, of a chat alone.
        beginning: what rows of one group share where no column says it: the text, or a chat's first question, since
            training learns from all answers behind it.
    """

    text: str
    label: str
    messages: str | None
    beginning: str


class Mapping(NamedTuple):
    """How rows become records.

    Args:
        columns: the columns that are needed, in the order in which `make` takes their values.
        grouped: whether groups come from something else than the text.
        make: from (values, origin, split published by the file's place or None) to a record; raises RefusedRow.
    """

    columns: list[str]
    grouped: bool
    make: Callable[[Sequence[Any], str, str | None], Record]


def make_mapping(columns: Columns, task: Task, key: str) -> Mapping:
    """Prepare the way from rows to records.

    Args:
        columns: `columns` of params.ingest or of one of its further sources.
        task: params.task.
        key: where params.yaml has the columns, for messages.

    Raises:
        UserError: a pattern is wrong.
    """
    parts = _parts(columns, key)
    needed = list(dict.fromkeys(column for found in parts.values() for _, column in found if column is not None))
    content_of = _content_reader(columns, task, parts, needed)
    others = ("id", "group", "split", "slice")
    read = {name: text_reader(parts[name], needed) for name in others if name in parts}
    read_id, read_group, read_split, read_slice = (read.get(name) for name in others)

    def make(values: Sequence[Any], origin: str, split: str | None) -> Record:
        content = content_of(values)
        identifier = (read_id(values) if read_id else "") or origin
        require_characters(identifier, "text or id")
        if read_split:
            split = _known_split(read_split(values))
        shared = content.beginning if read_group is None else ascii_controls(_filled(read_group(values), "group"))
        part = None if read_slice is None else _filled(read_slice(values), "slice").strip()
        if part is not None:
            require_characters(part, "slice")
        return Record(identifier, content.text, content.label, group_key(shared), split, part, content.messages, origin)

    return Mapping(needed, columns.group is not None or task.kind == "chat", make)


def _parts(columns: Columns, key: str) -> dict[str, Parts]:
    """The columns that each field needs; a field without any is left out."""
    text, label = columns.text, columns.label
    parts: dict[str, Parts] = {}
    for name, value in (
        ("id", columns.id),
        ("text", text),
        ("label", label),
        ("group", columns.group),
        ("split", columns.split),
        ("slice", columns.slice),
    ):
        if isinstance(value, Conversation) or (isinstance(value, ListLabel) and value.separator is None):
            parts[name] = single_column(value.column, f"{key}.{name}.column")
        elif value is not None:
            parts[name] = parse_pattern(value if isinstance(value, str) else value.column, f"{key}.{name}")
    return parts


def _content_reader(
    columns: Columns, task: Task, parts: dict[str, Parts], needed: list[str]
) -> Callable[[Sequence[Any]], Content]:
    if isinstance(task, ClassificationTask):
        return _labelled_reader(columns, task.labels, parts, needed)
    if isinstance(columns.text, Conversation):
        read_cell, messages_of = value_reader(parts["text"], needed), messages_maker(columns.text, task.kind)

        def conversation(values: Sequence[Any]) -> Content:
            messages = messages_of(read_cell(values))
            return _as_content(messages, task)

        return conversation
    read_text, read_answer = text_reader(parts["text"], needed), text_reader(parts["label"], needed)

    def question(values: Sequence[Any]) -> Content:
        text, answer = _filled(read_text(values), "text").strip(), _filled(read_answer(values), "answer").strip()
        require_characters(text, "text or id")
        require_characters(answer, "answer")
        return _as_content([{"role": "user", "content": text}, {"role": "assistant", "content": answer}], task)

    return question


def _as_content(messages: list[Message], task: Task) -> Content:
    text, answer = text_before_answer(messages), messages[-1]["content"]
    if task.kind != "chat":
        return Content(text, answer, None, text)
    first_question = next(message["content"] for message in messages if message["role"] == "user")
    return Content(text, answer, json.dumps(messages, ensure_ascii=False), first_question)


def _labelled_reader(
    columns: Columns, labels: list[str], parts: dict[str, Parts], needed: list[str]
) -> Callable[[Sequence[Any]], Content]:
    read_text, label_of = text_reader(parts["text"], needed), _label_reader(columns.label, labels, parts, needed)

    def labelled(values: Sequence[Any]) -> Content:
        text = _filled(read_text(values), "text").strip()
        require_characters(text, "text or id")
        return Content(text, label_of(values), None, text)

    return labelled


def _label_reader(
    label: str | AliasLabel | BinLabel | ListLabel | None, labels: list[str], parts: dict[str, Parts], needed: list[str]
) -> Callable[[Sequence[Any]], str]:
    assert label is not None, "params.py allows that with answers alone"
    if isinstance(label, ListLabel):
        read_cell = (value_reader if label.separator is None else text_reader)(parts["label"], needed)
        labels_of = list_maker(label, labels)
        return lambda values: labels_of(read_cell(values))
    read_label, label_of = text_reader(parts["label"], needed), label_maker(label, labels)
    return lambda values: label_of(read_label(values))


def _filled(value: str, field: str) -> str:
    if not value.strip():
        raise RefusedRow(f"the {field} is empty", f"empty {field}")
    return value


def _known_split(value: str) -> str:
    if value not in SPLITS:
        raise RefusedRow(f"split {shown(value)} is none of {', '.join(SPLITS)}", "unknown split")
    return value
