"""Any conversation becomes messages that alternate, with every character of its turns, or is refused with a reason."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common.schema.ingest import Columns, Conversation
from stages.common.schema.task import GenerationTask
from stages.common.sources.cells import RefusedRow
from stages.common.sources.columns import Record, make_mapping
from stages.common.sources.conversations import messages_maker, text_before_answer
from stages.common.sources.readers import format_of, read_rows

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
# What each format calls the roles, written down apart from the code: ShareGPT's dumps and OpenAI's API reference.
ROLES = {
    "sharegpt": {
        "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
        "bing": "assistant", "bard": "assistant", "system": "system",
    },
    "messages": {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"},
}  # fmt: skip
KEYS = {"sharegpt": ("from", "value"), "messages": ("role", "content")}
KINDS = {
    "NUL byte", "assistant begins", "broken Unicode", "empty conversation", "empty turn", "last turn has no answer",
    "more than one exchange", "no exchange", "not a text", "system turn not first", "system turn with a question",
    "the conversation is no list", "tool call", "turn is no object", "turn without from or value",
    "turn without role or content", "two turns of one role in a row", "unknown role",
}  # fmt: skip
Form = Literal["sharegpt", "messages"]
Turns = list[tuple[str, str]]


def turn(form: Form, role: str, content: str) -> dict[str, str]:
    role_key, content_key = KEYS[form]
    return {role_key: role, content_key: content}


def read(value: Any, form: Form, kind: Literal["question_answering", "chat"] = "chat") -> list[dict[str, str]]:
    return messages_maker(Conversation(column="turns", format=form), kind)(value)


def record(value: Any, kind: Literal["question_answering", "chat"] = "chat", form: Form = "messages") -> Record:
    columns = {"id": None, "text": {"column": "c", "format": form}, "label": None}
    rest = {"group": None, "split": None, "slice": None}
    mapping = make_mapping(Columns.model_validate(columns | rest), GenerationTask(kind=kind), "ingest.columns")
    assert mapping.columns == ["c"]
    return mapping.make([value], "rows.jsonl:1", None)


def openai(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant, which follow each other."""
    roles = [("user", "assistant")[number % 2] for number in range(len(contents))]
    first = [] if system is None else [turn("messages", "system", system)]
    return first + [turn("messages", role, content) for role, content in zip(roles, contents, strict=True)]


# --- random conversations ---------------------------------------------------------------------------------------------

CONTENTS = st.text(max_size=12) | st.sampled_from(["", " ", "\n\t", "\u2028", "\0", "<|im_end|>", "  a b\n", "{{ x }}"])


@st.composite
def conversations(draw: st.DrawFn, form: Form) -> Turns:
    """Half of them in a right order, with texts that are seldom empty; half of them in any order."""
    names = [*ROLES[form], "tool", "function", "User", ""]
    if draw(st.booleans()):
        return draw(st.lists(st.tuples(st.sampled_from(names), CONTENTS), max_size=6))
    called = {role: [name for name in names if ROLES[form].get(name) == role] for role in ROLES["sharegpt"].values()}
    order = ["system"] * draw(st.integers(0, 1)) + ["user", "assistant"] * draw(st.integers(1, 3))
    contents = st.text(min_size=1, max_size=12) | CONTENTS
    return [(draw(st.sampled_from(called[role])), draw(contents)) for role in order]


def expected(turns: Turns, form: Form) -> list[dict[str, str]] | None:
    """The messages, by another way than the code's: a regular expression over the roles' first letters."""
    letters = "".join(ROLES[form].get(name, "x")[0] for name, _ in turns)
    usable = all(content.strip() and "\0" not in content for _, content in turns)
    if not usable or not re.fullmatch("s?(ua)+", letters):
        return None
    return [{"role": ROLES[form][name], "content": content.strip()} for name, content in turns]


