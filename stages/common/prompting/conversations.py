"""From a conversation to the tokens that the model reads, and which of them are answers that it learns.

A conversation goes through the base model's chat template once for each sequence of roles (`chat_frames`), its contents
through the tokenizer alone: what stands in a message can be neither a control token nor a turn of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from stages.common.prompting.budget import SMALLEST_EXCHANGE, prompt_room, shorten_to_fit
from stages.common.prompting.chat_frames import Roles, answer_frame, conversation_frame
from stages.common.prompting.prompts import PromptFormat, no_room
from stages.common.prompting.tokenizer import PromptTokenizer

# {"role": "system", "user" or "assistant", "content": text}
Message = dict[str, str]
# More tokens than a chat template writes between two turns.
_BETWEEN_TURNS = 16


class EncodedConversation(NamedTuple):
    """What the model reads before it answers.

    Attributes:
        text: the prompt, control tokens in their public spelling.
        ids: its token ids.
        answer_mask: for each of them, whether it belongs to an earlier answer or is the terminator of one.
        shortened: whether anything was left out.
        exchanges_dropped: how many questions with their answers were left out at the beginning.
    """

    text: str
    ids: list[int]
    answer_mask: list[bool]
    shortened: bool
    exchanges_dropped: int


class _Turns(NamedTuple):
    """A conversation, its system message apart; `texts` are the user's and the assistant's in turn, the user's last."""

    system: str | None
    texts: list[str]

    @property
    def roles(self) -> Roles:
        turns = tuple("assistant" if index % 2 else "user" for index in range(len(self.texts)))
        return turns if self.system is None else ("system", *turns)

    @property
    def contents(self) -> list[str]:
        return self.texts if self.system is None else [self.system, *self.texts]


class _Draft(NamedTuple):
    """A prompt of any length; `answer_ends` counts the tokens up to each earlier answer's end, its terminator aside."""

    text: str
    ids: list[int]
    answer_mask: list[bool]
    answer_ends: list[int]


def encode_conversations(
    prompt_format: PromptFormat,
    tokenizer: PromptTokenizer,
    conversations: list[list[Message]],
    answer_tokens: list[int],
) -> list[EncodedConversation]:
    """Turn conversations into prompts for their next answer, within the token budget.

    What gives way, and no more than needed: the oldest exchanges, then the end of the last question (see
    `prompt_room`), then the end of a system message that leaves less than a quarter of the budget.

    Args:
        prompt_format: of the kind "chat"; its system message stands in conversations that have none.
        tokenizer: the base model's.
        conversations: each with maybe a "system" turn, then "user" and "assistant" in turn, "user" last. White space
            around contents is taken off.
        answer_tokens: for each, how many tokens its next answer takes, terminator included, or may take.

    Returns:
        A prompt for each conversation, in order. With its answer it may be over the budget: the answer has to be cut.

    Raises:
        UserError: the base model's chat template cannot be used for such conversations.
    """
    budget = prompt_format.max_length_tokens
    whole = [_turns(conversation, prompt_format.system) for conversation in conversations]
    turns = [_last_exchanges(one, budget, tokenizer) for one in whole]
    drafts = _encode(tokenizer, turns)
    _drop_exchanges(tokenizer, turns, drafts, [budget - tokens for tokens in answer_tokens])
    over = [row for row, tokens in enumerate(answer_tokens) if len(drafts[row].ids) + tokens > budget]
    _shorten_texts(prompt_format, tokenizer, turns, drafts, {row: answer_tokens[row] for row in over})
    return [
        EncodedConversation(
            tokenizer.publish(draft.text),
            draft.ids,
            draft.answer_mask,
            shortened=now != before,
            exchanges_dropped=(len(before.texts) - len(now.texts)) // 2,
        )
        for before, now, draft in zip(whole, turns, drafts, strict=True)
    ]


def _turns(conversation: list[Message], system: str | None) -> _Turns:
    contents = [message["content"].strip() for message in conversation]
    if conversation[0]["role"] == "system":
        system, contents = contents[0], contents[1:]
    turns = _Turns(None if system is None else system.strip(), contents)
    roles = tuple(message["role"] for message in conversation)
    assert roles == turns.roles[-len(roles) :] and roles[-1] == "user", "roles are checked where messages are read"
    return turns


