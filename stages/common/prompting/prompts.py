"""From a text to the tokens that the model reads: one format for training, inference and serving.

Nothing but `tokenizers` and `jinja2` is needed, so that an adapter's folder can be used without the training stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from stages.common.errors import UserError, listing
from stages.common.prompting.templates import chat_frame, chat_terminator_id, prompt_template, render, template_error
from stages.common.prompting.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class PromptFormat:
    """Everything that turns a text into a prompt, and a label into its completion.

    Attributes:
        style: "plain" or "chat".
        system: chat: the system message, or None.
        template: Jinja over text, labels, descriptions and exemplars.
        labels: task.labels, in order.
        label_descriptions: a text for each label, or None.
        exemplars: {"text", "label"} of each row set aside for the prompt.
        max_length_tokens: longest prompt and completion together.
        completions: for each label {"text", "ids"}; ids include the terminator.
    """

    style: str
    system: str | None
    template: str
    labels: list[str]
    label_descriptions: dict[str, str] | None
    exemplars: list[dict[str, str]]
    max_length_tokens: int
    completions: dict[str, dict[str, Any]]

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
    style: str,
    system: str | None,
    template: str,
    labels: list[str],
    label_descriptions: dict[str, str] | None,
    exemplars: list[dict[str, str]],
    max_length_tokens: int,
    tokenizer: PromptTokenizer,
) -> PromptFormat:
    """Make a format and check that prompts can be made with it; see `PromptFormat` for the arguments.

    Raises:
        UserError: the template is wrong or leaves no room for a text, the base model has no chat template or no end
            token, or two labels have the same tokens.
    """
    completions = _completions(style, labels, tokenizer, _terminator_id(style, system, tokenizer))
    prompt_format = PromptFormat(
        style, system, template, labels, label_descriptions, exemplars, max_length_tokens, completions
    )
    [empty] = encode_prompts(prompt_format, tokenizer, [""])
    if tokenizer.nonce in empty.text.casefold():
        raise template_error("a filter changes the spelling of a control token; take the token out of the filter")
    if len(empty.ids) >= _room_tokens(prompt_format):
        raise _no_room(prompt_format, len(empty.ids))
    return prompt_format


def encode_prompts(prompt_format: PromptFormat, tokenizer: PromptTokenizer, texts: list[str]) -> list[EncodedPrompt]:
    """Turn texts into prompts within the token budget.

    Whatever stands in a text, a label, a description or an exemplar is encoded as plain text, control tokens too.

    Args:
        prompt_format: how.
        tokenizer: the base model's.
        texts: any strings; of one that is too long the beginning is kept, cut between two characters.

    Returns:
        A prompt for each text, in order; with the longest completion it has at most `max_length_tokens` tokens.

    Raises:
        UserError: the template cannot be used, or is over the budget without any text.
    """
    renderer = _renderer(prompt_format, tokenizer)
    room_tokens = _room_tokens(prompt_format)
    # Longer than any text that could fit: a text of 10 MB is not tokenised to keep a hundred tokens of it.
    most_characters = max(room_tokens, 1) * tokenizer.longest_token_characters
    kept = [text[:most_characters] for text in texts]
    prompts = [""] * len(texts)
    ids: list[list[int]] = [[]] * len(texts)
    pending = list(range(len(texts)))
    while pending:
        for row in pending:
            prompts[row] = renderer(kept[row])
        for row, row_ids in zip(pending, tokenizer.encode([prompts[row] for row in pending]), strict=True):
            ids[row] = _with_bos(row_ids, prompt_format.style, tokenizer)
        pending = [row for row in pending if len(ids[row]) > room_tokens]
        for row in pending:
            if not kept[row]:
                raise _no_room(prompt_format, len(ids[row]))
        excesses = [len(ids[row]) - room_tokens for row in pending]
        shorter = tokenizer.without_last_tokens([kept[row] for row in pending], excesses)
        for row, text in zip(pending, shorter, strict=True):
            # At least one character goes, so that this ends.
            kept[row] = text[: len(kept[row]) - 1].rstrip()
    return [
        EncodedPrompt(tokenizer.publish(prompts[row]), ids[row], shortened=kept[row] != text)
        for row, text in enumerate(texts)
    ]


def _renderer(prompt_format: PromptFormat, tokenizer: PromptTokenizer) -> Callable[[str], str]:
    """A function from a text to its prompt, control tokens in their private spelling."""
    descriptions, exemplars = prompt_format.label_descriptions, prompt_format.exemplars
    template = prompt_template(prompt_format.template, tokenizer, descriptions is not None, bool(exemplars))
    constant = {"labels": prompt_format.labels, "descriptions": descriptions, "exemplars": exemplars}
    if prompt_format.style == "plain":
        return lambda text: render(template, {**constant, "text": text})
    before, after = chat_frame(tokenizer, prompt_format.system)
    return lambda text: before + render(template, {**constant, "text": text}).strip() + after


def _with_bos(ids: list[int], style: str, tokenizer: PromptTokenizer) -> list[int]:
    # A chat template writes its own begin token, and a plain template may.
    bos_id = tokenizer.leading_bos_id
    return ids if style == "chat" or bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]


def _room_tokens(prompt_format: PromptFormat) -> int:
    """How many tokens a prompt may have so that every completion still fits behind it."""
    return prompt_format.max_length_tokens - max(len(entry["ids"]) for entry in prompt_format.completions.values())


def _no_room(prompt_format: PromptFormat, template_tokens: int) -> UserError:
    completion_tokens = prompt_format.max_length_tokens - _room_tokens(prompt_format)
    return UserError(
        f"params.yaml: format_prompts.max_length_tokens: {prompt_format.max_length_tokens} leaves no room for a text: "
        f"without one the prompt (template, system message, descriptions, {len(prompt_format.exemplars)} exemplars) "
        f"takes {template_tokens} tokens and the longest label {completion_tokens}. "
        f"Allow more than {template_tokens + completion_tokens}, or shorten the template or the exemplars."
    )


def _terminator_id(style: str, system: str | None, tokenizer: PromptTokenizer) -> int:
    if style == "chat":
        return chat_terminator_id(tokenizer, system)
    if tokenizer.eos_id is None:
        raise UserError(
            "models/tokenizer/tokenizer_config.json: names no eos_token among the tokenizer's control tokens, so that "
            "an answer would never end. Name one there, or choose another base model."
        )
    return tokenizer.eos_id


def _completions(
    style: str, labels: list[str], tokenizer: PromptTokenizer, terminator_id: int
) -> dict[str, dict[str, Any]]:
    """Text and ids of every label's completion, the terminator last."""
    # SentencePiece tokenizers put a space before a text's first word. A character before it, taken off again, gives
    # the tokens that the label has behind a prompt.
    anchor, space = (":", " ") if style == "plain" else ("\n", "")
    texts = [space + label for label in labels]
    [anchor_ids] = tokenizer.encode([anchor])
    completions: dict[str, dict[str, Any]] = {}
    for label, text, alone, anchored in zip(
        labels, texts, tokenizer.encode(texts), tokenizer.encode([anchor + text for text in texts]), strict=True
    ):
        follows = anchored[: len(anchor_ids)] == anchor_ids
        ids = anchored[len(anchor_ids) :] if follows else alone
        same = [other for other, entry in completions.items() if entry["ids"] == [*ids, terminator_id]]
        if same:
            raise UserError(
                f"params.yaml: task.labels: the base model's tokenizer makes the same tokens of {listing(same)} and "
                f"{label}, so that no answer could tell them apart. Rename one of them."
            )
        completions[label] = {"text": text, "ids": [*ids, terminator_id]}
    return completions
