"""Conversations as ShareGPT or OpenAI's API write them, turned into messages that alternate, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

from stages.common.schema.ingest import Conversation
from stages.common.sources.cells import RefusedRow, as_list, as_text, require_characters, shown

# A turn's role and content, as chat templates take them.
Message = dict[str, str]
# In each format: the key of the role, the key of the content, and what its roles are called here.
FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    "sharegpt": (
        "from",
        "value",
        {
            **dict.fromkeys(["human", "user"], "user"),
            **dict.fromkeys(["gpt", "chatgpt", "assistant", "bing", "bard"], "assistant"),
            "system": "system",
        },
    ),
    # OpenAI renamed the system role to "developer": https://model-spec.openai.com
    "messages": (
        "role",
        "content",
        {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"},
    ),
}
# What a turn has that calls a tool: its content alone is not what the assistant did.
CALLS = ("tool_calls", "function_call")


def messages_maker(source: Conversation, kind: Literal["question_answering", "chat"]) -> Callable[[Any], list[Message]]:
    """How a cell becomes messages: system (or none), then user and assistant in turn, the last one the assistant's.

    Args:
        source: params.ingest.columns.text.
        kind: params.task.kind; "question_answering" takes one question and its answer alone.

    Returns:
        From a cell (a list of objects, or a JSON text of one) to messages whose contents are stripped and not empty;
        it raises RefusedRow for anything else.
    """

    def messages_of(value: Any) -> list[Message]:
        turns = as_list(value, "the conversation")
        if not turns:
            raise RefusedRow("the conversation is empty", "empty conversation")
        messages = [_message(turn, number, source.format) for number, turn in enumerate(turns, start=1)]
        _require_order([message["role"] for message in messages])
        if kind == "question_answering":
            _require_one_exchange(messages)
        return messages

    return messages_of


def text_before_answer(messages: list[Message]) -> str:
    """The contents of all turns but the last one, a line break between."""
    return "\n".join(message["content"] for message in messages[:-1])


def _message(turn: Any, number: int, form: str) -> Message:
    role_key, content_key, roles = FORMATS[form]
    if not isinstance(turn, dict):
        raise RefusedRow(f"turn {number} is a {type(turn).__name__}, not an object", "turn is no object")
    if role_key not in turn or content_key not in turn:
        others = [name for name, (role, content, _) in FORMATS.items() if role in turn and content in turn]
        advice = f"; it is written as ingest.columns.text.format {others[0]!r} says" if others else ""
        reason = f"turn {number} lacks {role_key!r} or {content_key!r}, it has {shown(list(turn))}{advice}"
        raise RefusedRow(reason, f"turn without {role_key} or {content_key}")
    role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        reason = f"turn {number} has the role {shown(turn[role_key])}; known are {', '.join(roles)}"
        raise RefusedRow(reason, "unknown role")
    if any(turn.get(call) for call in CALLS):
        raise RefusedRow(f"turn {number} calls a tool; only turns of text can be learned", "tool call")
    content = turn[content_key]
    if isinstance(content, list | dict):
        reason = f"turn {number} ({role}) has a {type(content).__name__} as {content_key}, not a text"
        raise RefusedRow(reason, "not a text")
    content = as_text(content).strip()
    if not content:
        raise RefusedRow(f"turn {number} ({role}) is empty", "empty turn")
    require_characters(content, f"turn {number}")
    return {"role": role, "content": content}


def _require_order(roles: list[str]) -> None:
    first = 1 if roles[0] == "system" else 0
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise RefusedRow(f"turn {number} is a system turn; only the first one can be", "system turn not first")
    if len(roles) == first:
        raise RefusedRow("the conversation is a system turn alone", "no exchange")
    if roles[first] == "assistant":
        raise RefusedRow(f"turn {first + 1} is the assistant's; the user has to begin", "assistant begins")
    for number, (role, following) in enumerate(itertools.pairwise(roles), start=1):
        if role == following:
            raise RefusedRow(f"turns {number} and {number + 1} are both the {role}'s", "two turns of one role in a row")
    if roles[-1] == "user":
        raise RefusedRow("the last turn is the user's and has no answer; take it off", "last turn has no answer")


def _require_one_exchange(messages: list[Message]) -> None:
    if messages[0]["role"] == "system":
        reason = "the task 'question_answering' takes no system turn; format_prompts.system is one for all questions"
        raise RefusedRow(reason, "system turn with a question")
    if len(messages) > 2:
        reason = f"has {len(messages) // 2:,} exchanges; 'question_answering' takes one, the task 'chat' any number"
        raise RefusedRow(reason, "more than one exchange")
