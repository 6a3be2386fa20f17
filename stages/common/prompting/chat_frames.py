"""What a base model's chat template writes around the turns of a conversation, once for each sequence of roles.

The contents themselves are not shown to the template but stand-ins for them: no text can then add, remove or imitate a
role, or make the template take another way. What the template wrote is cut at the stand-ins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from stages.common.errors import UserError
from stages.common.prompting.chat_template import chat_terminator_id, render_chat
from stages.common.prompting.tokenizer import PromptTokenizer

Roles = tuple[str, ...]


class AnswerFrame(NamedTuple):
    """What stands around an answer.

    Attributes:
        anchor: the end of what comes before, from its last control token on. An answer is tokenised behind it: some
            tokenizers put a space before a text's first word.
        lead: white space that the chat template writes between its generation prompt and an answer; learned with it.
        trail: white space between an answer and its terminator; learned too.
    """

    anchor: str
    lead: str
    trail: str


@lru_cache(maxsize=8)
def answer_frame(tokenizer: PromptTokenizer) -> AnswerFrame:
    """What the chat template puts around every answer.

    Text that it puts before the last answer alone and that is no white space (the empty thoughts of some reasoning
    models) is left out: an answer follows the generation prompt, in training as in use.

    Raises:
        UserError: there is no chat template, it fails, or a conversation with the answer does not begin as the
            conversation that asks for it.
    """
    asked = _shown(tokenizer, ("user",), asks=True)
    answered = _shown(tokenizer, ("user", "assistant"), asks=False)
    lead, found, after = answered[len(asked) :].partition(_stand_in(tokenizer, 1))
    if not answered.startswith(asked) or not found:
        raise _inconsistent("asks for an answer with a text that is gone once the answer is there")
    trail = after[: len(after) - len(after.lstrip())]
    behind_user = asked.rpartition(_stand_in(tokenizer, 0))[2]
    control = behind_user.rfind(f"<{tokenizer.nonce}-")
    return AnswerFrame(behind_user[max(control, 0) :], "" if lead.strip() else lead, trail)


@lru_cache(maxsize=1024)
def conversation_frame(tokenizer: PromptTokenizer, roles: Roles) -> tuple[str, ...]:
    """What stands before each turn of a conversation, and after the last up to where the answer begins.

    Args:
        tokenizer: has the chat template.
        roles: of the turns; maybe "system", then "user" and "assistant" in turn, "user" last.

    Returns:
        One text more than there are turns, control tokens respelled. What belongs to an earlier answer (see
        `AnswerFrame`) is in none of them but for the terminator, with which the text after an answer begins. A system
        message that the template refuses or leaves out stands before the first user's text, a blank line between.

    Raises:
        UserError: there is no chat template, it fails, or it shows a conversation otherwise when it goes on, so that
            its beginning is not what the model was asked.
    """
    answer = answer_frame(tokenizer)
    shown = _shown(tokenizer, roles, asks=True)
    frame, rest = [], shown
    for turn in range(len(roles)):
        before, found, rest = rest.partition(_stand_in(tokenizer, turn))
        if not found or _stand_in(tokenizer, turn) in rest:
            raise _inconsistent(f"shows the {roles[turn]}'s message of turn {turn + 1} not once, or not in its place")
        frame.append(before)
    frame.append(rest)
    terminator = tokenizer.stand_in(str(chat_terminator_id(tokenizer, None)))
    for turn in (turn for turn, role in enumerate(roles) if role == "assistant"):
        asked = _shown(tokenizer, roles[:turn], asks=True)
        if not shown.startswith(asked + answer.lead + _stand_in(tokenizer, turn)):
            raise _inconsistent(f"does not write an earlier answer (turn {turn + 1}) behind what it asks for one with")
        if not frame[turn + 1].startswith(answer.trail + terminator):
            raise _inconsistent("ends an earlier answer otherwise than the last one")
        frame[turn] = frame[turn].removesuffix(answer.lead)
        frame[turn + 1] = frame[turn + 1].removeprefix(answer.trail)
    return tuple(frame)


@lru_cache(maxsize=8)
def takes_system_turns(tokenizer: PromptTokenizer) -> bool:
    """Whether the chat template shows a system message; some refuse it, some leave it out."""
    system = tokenizer.stand_in("system")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _stand_in(tokenizer, 1)}]
    try:
        return system in render_chat(tokenizer, messages, add_generation_prompt=True)
    except UserError:
        return False


@lru_cache(maxsize=2048)
def _shown(tokenizer: PromptTokenizer, roles: Roles, asks: bool) -> str:
    """What the chat template makes of stand-ins, control tokens respelled."""
    contents = [_stand_in(tokenizer, turn) for turn in range(len(roles))]
    if roles[0] == "system" and not takes_system_turns(tokenizer):
        roles, contents = roles[1:], ["\n\n".join(contents[:2]), *contents[2:]]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return tokenizer.respell(render_chat(tokenizer, messages, add_generation_prompt=asks))


def _stand_in(tokenizer: PromptTokenizer, turn: int) -> str:
    return tokenizer.stand_in(f"turn-{turn}")


def _inconsistent(problem: str) -> UserError:
    return UserError(
        f"models/tokenizer: the base model's chat template {problem}, so what is learned would not be what is asked "
        "later. Choose another base model; with the task 'question_answering', format_prompts.style: plain will do; "
        "and some templates do so with system messages alone."
    )
