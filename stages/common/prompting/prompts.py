"""From a text to the tokens that the model reads: one format for training, inference and serving.

Nothing but `tokenizers` and `jinja2` is needed, so that an adapter's folder can be used without the training stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from stages.common.branches import answer_key
from stages.common.errors import UserError, listing
from stages.common.prompting.answers import terminator_ids
from stages.common.prompting.budget import SMALLEST_EXCHANGE, prompt_room, shorten_to_fit
from stages.common.prompting.chat_frames import conversation_frame
from stages.common.prompting.chat_template import chat_frame
from stages.common.prompting.kinds import GENERATION_KINDS
from stages.common.prompting.templates import TemplateUserError, prompt_template, render
from stages.common.prompting.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class PromptFormat:
    """Everything that turns a text into a prompt, and a label into its completion.

    Attributes:
        kind: "classification", "multi_label", "question_answering" or "chat".
        style: "plain" or "chat".
        system: chat: the system message, or None. With the kind "chat" for conversations that have none.
        template: Jinja over text, labels, descriptions and exemplars; None with the kind "chat".
        labels: task.labels, in order; empty where answers are texts.
        label_descriptions: a text for each label, or None.
        exemplars: {"text", "label"} of each row set aside for the prompt.
        max_length_tokens: longest prompt and completion together.
        completions: {"text", "ids"} by label, or with multi_label by `answer_key`; ids include the terminator. Empty
            where answers are texts.
        terminator_ids: tokens that end an answer; the first is the one that is learned.
    """

    kind: str
    style: str
    system: str | None
    template: str | None
    labels: list[str]
    label_descriptions: dict[str, str] | None
    exemplars: list[dict[str, str]]
    max_length_tokens: int
    completions: dict[str, dict[str, Any]]
    terminator_ids: list[int]

    def to_json(self) -> dict[str, Any]:
        """The format as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PromptFormat:
        """The format that `to_json` gave."""
        return cls(**values)


class EncodedPrompt(NamedTuple):
    """A prompt as text (control tokens in their public spelling), as token ids, and whether its text was shortened."""

    text: str
    ids: list[int]
    shortened: bool


def build_format(
    *,
    kind: str,
    style: str,
    system: str | None,
    template: str | None,
    labels: list[str],
    label_descriptions: dict[str, str] | None,
    exemplars: list[dict[str, str]],
    max_length_tokens: int,
    tokenizer: PromptTokenizer,
) -> PromptFormat:
    """Make a format and check that prompts can be made with it; see `PromptFormat` for the arguments.

    Raises:
        UserError: the template is wrong or leaves no room for a text, the base model has no end token or no chat
            template, or one that cannot be used, or two labels have the same tokens.
    """
    ends = terminator_ids(style, system, tokenizer)
    answers = labels
    if kind == "multi_label":
        answers = [answer_key(label, yes) for label in labels for yes in (True, False)]
    completions = _completions(style, answers, tokenizer, ends[0])
    prompt_format = PromptFormat(
        kind, style, system, template, labels, label_descriptions, exemplars, max_length_tokens, completions, ends
    )
    [empty] = _encode(prompt_format, tokenizer, [""])
    if tokenizer.nonce in tokenizer.publish(empty.text).casefold():
        raise TemplateUserError("a filter changes the spelling of a control token; take the token out of the filter")
    if len(empty.ids) > max_length_tokens - _rest_tokens(prompt_format):
        raise no_room(prompt_format, len(empty.ids))
    if kind in GENERATION_KINDS and style == "chat":
        # Unlike a prompt alone, this shows a template whose answers do not stand where it asks for them.
        conversation_frame(tokenizer, ("user", "assistant", "user"))
    return prompt_format


def encode_prompts(
    prompt_format: PromptFormat, tokenizer: PromptTokenizer, texts: list[str], answer_tokens: list[int] | None = None
) -> list[EncodedPrompt]:
    """Turn texts into prompts within the token budget; see `conversations` for the kind "chat".

    Whatever stands in a text, a label, a description or an exemplar is encoded as plain text, control tokens too.

    Args:
        prompt_format: how.
        tokenizer: the base model's.
        texts: any strings; of one that is too long the beginning is kept, cut between two characters.
        answer_tokens: with the kind "question_answering", how many tokens each answer takes, its terminator included,
            or may take; see `prompt_room`. Otherwise None.

    Returns:
        A prompt for each text, in order; with the longest label's completion it has at most `max_length_tokens`
        tokens. Where answers are texts, the answer may have to be cut.

    Raises:
        UserError: the template cannot be used, or is over the budget without any text.
    """
    assert (prompt_format.kind == "question_answering") == (answer_tokens is not None) and prompt_format.template
    budget = prompt_format.max_length_tokens
    if answer_tokens is None:
        rooms = [budget - _longest_completion(prompt_format)] * len(texts)
    else:
        template_tokens = len(_encode(prompt_format, tokenizer, [""])[0].ids)
        rooms = [prompt_room(budget, template_tokens, tokens) for tokens in answer_tokens]
    # Longer than any text that could fit: a text of 10 MB is not tokenised to keep a hundred tokens of it.
    bounded = [
        text[: max(room, 1) * tokenizer.longest_token_characters] for text, room in zip(texts, rooms, strict=True)
    ]
    kept, prompts = shorten_to_fit(
        tokenizer, bounded, rooms, lambda rows, shorter: _encode(prompt_format, tokenizer, shorter)
    )
    for prompt, room in zip(prompts, rooms, strict=True):
        if len(prompt.ids) > room:
            raise no_room(prompt_format, len(prompt.ids))
    return [
        EncodedPrompt(tokenizer.publish(prompt.text), prompt.ids, shortened=short != text)
        for text, short, prompt in zip(texts, kept, prompts, strict=True)
    ]


