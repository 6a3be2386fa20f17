"""What the base model's configuration and tokenizer allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preflight.findings import Finding, error, warning
from stages.common.schema.base_model import BaseModelSource
from stages.common.schema.prompts import FormatPrompts
from stages.common.tables import read_json

BASE_PIN = Path("models/base.json")
BASE_CONFIG = Path("models/base/config.json")
TOKENIZER_FOLDER = Path("models/tokenizer")
# Tokenizers that know no limit say so with 10**30.
LARGEST_SANE_LENGTH = 10_000_000


class Base(NamedTuple):
    """What is known about the base model without loading it.

    Attributes:
        positions: longest text in tokens that it was made for; None when nothing says.
        positions_source: the file that says so, or an empty text.
        begin_token: spelling of the tokenizer's begin token; None when it has none.
        begin_id: its id.
        begins_turns: whether the chat template spells the begin token before turns (as ChatML's <|im_start|>).
    """

    positions: int | None
    positions_source: str
    begin_token: str | None
    begin_id: int | None
    begins_turns: bool


def read_base(source: BaseModelSource, root: Path = Path()) -> Base | None:
    """The base model's facts; None until the stage `base_model` has run for this very source.

    Args:
        source: the block base_model.
        root: the repository's root.
    """
    pin, folder = root / BASE_PIN, root / TOKENIZER_FOLDER
    if not pin.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    if read_json(pin)["source"] != source.model_dump():
        return None
    settings = read_json(folder / "tokenizer_config.json")
    begin_token = settings.get("bos_token")
    if isinstance(begin_token, dict):
        begin_token = begin_token["content"]
    tokens = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else str(settings.get("chat_template"))
    positions, positions_source = _positions(root / BASE_CONFIG, settings)
    begins_turns = begin_token is not None and begin_token in chat
    return Base(positions, positions_source, begin_token, tokens.get(begin_token), begins_turns)


def _positions(config: Path, settings: dict[str, Any]) -> tuple[int | None, str]:
    if config.is_file():
        values = read_json(config)
        values = values.get("text_config") or values
        if "max_position_embeddings" in values:
            rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
            stretched = (rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1)
            return int(max(values["max_position_embeddings"], stretched)), BASE_CONFIG.as_posix()
    length = settings.get("model_max_length")
    if isinstance(length, int | float) and length <= LARGEST_SANE_LENGTH:
        return int(length), f"{TOKENIZER_FOLDER.as_posix()}/tokenizer_config.json"
    return None, ""


def budget_exceeds_the_base(format_prompts: FormatPrompts, base: Base) -> Iterator[Finding]:
    """A budget above the positions that the base was made for."""
    if base.positions is not None and format_prompts.max_length_tokens > base.positions:
        yield warning(
            "format_prompts.max_length_tokens",
            f"{format_prompts.max_length_tokens:,} is more than the base model was made for",
            f"at most {base.positions:,} ({base.positions_source})",
            "Lower it, or take a base with a longer context",
        )


def template_spells_the_begin_token(format_prompts: FormatPrompts, base: Base) -> Iterator[Finding]:
    """A begin token in the template of a chat message: the chat template writes one already, before the message."""
    if format_prompts.style != "chat" or base.begin_token is None or format_prompts.template is None:
        return
    if base.begin_token in format_prompts.template:
        yield error(
            "format_prompts.template",
            f"it spells the begin token {base.begin_token}, which lands in the middle of the prompt: with style 'chat' "
            "the base's chat template writes its own",
            "no begin token in the template with style 'chat'",
            "Take it out, or use style: plain and write the whole prompt",
        )


CHECKS = (budget_exceeds_the_base, template_spells_the_begin_token)
