"""The base model's own chat template, and what it writes around one message."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Template, Undefined

from stages.common.errors import UserError
from stages.common.prompting.templates import sandbox
from stages.common.prompting.tokenizer import PromptTokenizer


@lru_cache(maxsize=8)
def chat_frame(tokenizer: PromptTokenizer, system: str | None) -> tuple[str, str]:
    """What the chat template puts before and after the user's message, control tokens respelled.

    The message itself is not shown to the chat template: it can then neither be taken for control tokens nor change
    the frame. Many chat templates strip messages, so the caller must strip it.

    Args:
        tokenizer: has the chat template.
        system: the system message, itself data; None leaves the system message to the chat template.

    Returns:
        The text before the message, and the text after it up to where the answer begins.

    Raises:
        UserError: there is no chat template, it fails, or it has no place for the system message.
    """
    user = tokenizer.stand_in("text")
    shown = tokenizer.respell(render_chat(tokenizer, _messages(tokenizer, system), add_generation_prompt=True))
    if shown.count(user) != 1:
        raise chat_error("shows the user's message not once")
    if system is not None:
        if tokenizer.stand_in("system") not in shown:
            raise chat_error("leaves the system message out; set format_prompts.system to null")
        shown = shown.replace(tokenizer.stand_in("system"), system.strip())
    before, _, after = shown.partition(user)
    return before, after


def chat_terminator_id(tokenizer: PromptTokenizer, system: str | None) -> int:
    """Id of the control token that the chat template puts right after an assistant's message.

    Raises:
        UserError: there is no chat template, it fails, or no control token follows an assistant's message.
    """
    answer = tokenizer.stand_in("answer")
    messages = [*_messages(tokenizer, system), {"role": "assistant", "content": answer}]
    shown = render_chat(tokenizer, messages, add_generation_prompt=False)
    after = shown.rpartition(answer)[2].lstrip()
    endings = [content for content in tokenizer.control_ids if after.startswith(content)]
    if not endings:
        raise chat_error("puts no control token after an answer, so that an answer would never end")
    return tokenizer.control_ids[max(endings, key=len)]


def _messages(tokenizer: PromptTokenizer, system: str | None) -> list[dict[str, str]]:
    user = {"role": "user", "content": tokenizer.stand_in("text")}
    return [user] if system is None else [{"role": "system", "content": tokenizer.stand_in("system")}, user]


def render_chat(tokenizer: PromptTokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """The messages as the base model's chat template shows them, control tokens in their public spelling.

    Args:
        tokenizer: has the chat template.
        messages: each with "role" and "content"; contents are to be stand-ins.
        add_generation_prompt: whether what an answer begins with comes last.

    Raises:
        UserError: there is no chat template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "params.yaml: format_prompts.style: 'chat' needs a base model with a chat template, and this one has none. "
            "Use style: plain, or an instruction-tuned base model."
        )
    values: dict[str, Any] = {"messages": messages, "tools": None, "documents": None, **tokenizer.special_tokens}
    try:
        return _compiled(tokenizer.chat_template).render(values, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a chat template refuses, for example, a system message with raise_exception
        system = "set format_prompts.system to null, or " if messages[0]["role"] == "system" else ""
        raise chat_error(f"fails with: {error}; {system}choose another base model") from None


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    # Published chat templates test keys that may be absent, so Undefined is as lenient here as in transformers.
    return sandbox(Undefined).from_string(source)


def chat_error(problem: str) -> UserError:
    """The error for a chat template that cannot be used."""
    return UserError(f"models/tokenizer: the base model's chat template {problem}, or use format_prompts.style: plain.")