@pytest.mark.parametrize("form", ["sharegpt", "messages"])
@settings(deadline=None)
@given(data=st.data())
def test_a_conversation_keeps_every_character_of_its_turns_or_is_refused(form: Form, data: st.DataObject) -> None:
    turns = data.draw(conversations(form))
    value: Any = [turn(form, *item) for item in turns]
    wanted = expected(turns, form)
    for cell in (value, json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        if wanted is None:
            with pytest.raises(RefusedRow) as caught:
                read(cell, form)
            assert caught.value.kind in KINDS
        else:
            assert read(cell, form) == wanted


@settings(deadline=None)
@given(data=st.data())
def test_a_question_is_one_exchange_or_refused(data: st.DataObject) -> None:
    turns = data.draw(conversations("messages"))
    value = [turn("messages", *item) for item in turns]
    wanted = expected(turns, "messages")
    if wanted is None or len(wanted) != 2:
        with pytest.raises(RefusedRow):
            record(value, "question_answering")
    else:
        found = record(value, "question_answering")
        assert (found.text, found.label, found.messages) == (wanted[0]["content"], wanted[1]["content"], None)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["from", "value"]), inner, max_size=2),
    max_leaves=8,
)


@settings(deadline=None)
@given(ANYTHING)
def test_no_cell_whatever_it_holds_ends_in_anything_but_messages_or_a_refusal(value: Any) -> None:
    try:
        messages = read(value, "sharegpt")
    except RefusedRow as refused:
        assert refused.kind in KINDS
    else:
        assert expected([(message["role"], message["content"]) for message in messages], "sharegpt") == messages


# --- what is refused, and why -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason", "kind"),
    [
        (None, "the conversation is empty", "empty conversation"),
        ("  ", "the conversation is empty", "empty conversation"),
        ([], "the conversation is empty", "empty conversation"),
        ("[]", "the conversation is empty", "empty conversation"),
        (float("nan"), "the conversation is empty", "empty conversation"),
        ("Hello!", "the conversation 'Hello!' is no list in JSON", "the conversation is no list"),
        # What pandas writes into a CSV: Python's own notation.
        ("[{'role': 'user', 'content': 'a'}]", "is no list in JSON, as json.dumps", "the conversation is no list"),
        ('{"role": "user"}', "the conversation is a dict, not a list", "the conversation is no list"),
        (7, "the conversation is a int, not a list", "the conversation is no list"),
        (["Hello!"], "turn 1 is a str, not an object", "turn is no object"),
        ([{"role": "user"}], r"turn 1 lacks 'role' or 'content', it has .*role", "turn without role or content"),
        (
            [{"from": "human", "value": "a"}],
            "it is written as ingest.columns.text.format 'sharegpt' says",
            "turn without role or content",
        ),
        ([turn("messages", "tool", "7")], "turn 1 has the role 'tool'; known are user, assistant", "unknown role"),
        ([turn("messages", "User", "a")], "turn 1 has the role 'User'", "unknown role"),
        ([{"role": ["user"], "content": "a"}], "turn 1 has the role", "unknown role"),
        (openai("a", " \n"), r"turn 2 \(assistant\) is empty", "empty turn"),
        ([{"role": "user", "content": None}], r"turn 1 \(user\) is empty", "empty turn"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"turn 1 \(user\) has a list as content", "not a text"),
        (openai("a", "b\0"), "a NUL byte is in its turn 2", "NUL byte"),
        (openai("a", "b\ud800"), "half of a surrogate pair is in its turn 2", "broken Unicode"),
        ([turn("messages", "assistant", "a")], "turn 1 is the assistant's; the user has to begin", "assistant begins"),
        (openai("a", "b", "c"), "the last turn is the user's and has no answer", "last turn has no answer"),
        (openai(system="a"), "a system turn alone", "no exchange"),
        (openai("a", "b") + openai("c", "d", system="e"), "turn 3 is a system turn", "system turn not first"),
        (
            openai("a") + openai("b", "c"),
            "turns 1 and 2 are both the user's",
            "two turns of one role in a row",
        ),
        (
            [*openai("a"), {"role": "assistant", "content": "b", "tool_calls": [{"id": "1"}]}],
            "turn 2 calls a tool",
            "tool call",
        ),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_reason(value: Any, reason: str, kind: str) -> None:
    with pytest.raises(RefusedRow, match=reason) as caught:
        read(value, "messages")
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (openai("a", "b", system="c"), "takes no system turn; format_prompts.system is one for all"),
        (openai("a", "b", "c", "d"), "has 2 exchanges; 'question_answering' takes one, the task 'chat' any number"),
    ],
)
def test_a_question_takes_neither_a_system_turn_nor_a_second_exchange(value: Any, reason: str) -> None:
    with pytest.raises(RefusedRow, match=reason):
        read(value, "messages", "question_answering")
    assert read(value, "messages", "chat")


