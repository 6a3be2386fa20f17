"""What gives way when a prompt and its answer are over the token budget: first the text, then the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from stages.common.prompting.tokenizer import PromptTokenizer

# Tokens that a template has to leave for a question and its answer, half for each: no character has more than eight.
SMALLEST_EXCHANGE = 16


class _Encoded(Protocol):
    @property
    def ids(self) -> list[int]: ...


EncodedT = TypeVar("EncodedT", bound=_Encoded)


def prompt_room(max_length_tokens: int, template_tokens: int, answer_tokens: int) -> int:
    """How many tokens a prompt may have that is followed by an answer of any length.

    What the answer leaves, but at least half of what the template leaves: a short question stays whole before an answer
    that could never fit, and that answer is cut.

    Args:
        max_length_tokens: the budget, prompt and answer together.
        template_tokens: of the prompt without any text, below the budget.
        answer_tokens: of the answer, its terminator included; may be over the budget.
    """
    return max(max_length_tokens - answer_tokens, template_tokens + (max_length_tokens - template_tokens) // 2)


def shorten_to_fit(
    tokenizer: PromptTokenizer,
    texts: list[str],
    rooms: list[int],
    encode: Callable[[list[int], list[str]], list[EncodedT]],
) -> tuple[list[str], list[EncodedT]]:
    """Take the ends off texts until what is made of them fits.

    Args:
        tokenizer: the base model's.
        texts: n texts.
        rooms: most tokens for each.
        encode: what is made of the texts of some rows (positions in `texts`), given both.

    Returns:
        The texts' beginnings, cut between two characters, and what was made of them. An empty text may still be over.
    """
    kept = list(texts)
    encoded = encode(list(range(len(texts))), kept)
    pending = [row for row in range(len(texts)) if len(encoded[row].ids) > rooms[row] and kept[row]]
    while pending:
        excesses = [len(encoded[row].ids) - rooms[row] for row in pending]
        shorter = tokenizer.without_last_tokens([kept[row] for row in pending], excesses)
        for row, text in zip(pending, shorter, strict=True):
            # At least one character goes, so that this ends.
            kept[row] = text[: len(kept[row]) - 1].rstrip()
        for row, again in zip(pending, encode(pending, [kept[row] for row in pending]), strict=True):
            encoded[row] = again
        pending = [row for row in pending if len(encoded[row].ids) > rooms[row] and kept[row]]
    return kept, encoded
