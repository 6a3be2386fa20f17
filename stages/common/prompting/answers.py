"""From an answer to the tokens that are learned: behind the prompt, its terminator last."""

from __future__ import annotations

from typing import NamedTuple

from stages.common.errors import UserError
from stages.common.prompting.chat_frames import AnswerFrame, answer_frame
from stages.common.prompting.chat_template import chat_terminator_id
from stages.common.prompting.tokenizer import PromptTokenizer

# Behind a plain prompt stand a space and the answer.
PLAIN_FRAME = AnswerFrame(anchor=":", lead=" ", trail="")


class EncodedAnswer(NamedTuple):
    """An answer as text (its terminator left out), as token ids (the terminator last), and whether its end is missing.

    An answer without its end has no terminator, so that nobody learns to stop there.
    """

    text: str
    ids: list[int]
    cut: bool


def terminator_ids(style: str, system: str | None, tokenizer: PromptTokenizer) -> list[int]:
    """Ids that end an answer: the terminator that is learned, then the tokenizer's end token where that is another.

    Args:
        style: "plain" or "chat".
        system: the system message, or None.
        tokenizer: the base model's.

    Raises:
        UserError: plain: the tokenizer names no end token; chat: see `chat_terminator_id`.
    """
    if style == "chat":
        terminator_id = chat_terminator_id(tokenizer, system)
        return list(dict.fromkeys([terminator_id, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))
    if tokenizer.eos_id is None:
        raise UserError(
            "models/tokenizer/tokenizer_config.json: names no eos_token among the tokenizer's control tokens, so that "
            "an answer would never end. Name one there, or choose another base model."
        )
    return [tokenizer.eos_id]


def encode_answers(
    style: str, tokenizer: PromptTokenizer, answers: list[str], terminator_id: int, max_tokens: int
) -> list[EncodedAnswer]:
    """Answers as they stand behind a prompt, whatever is in them encoded as plain text.

    Args:
        style: "plain" or "chat".
        tokenizer: the base model's.
        answers: any texts; white space around them is taken off.
        terminator_id: what ends an answer.
        max_tokens: of an answer that cannot be shorter than this, only as much is looked at.

    Returns:
        An answer for each, in order. One of more than `max_tokens` tokens may have lost its end already.
    """
    frame = answer_frame(tokenizer) if style == "chat" else PLAIN_FRAME
    stripped = [answer.strip() for answer in answers]
    most_characters = max_tokens * tokenizer.longest_token_characters
    texts = [frame.lead + text[:most_characters] + frame.trail for text in stripped]
    encoded = []
    for answer, text, ids in zip(stripped, texts, tokenizer.encode_behind(frame.anchor, texts), strict=True):
        cut = len(answer) > most_characters
        encoded.append(EncodedAnswer(text, ids if cut else [*ids, terminator_id], cut))
    return encoded


def cut_answer(style: str, tokenizer: PromptTokenizer, answer: EncodedAnswer, room_tokens: int) -> EncodedAnswer:
    """The answer, or as much of its beginning as has at most `room_tokens` tokens, then without its terminator."""
    if len(answer.ids) <= room_tokens:
        return answer
    if len(answer.ids) == room_tokens + 1 and not answer.cut:
        return EncodedAnswer(answer.text, answer.ids[:-1], cut=True)
    frame = answer_frame(tokenizer) if style == "chat" else PLAIN_FRAME
    return EncodedAnswer(*tokenizer.first_tokens(frame.anchor, answer.text, room_tokens), cut=True)