def test_keys_beside_role_and_content_do_not_matter_and_null_tool_calls_are_none() -> None:
    turns: list[dict[str, Any]] = [
        {**item, "name": "x", "weight": 1, "tool_calls": None, "function_call": {}} for item in openai("a", "b")
    ]
    assert read(turns, "messages") == openai("a", "b")


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_chat_record_has_the_last_answer_as_label_and_everything_before_it_as_text() -> None:
    turns = openai(" first ", "second", "third\n", '"vierte" ❤', system="be kind")
    found = record(turns)
    assert (found.text, found.label) == ("be kind\nfirst\nsecond\nthird", '"vierte" ❤')
    assert json.loads(found.messages or "") == openai("first", "second", "third", '"vierte" ❤', system="be kind")
    # Readable in the file: letters of other scripts are no escapes.
    assert "❤" in (found.messages or "")
    assert text_before_answer(openai("first", "second")) == "first"


@pytest.mark.parametrize("kind", ["question_answering", "chat"])
@pytest.mark.parametrize(
    ("instruction", "cell", "text"),
    [
        ("Add them.", "1, 2", "Add them.\n\n1, 2"),
        (" Say hello. ", "", "Say hello."),
        ("Say hello.", None, "Say hello."),
        ("", "1, 2", "1, 2"),
    ],
)
def test_instruction_and_input_make_one_question_and_an_empty_input_leaves_no_trace(
    kind: Literal["question_answering", "chat"], instruction: str, cell: str | None, text: str
) -> None:
    values = {"id": None, "text": "{instruction}\n\n{input}", "label": "output"}
    columns = Columns.model_validate(values | {"group": None, "split": None, "slice": None})
    mapping = make_mapping(columns, GenerationTask(kind=kind), "ingest.columns")
    found = mapping.make([instruction, cell, " yes\n"], "a.jsonl:1", None)
    assert (found.text, found.label) == (text, "yes")
    assert found.messages == (json.dumps(openai(text, "yes")) if kind == "chat" else None)


@pytest.mark.parametrize(
    ("values", "reason", "kind"),
    [
        (["a", ""], "the answer is empty", "empty answer"),
        (["a", None], "the answer is empty", "empty answer"),
        ([" ", "a"], "the text is empty", "empty text"),
        (["a", "b\0"], "a NUL byte is in its answer", "NUL byte"),
        (["a", "b\udc00"], "half of a surrogate pair is in its answer", "broken Unicode"),
        (["a", ["b"]], "is a list, not a text", "not a text"),
    ],
)
def test_a_prompt_without_a_completion_is_refused(values: list[Any], reason: str, kind: str) -> None:
    columns = {"id": None, "text": "prompt", "label": "completion", "group": None, "split": None, "slice": None}
    mapping = make_mapping(Columns.model_validate(columns), GenerationTask(kind="chat"), "ingest.columns")
    with pytest.raises(RefusedRow, match=reason) as caught:
        mapping.make(values, "a.csv:2", None)
    assert caught.value.kind == kind


# --- published conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "oasst1_best", "oasst1_all_paths"])
def test_published_conversations_are_read_without_a_loss(name: str) -> None:
    path = REAL / "chat" / f"sharegpt_{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in a folder shared/data beside this repository")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        turns = [[(item["from"], item["value"]) for item in json.loads(line)["conversations"]] for line in file]
    rows = read_rows(path, path.name, format_of(path.name), ["conversations"])
    assert [read(values[0], "sharegpt") for _, values in rows] == [expected(item, "sharegpt") for item in turns]
