"""From the rows of a table to their prompts and completions, for each kind of row."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from stages.common.prompting.answers import EncodedAnswer, cut_answer, encode_answers
from stages.common.prompting.conversations import EncodedConversation, encode_conversations
from stages.common.prompting.prompts import EncodedPrompt, PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import PromptTokenizer


class FormattedRow(NamedTuple):
    """A row's prompt and completion.

    Attributes:
        prompt, completion: as texts, control tokens in their public spelling, no terminator; the completion is None
            with multi_label, whose completions are the format's.
        prompt_ids, completion_ids: as token ids, the terminator last.
        prompt_answer_mask: chat: which of the prompt's tokens are learned too; otherwise None.
        shortened: whether anything was left out.
        answer_cut: whether the end of the answer was.
        turns_dropped: whether the beginning of the conversation was.
    """

    prompt: str
    completion: str | None
    prompt_ids: list[int]
    prompt_answer_mask: list[bool] | None
    completion_ids: list[int] | None
    shortened: bool
    answer_cut: bool
    turns_dropped: bool


def format_rows(
    prompt_format: PromptFormat, tokenizer: PromptTokenizer, rows: list[dict[str, Any]]
) -> list[FormattedRow]:
    """The prompts and completions of rows, in order.

    Args:
        prompt_format: how.
        tokenizer: the base model's.
        rows: "text" and "label" as in data/records.parquet; with the kind "chat" "messages".

    Raises:
        UserError: the template or the base model's chat template cannot be used.
    """
    match prompt_format.kind:
        case "chat":
            return _chat(prompt_format, tokenizer, rows)
        case "question_answering":
            return _question_answering(prompt_format, tokenizer, rows)
        case _:
            return _labelled(prompt_format, tokenizer, rows)


def _labelled(
    prompt_format: PromptFormat, tokenizer: PromptTokenizer, rows: list[dict[str, Any]]
) -> list[FormattedRow]:
    prompts = encode_prompts(prompt_format, tokenizer, [row["text"] for row in rows])
    formatted = []
    for row, prompt in zip(rows, prompts, strict=True):
        entry = {"text": None, "ids": None}
        if prompt_format.kind == "classification":
            entry = prompt_format.completions[row["label"]]
        formatted.append(
            FormattedRow(prompt.text, entry["text"], prompt.ids, None, entry["ids"], prompt.shortened, False, False)
        )
    return formatted


def _question_answering(
    prompt_format: PromptFormat, tokenizer: PromptTokenizer, rows: list[dict[str, Any]]
) -> list[FormattedRow]:
    answers = _answers(prompt_format, tokenizer, [row["label"] for row in rows])
    answer_tokens = [len(answer.ids) for answer in answers]
    prompts = encode_prompts(prompt_format, tokenizer, [row["text"] for row in rows], answer_tokens)
    return [
        _with_answer(prompt_format, tokenizer, prompt, None, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _chat(prompt_format: PromptFormat, tokenizer: PromptTokenizer, rows: list[dict[str, Any]]) -> list[FormattedRow]:
    conversations = [json.loads(row["messages"]) for row in rows]
    answers = _answers(prompt_format, tokenizer, [messages[-1]["content"] for messages in conversations])
    answer_tokens = [len(answer.ids) for answer in answers]
    prompts = encode_conversations(
        prompt_format, tokenizer, [messages[:-1] for messages in conversations], answer_tokens
    )
    return [
        _with_answer(prompt_format, tokenizer, prompt, prompt.answer_mask, answer)._replace(
            turns_dropped=prompt.exchanges_dropped > 0
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _answers(prompt_format: PromptFormat, tokenizer: PromptTokenizer, answers: list[str]) -> list[EncodedAnswer]:
    terminator_id, longest = prompt_format.terminator_ids[0], prompt_format.max_length_tokens
    return encode_answers(prompt_format.style, tokenizer, answers, terminator_id, longest)


def _with_answer(
    prompt_format: PromptFormat,
    tokenizer: PromptTokenizer,
    prompt: EncodedPrompt | EncodedConversation,
    answer_mask: list[bool] | None,
    answer: EncodedAnswer,
) -> FormattedRow:
    room = prompt_format.max_length_tokens - len(prompt.ids)
    text, ids, cut = cut_answer(prompt_format.style, tokenizer, answer, room)
    return FormattedRow(prompt.text, text, prompt.ids, answer_mask, ids, prompt.shortened or cut, cut, False)
