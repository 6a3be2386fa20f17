"""What requests to /invocations hold and what is answered: JSON, JSON Lines, or CSV without a header."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from serving.common.adapter import Adapter
from serving.common.chat import check_messages
from serving.predictor import Content
from stages.common.errors import UserError, listing
from stages.common.sources.cells import RefusedRow, require_characters
from stages.common.spreadsheets import csv_text

JSON, JSON_LINES, CSV = "application/json", "application/jsonlines", "text/csv"
# Names that others use for the same.
ALIASES = {"application/x-jsonlines": JSON_LINES, "application/jsonl": JSON_LINES, "application/x-ndjson": JSON_LINES}
FORMS = (JSON, JSON_LINES, CSV)
# What `stages.infer` scores at once.
MOST_ROWS = 10_000
# SageMaker's own limit for a request.
MOST_BYTES = 25 * 2**20
T = TypeVar("T")


class Refused(Exception):  # noqa: N818 - it is about a request, and no error of the program
    """Why a request is not answered; the message shows none of its texts.

    Args:
        status: of HTTP.
        message: what is wrong, what is allowed.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    """What a request asks for.

    Attributes:
        contents: what to answer, in order.
        single: whether it was one JSON object, which is answered by one.
    """

    contents: list[Content]
    single: bool


def form_of(content_type: str) -> str:
    """One of FORMS for a Content-Type.

    Raises:
        Refused: it is none of them, or not in UTF-8.
    """
    name, *parameters = (part.strip().lower() for part in content_type.split(";"))
    form = ALIASES.get(name, name)
    charsets = [value.strip('"') for key, _, value in (p.partition("=") for p in parameters) if key == "charset"]
    if form not in FORMS or any(charset not in ("utf-8", "utf8") for charset in charsets):
        raise Refused(415, f"Content-Type {content_type!r} is not read here; {', '.join(FORMS)} in UTF-8 are.")
    return form


def answer_form(accept: str, request_form: str) -> str:
    """The form that an Accept header prefers; the request's own where it takes any.

    Raises:
        Refused: it takes none of FORMS.
    """
    wanted = sorted(map(_preference, accept.split(",")), key=lambda pair: -pair[1])
    for name, quality in wanted:
        if quality <= 0:
            continue
        if name in ("", "*/*") or name == f"{request_form.split('/')[0]}/*":
            return request_form
        if ALIASES.get(name, name) in FORMS:
            return ALIASES.get(name, name)
    raise Refused(406, f"Accept {accept!r} is not answered here; {', '.join(FORMS)} are.")


def _preference(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    values = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
    try:
        return name, float(values[0]) if values else 1.0
    except ValueError:
        raise Refused(406, f"Accept: {part.strip()!r} has a q that is no number.") from None


def read_request(body: bytes, form: str, adapter: Adapter) -> Request:
    """What to answer.

    Raises:
        Refused: the body cannot be read, has no rows or too many, or some cannot be answered: then all of those are
            named, and none is answered.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not in UTF-8 (byte {error.start}).") from None
    items, single = {JSON: _json_items, JSON_LINES: _json_line_items, CSV: _csv_items}[form](text)
    if not items:
        raise Refused(400, "the body holds no rows, so there is nothing to answer.")
    if len(items) > MOST_ROWS:
        raise Refused(413, f"the body holds more than {MOST_ROWS:,} rows. Send fewer at once.")
    contents, problems = [], []
    for number, item in enumerate(items, start=1):
        try:
            contents.append(_content(item, adapter))
        except (RefusedRow, UserError) as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise Refused(400, f"{len(problems):,} of {len(items):,} rows cannot be answered: {listing(problems)}")
    return Request(contents, single)


def _json_items(text: str) -> tuple[list[Any], bool]:
    value = _loaded(text, "the body")
    if isinstance(value, dict) and set(value) == {"instances"} and isinstance(value["instances"], list):
        return value["instances"], False
    if isinstance(value, dict) and "instances" not in value:
        return [value], True
    raise Refused(400, 'the body has to be one row, as {"text": "…"}, or {"instances": [rows or texts]}.')


def _json_line_items(text: str) -> tuple[list[Any], bool]:
    lines = ((number, line) for number, line in enumerate(io.StringIO(text), start=1) if line.strip())
    return [_loaded(line, f"line {number}") for number, line in _some(lines)], False


def _csv_items(text: str) -> tuple[list[Any], bool]:
    csv.field_size_limit(MOST_BYTES)
    try:
        rows = list(_some(csv.reader(io.StringIO(text, newline=""), strict=True)))
    except csv.Error as error:
        raise Refused(400, f"the body is no CSV ({error}).") from None
    wide = [str(number) for number, row in enumerate(rows, start=1) if len(row) > 1]
    if wide:
        raise Refused(
            400,
            f"CSV has one column, the text, and no header; rows {listing(wide)} have more. Quote commas.",
        )
    # The csv module gives an empty line as a row without cells.
    return [row[0] if row else "" for row in rows], False


def _some(rows: Iterable[T]) -> Iterator[T]:
    """One more than may be answered: a body of empty lines would otherwise fill the memory before it is refused."""
    return islice(rows, MOST_ROWS + 1)


def _loaded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"{what} is not valid JSON ({error}).") from None


def _content(item: Any, adapter: Adapter) -> Content:
    if isinstance(item, dict) and set(item) == {"messages"} and adapter.answers_with_texts:
        messages = item["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise RefusedRow("messages is no list of objects", "")
        checked = check_messages(adapter.kind, messages)
        return checked if adapter.kind == "chat" else checked[0]["content"]
    text = item["text"] if isinstance(item, dict) and set(item) == {"text"} else item
    if not isinstance(text, str):
        other = ' or "messages"' if adapter.answers_with_texts else ""
        raise RefusedRow(f'is neither a text nor an object with "text"{other} alone', "")
    if not text.strip():
        raise RefusedRow("the text is empty", "")
    require_characters(text, "text")
    return text.strip()


def write_answers(answers: Sequence[dict[str, Any]], form: str, single: bool) -> str:
    """The body of the response.

    Args:
        answers: as `Predictor.predict` gives them.
        form: one of FORMS. CSV has a line for each: label (of several labels a JSON list) and the probability of each
            label in the adapter's order, or the answer; then whether the text was shortened.
        single: whether JSON is the one answer itself, not {"predictions": [...]}.
    """
    if form == JSON:
        return _dumped(answers[0] if single else {"predictions": list(answers)})
    if form == JSON_LINES:
        return "".join(_dumped(answer) + "\n" for answer in answers)
    return csv_text(_cells(answer) for answer in answers)


def _cells(answer: dict[str, Any]) -> list[Any]:
    shortened = _dumped("shortened" in answer)
    if "answer" in answer:
        return [answer["answer"], shortened]
    found = answer["label"] if "label" in answer else _dumped(answer["labels"])
    return [found, *answer["probabilities"].values(), shortened]


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