def _last_exchanges(turns: _Turns, budget: int, tokenizer: PromptTokenizer) -> _Turns:
    """The conversation without what could never fit, so that it need not be tokenised."""
    most_characters = budget * tokenizer.longest_token_characters
    texts, characters = [turns.texts[-1][:most_characters]], len(turns.texts[-1])
    for question, answer in zip(turns.texts[-3::-2], turns.texts[-2::-2], strict=True):
        characters += len(question) + len(answer)
        if characters > most_characters or len(texts) > budget:
            break
        texts += [answer, question]
    system = turns.system if turns.system is None else turns.system[:most_characters]
    return _Turns(system, texts[::-1])


def _encode(tokenizer: PromptTokenizer, turns: Iterable[_Turns]) -> list[_Draft]:
    """The prompts, however long, control tokens in their private spelling."""
    answer = answer_frame(tokenizer)
    pieces: list[list[str]] = []
    for one in turns:
        frame = conversation_frame(tokenizer, one.roles)
        # Context and answers in turn, context first and last; all but the first context begin with a terminator.
        parts = [frame[0]]
        for role, content, after in zip(one.roles, one.contents, frame[1:], strict=True):
            if role == "assistant":
                parts += [answer.lead + content + answer.trail, after]
            else:
                parts[-1] += content + after
        pieces.append(parts)
    context_ids = iter(tokenizer.encode([text for parts in pieces for text in parts[::2]]))
    answer_ids = iter(tokenizer.encode_behind(answer.anchor, [text for parts in pieces for text in parts[1::2]]))
    drafts = []
    for parts in pieces:
        ids = list(next(context_ids))
        mask = [False] * len(ids)
        ends = []
        for _ in parts[1::2]:
            learned, context = next(answer_ids), next(context_ids)
            ids += learned
            ends.append(len(ids))
            ids += context
            mask += [True] * (len(learned) + 1) + [False] * (len(context) - 1)
        drafts.append(_Draft("".join(parts), ids, mask, ends))
    return drafts


def _drop_exchanges(tokenizer: PromptTokenizer, turns: list[_Turns], drafts: list[_Draft], rooms: list[int]) -> None:
    """Drop each conversation's oldest exchanges, in place, until it fits or only the last question is left."""
    while pending := [
        row for row, draft in enumerate(drafts) if len(draft.ids) > rooms[row] and len(turns[row].texts) > 1
    ]:
        for row in pending:
            excess = len(drafts[row].ids) - rooms[row]
            # What goes with n exchanges is less than this, since the system message stays: never one too many.
            most_saved = [end + _BETWEEN_TURNS for end in drafts[row].answer_ends]
            count = next((n for n, saved in enumerate(most_saved, 1) if saved >= excess), len(most_saved))
            turns[row] = turns[row]._replace(texts=turns[row].texts[2 * count :])
        for row, draft in zip(pending, _encode(tokenizer, [turns[row] for row in pending]), strict=True):
            drafts[row] = draft


def _shorten_texts(
    prompt_format: PromptFormat,
    tokenizer: PromptTokenizer,
    turns: list[_Turns],
    drafts: list[_Draft],
    answer_tokens: dict[int, int],
) -> None:
    """Shorten the system messages and the only questions of the rows of `answer_tokens`, in place."""
    budget, rows = prompt_format.max_length_tokens, list(answer_tokens)
    with_system = [row for row in rows if turns[row].system]
    systems, _ = shorten_to_fit(
        tokenizer,
        [turns[row].system or "" for row in with_system],
        [budget - max(budget // 4, SMALLEST_EXCHANGE)] * len(with_system),
        lambda _, texts: _encode(tokenizer, [_Turns(text, [""]) for text in texts]),
    )
    for row, system in zip(with_system, systems, strict=True):
        turns[row] = turns[row]._replace(system=system)
    without_text = [len(draft.ids) for draft in _encode(tokenizer, [turns[row]._replace(texts=[""]) for row in rows])]
    if max(without_text, default=0) > budget - SMALLEST_EXCHANGE:
        raise no_room(prompt_format, max(without_text))
    rooms = [prompt_room(budget, tokens, answer_tokens[row]) for row, tokens in zip(rows, without_text, strict=True)]
    texts, encoded = shorten_to_fit(
        tokenizer,
        [turns[row].texts[0] for row in rows],
        rooms,
        lambda some, texts: _encode(
            tokenizer, [turns[rows[index]]._replace(texts=[text]) for index, text in zip(some, texts, strict=True)]
        ),
    )
    for row, text, draft in zip(rows, texts, encoded, strict=True):
        turns[row], drafts[row] = turns[row]._replace(texts=[text]), draft