def no_room(prompt_format: PromptFormat, template_tokens: int) -> UserError:
    """The error for a budget that the prompt uses up without any text of the data.

    Args:
        prompt_format: has the budget.
        template_tokens: what the prompt takes without a text.
    """
    rest = f"question and answer need {SMALLEST_EXCHANGE}"
    if prompt_format.kind not in GENERATION_KINDS:
        rest = f"the longest label {_longest_completion(prompt_format)}"
    return UserError(
        f"params.yaml: format_prompts.max_length_tokens: {prompt_format.max_length_tokens} leaves no room for a text: "
        f"without one the prompt (template, system message, descriptions, {len(prompt_format.exemplars)} exemplars) "
        f"takes {template_tokens} tokens and {rest}. Allow at least {template_tokens + _rest_tokens(prompt_format)}, "
        "or shorten the template, the system message or the exemplars."
    )


def _encode(prompt_format: PromptFormat, tokenizer: PromptTokenizer, texts: list[str]) -> list[EncodedPrompt]:
    """The prompts, however long, control tokens in their private spelling."""
    renderer = _renderer(prompt_format, tokenizer)
    prompts = [renderer(text) for text in texts]
    return [
        EncodedPrompt(prompt, _with_bos(ids, prompt_format.style, tokenizer), shortened=False)
        for prompt, ids in zip(prompts, tokenizer.encode(prompts), strict=True)
    ]


def _renderer(prompt_format: PromptFormat, tokenizer: PromptTokenizer) -> Callable[[str], str]:
    """A function from a text to its prompt, control tokens in their private spelling."""
    if prompt_format.template is None:  # a conversation's turn
        return _in_chat(str, prompt_format, tokenizer)
    descriptions, exemplars = prompt_format.label_descriptions, prompt_format.exemplars
    labels = prompt_format.kind not in GENERATION_KINDS
    template = prompt_template(
        prompt_format.template, tokenizer.respell, labels, descriptions is not None, bool(exemplars)
    )
    constant = {"labels": prompt_format.labels, "descriptions": descriptions, "exemplars": exemplars}

    def fill(text: str) -> str:
        return render(template, {**constant, "text": text})

    return fill if prompt_format.style == "plain" else _in_chat(fill, prompt_format, tokenizer)


def _in_chat(
    fill: Callable[[str], str], prompt_format: PromptFormat, tokenizer: PromptTokenizer
) -> Callable[[str], str]:
    before, after = chat_frame(tokenizer, prompt_format.system)
    return lambda text: before + fill(text).strip() + after


def _with_bos(ids: list[int], style: str, tokenizer: PromptTokenizer) -> list[int]:
    # A chat template writes its own begin token, and a plain template may.
    bos_id = tokenizer.leading_bos_id
    return ids if style == "chat" or bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]


def _rest_tokens(prompt_format: PromptFormat) -> int:
    """What has to be left behind a prompt without any text: a token of the text, and the longest completion."""
    if prompt_format.kind in GENERATION_KINDS:
        return SMALLEST_EXCHANGE
    return 1 + _longest_completion(prompt_format)


def _longest_completion(prompt_format: PromptFormat) -> int:
    return max(len(entry["ids"]) for entry in prompt_format.completions.values())


def _completions(
    style: str, labels: list[str], tokenizer: PromptTokenizer, terminator_id: int
) -> dict[str, dict[str, Any]]:
    """Text and ids of every label's completion, the terminator last."""
    anchor, space = (":", " ") if style == "plain" else ("\n", "")
    texts = [space + label for label in labels]
    completions: dict[str, dict[str, Any]] = {}
    for label, text, ids in zip(labels, texts, tokenizer.encode_behind(anchor, texts), strict=True):
        same = [other for other, entry in completions.items() if entry["ids"] == [*ids, terminator_id]]
        if same:
            raise UserError(
                f"params.yaml: task.labels: the base model's tokenizer makes the same tokens of {listing(same)} and "
                f"{label}, so that no answer could tell them apart. Rename one of them."
            )
        completions[label] = {"text": text, "ids": [*ids, terminator_id]}
    return completions
