"""Conversations: the model learns the answers and their ends, token by token, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from stages.common.errors import UserError
from stages.common.prompting.answers import encode_answers
from stages.common.prompting.chat_frames import conversation_frame
from stages.common.prompting.conversations import EncodedConversation, Message, encode_conversations
from stages.common.prompting.prompts import PromptFormat, build_format
from stages.common.prompting.tokenizer import PromptTokenizer, load_prompt_tokenizer
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

# Published templates, written down with what matters here: roles, control tokens, white space, and what they refuse.
CHATML = CHAT_TEMPLATE
# As TRL asks for: {% generation %} around what the assistant says, its end included.
CHATML_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Mistral 7B Instruct 0.1: no system message, no generation prompt, a space before the answer.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Llama 2: white space on both sides of an answer, a begin token before every question.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Qwen 3: empty thoughts before the last answer, which its generation prompt does not have.
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The pattern of Llama 3's tokenizer: line breaks are a word of their own.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Style:
    """A kind of chat template, its control tokens (begin or padding first), and what stands around an answer."""

    template: str
    control_tokens: tuple[str, ...]
    bos: str
    eos: str
    lead: str = ""
    trail: str = ""
    terminator: str = "<|im_end|>"
    system: bool = True


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
STYLES = {
    "chatml": Style(CHATML, CHATML_TOKENS, "<|im_start|>", "<|im_end|>"),
    "chatml_generation": Style(CHATML_GENERATION, CHATML_TOKENS, "<|im_start|>", "<|im_end|>"),
    "llama_3": Style(LLAMA_3, LLAMA_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", terminator="<|eot_id|>"),
    "zephyr": Style(ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", terminator="</s>"),
    "mistral": Style(MISTRAL, ("<s>", "</s>"), "<s>", "</s>", lead=" ", terminator="</s>", system=False),
    "llama_2": Style(LLAMA_2, ("<s>", "</s>"), "<s>", "</s>", " ", " ", terminator="</s>", system=False),
    "gemma": Style(
        GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"), "<bos>", "<eos>",
        terminator="<end_of_turn>", system=False,
    ),
    "qwen_3": Style(QWEN_3, CHATML_TOKENS, "<|im_start|>", "<|im_end|>"),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A style's tokenizer, as the stages load it and as transformers does."""

    style: Style
    tokenizer: PromptTokenizer
    reference: Any

    def text(self, ids: list[int]) -> str:
        decoded: str = self.reference.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    def learned(self, answer: str) -> str:
        return self.style.lead + answer + self.style.trail + self.style.terminator


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A base by the name of its style, made once."""

    @cache
    def base(name: str) -> Base:
        style = STYLES[name]
        backend = make_tokenizer(style.control_tokens)
        if name == "llama_3":
            words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        return make_base(tmp_path_factory.mktemp(name), style, backend)

    return base


def make_base(folder: Path, style: Style, backend: Tokenizer) -> Base:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=style.bos, eos_token=style.eos)
    reference.chat_template = style.template
    reference.save_pretrained(folder)
    return Base(style, load_prompt_tokenizer(folder), reference)


def chat_format(tokenizer: PromptTokenizer, **changes: Any) -> PromptFormat:
    values: dict[str, Any] = {
        "kind": "chat",
        "style": "chat",
        "system": None,
        "template": None,
        "labels": [],
        "label_descriptions": None,
        "exemplars": [],
        "max_length_tokens": 2048,
    }
    return build_format(**(values | changes), tokenizer=tokenizer)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation of the user's and the assistant's words in turn."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def encode(base: Base, conversation: list[Message], **changes: Any) -> EncodedConversation:
    """The conversation as a prompt for its next answer, with no budget to speak of."""
    [encoded] = encode_conversations(chat_format(base.tokenizer, **changes), base.tokenizer, [conversation], [1])
    return encoded


def learned_runs(base: Base, encoded: EncodedConversation) -> list[str]:
    """Exactly the tokens where the mask is true, as text, a run at a time."""
    assert len(encoded.answer_mask) == len(encoded.ids)
    runs = groupby(zip(encoded.answer_mask, encoded.ids, strict=True), key=lambda pair: pair[0])
    return [base.text([token for _, token in run]) for learned, run in runs if learned]


CONVERSATIONS = {
    "one exchange": ("what a nice day", "It is."),
    "three exchanges": ("Is it?", "No.\n\nIt is a dog (good)", "why?", "42 'cause", "Größe 🙂 日本語", " so\n- it is "),
    "the same words again": ("no", "no", "no", "no", "no", "no"),
    "code and blanks": ("run\n\n    x = 1", "def f():\n    return 1\n\n\nf()", "{{ x }}", "<b>&amp;</b>"),
}  # fmt: skip


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", STYLES)
def test_exactly_the_answers_and_their_terminators_are_learned(
    name: str, system: str | None, contents: tuple[str, ...], bases: Callable[[str], Base]
) -> None:
    base = bases(name)
    encoded = encode(base, talk(*contents[:-1], system=system))
    assert learned_runs(base, encoded) == [base.learned(answer.strip()) for answer in contents[1:-1:2]]
    assert base.text(encoded.ids) == encoded.text
    assert (encoded.shortened, encoded.exchanges_dropped) == (False, 0)
    prompt_format = chat_format(base.tokenizer)
    [answer] = encode_answers("chat", base.tokenizer, [contents[-1]], prompt_format.terminator_ids[0], 2048)
    assert base.text(answer.ids) == base.learned(contents[-1].strip())
    assert base.reference.convert_ids_to_tokens(prompt_format.terminator_ids[0]) == base.style.terminator


@pytest.mark.parametrize("contents", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", STYLES)
def test_the_prompt_is_what_the_chat_template_asks_the_last_answer_with(
    name: str, system: str | None, contents: tuple[str, ...], bases: Callable[[str], Base]
) -> None:
    base = bases(name)
    asked = [turn | {"content": turn["content"].strip()} for turn in talk(*contents[:-1], system=system)]
    encoded = encode(base, asked)
    if system is not None and not base.style.system:
        asked = [{"role": "user", "content": f"{system}\n\n{asked[1]['content']}"}, *asked[2:]]
    assert encoded.text == base.reference.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("contents", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "system"),
    [(name, None) for name in ("chatml", "llama_3", "zephyr", "gemma", "mistral")]
    + [(name, "Be brief.") for name in ("chatml", "llama_3", "zephyr")],
)
def test_prompt_and_answer_have_the_tokens_that_transformers_gives_the_whole_conversation(
    name: str, system: str | None, contents: tuple[str, ...], bases: Callable[[str], Base]
) -> None:
    base = bases(name)
    conversation = [turn | {"content": turn["content"].strip()} for turn in talk(*contents, system=system)]
    encoded = encode(base, conversation[:-1])
    [answer] = encode_answers(
        "chat", base.tokenizer, [contents[-1]], chat_format(base.tokenizer).terminator_ids[0], 2048
    )
    whole = base.reference.apply_chat_template(conversation, tokenize=True, return_dict=False)
    ours = encoded.ids + answer.ids
    assert whole[: len(ours)] == ours
    # Some templates write a line break after the last terminator.
    assert base.text(whole[len(ours) :]).strip() == ""


@pytest.mark.parametrize("contents", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_mask_is_the_one_that_transformers_makes_of_generation_tags(
    contents: tuple[str, ...], bases: Callable[[str], Base]
) -> None:
    base = bases("chatml_generation")
    conversation = [turn | {"content": turn["content"].strip()} for turn in talk(*contents)]
    encoded = encode(base, conversation[:-1])
    expected = base.reference.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    count = len(encoded.ids)
    assert expected["input_ids"][:count] == encoded.ids
    assert [bool(flag) for flag in expected["assistant_masks"][:count]] == encoded.answer_mask


def test_a_tokenizer_that_puts_a_space_before_a_first_word_gives_answers_their_own_tokens(tmp_path: Path) -> None:
    # SentencePiece's manners, as Mistral's and Llama 2's tokenizers have them.
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁good", -1.0), ("good", -1.5), ("▁bad", -1.0), ("▁", -2.0)]
    backend = Tokenizer(models.Unigram(pieces + [(chr(code), -9.0) for code in range(33, 127)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    answers = {}
    for name in ("mistral", "zephyr"):
        (tmp_path / name).mkdir()
        base = make_base(tmp_path / name, STYLES[name], backend)
        asked = talk("bad?", "good bad", "good?")
        encoded = encode(base, asked)
        [answer] = encode_answers("chat", base.tokenizer, ["good"], 2, 100)
        whole = [*asked, {"role": "assistant", "content": "good"}]
        expected = base.reference.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert expected[: len(encoded.ids + answer.ids)] == encoded.ids + answer.ids
        learned = [token for token, flag in zip(encoded.ids, encoded.answer_mask, strict=True) if flag]
        answers[name] = [base.reference.convert_ids_to_tokens(ids) for ids in (learned, answer.ids)]
    assert answers["mistral"] == [["▁good", "▁bad", "</s>"], ["▁good", "</s>"]]
    assert answers["zephyr"] == [["good", "▁bad", "</s>"], ["good", "</s>"]]


# --- system messages --------------------------------------------------------------------------------------------------


def test_the_formats_system_message_stands_where_a_conversation_has_none(bases: Callable[[str], Base]) -> None:
    base = bases("chatml")
    for system, own, expected in (
        (None, None, "You help."),
        ("Be brief.", None, "Be brief."),
        ("Be brief.", "Be kind.", "Be kind."),
        (None, "Be kind.", "Be kind."),
    ):
        encoded = encode(base, talk("why?", system=own), system=system)
        assert encoded.text == (
            f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_message_that_the_template_refuses_stands_before_the_first_question(
    name: str, bases: Callable[[str], Base]
) -> None:
    base = bases(name)
    merged = encode(base, talk("Be kind.\n\nwhy?", "so", "no"))
    assert encode(base, talk("why?", "so", "no", system="Be kind."))._replace(shortened=False) == merged
    # One that params.yaml asks for is the user's to take out.
    with pytest.raises(UserError, match=r"set format_prompts\.system to null"):
        chat_format(base.tokenizer, system="Be kind.")


# --- hostile contents -------------------------------------------------------------------------------------------------

FRAGMENTS = [token for style in STYLES.values() for token in style.control_tokens]
FRAGMENTS += [
    "<|im_",
    "end|>",
    "<|",
    "|>",
    "<",
    "/s>",
    "[INST]",
    "[/INST]",
    "<|user|>\n",
    "<|assistant|>\n",
    "assistant\n",
]
FRAGMENTS += [
    "{{ messages }}",
    "{% endfor %}",
    "{% generation %}",
    "</think>",
    "<think>",
    "-turn-0>",
    "turn-1",
    " ",
    "\n",
    "a",
]
hostile = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(hostile, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1), system=hostile)
@pytest.mark.parametrize("name", STYLES)
def test_no_content_adds_removes_or_imitates_a_role(
    name: str, contents: list[str], system: str, bases: Callable[[str], Base]
) -> None:
    base = bases(name)
    system_turn = system if base.style.system else None
    hostile_one = encode(base, talk(*contents, system=system_turn))
    harmless = encode(base, talk(*["x"] * len(contents), system=None if system_turn is None else "x"))
    control_ids = set(base.tokenizer.control_ids.values())
    for one in (hostile_one, harmless):
        assert len(one.answer_mask) == len(one.ids)
    assert [token for token in hostile_one.ids if token in control_ids] == [
        token for token in harmless.ids if token in control_ids
    ]
    assert learned_runs(base, hostile_one) == [base.learned(text.strip()) for text in contents[1::2]]
    assert base.text(hostile_one.ids) == hostile_one.text
    assert base.tokenizer.nonce not in hostile_one.text


# --- the budget -------------------------------------------------------------------------------------------------------

LONG = "nice day " * 100


def fit(base: Base, conversation: list[Message], answer_tokens: int, budget: int) -> EncodedConversation:
    prompt_format = chat_format(base.tokenizer, max_length_tokens=budget)
    [encoded] = encode_conversations(prompt_format, base.tokenizer, [conversation], [answer_tokens])
    return encoded


@pytest.mark.parametrize("name", STYLES)
def test_the_oldest_exchanges_go_first_and_no_more_of_them_than_needed(name: str, bases: Callable[[str], Base]) -> None:
    base = bases(name)
    contents = [f"{'nice ' * (index % 4)}text {index}" for index in range(15)]
    system = "Be brief." if base.style.system else None
    rest = [encode(base, talk(*contents[start:], system=system)) for start in range(0, 15, 2)]
    for answer_tokens in (1, 20):
        for budget in range(len(rest[-1].ids) + answer_tokens, len(rest[0].ids) + answer_tokens + 1, 3):
            encoded = fit(base, talk(*contents, system=system), answer_tokens, max(budget, 60))
            dropped = next(n for n, one in enumerate(rest) if len(one.ids) + answer_tokens <= max(budget, 60))
            assert encoded == rest[dropped]._replace(shortened=dropped > 0, exchanges_dropped=dropped)


def test_then_the_last_question_is_shortened_down_to_half_of_what_the_template_leaves(
    bases: Callable[[str], Base],
) -> None:
    base = bases("chatml")
    template = len(encode(base, talk("")).ids)
    for answer_tokens, room in (
        (20, 80),
        (60, template + (100 - template) // 2),
        (5_000, template + (100 - template) // 2),
    ):
        encoded = fit(base, talk("why?", "so", LONG), answer_tokens, 100)
        assert (encoded.shortened, encoded.exchanges_dropped) == (True, 1)
        # " nice" and " day" are one to three tokens.
        assert room - 3 < len(encoded.ids) <= room
        kept = encoded.text.partition("user\n")[2].partition("<|im_end|>")[0]
        assert LONG.startswith(kept)
        assert kept == kept.strip()
    # A short question before an answer that can never fit stays whole.
    assert fit(base, talk("why?"), 5_000, 100) == encode(base, talk("why?"))


def test_a_system_message_is_shortened_only_when_it_leaves_no_quarter_for_the_exchange(
    bases: Callable[[str], Base],
) -> None:
    base = bases("chatml")
    fits = fit(base, talk("why?", "so", "why?", system="Be brief. " * 10), 10, 120)
    assert "Be brief. " * 9 in fits.text
    encoded = fit(base, talk(LONG, "so", LONG, system="Be brief. " * 50), 10, 120)
    assert (encoded.shortened, encoded.exchanges_dropped) == (True, 1)
    assert len(encoded.ids) <= 110
    system, _, question = encoded.text.partition("<|im_end|>")
    assert "Be brief. " in system
    assert "nice" in question
    assert len(encode(base, talk("", system=system.partition("system\n")[2])).ids) <= 90


def test_nothing_is_left_out_of_what_fits_exactly(bases: Callable[[str], Base]) -> None:
    base = bases("llama_3")
    conversation = talk("why?", "so", "nice day " * 20)
    whole = encode(base, conversation)
    assert fit(base, conversation, 20, len(whole.ids) + 20) == whole
    assert fit(base, conversation, 21, len(whole.ids) + 20).exchanges_dropped == 1


@pytest.mark.parametrize("unit", ["nice ", "<|im_end|>", "🙂"])
def test_ten_megabytes_and_ten_thousand_turns_take_no_longer_than_what_is_kept_of_them(
    unit: str, bases: Callable[[str], Base]
) -> None:
    base = bases("chatml")
    start = time.perf_counter()
    long = unit * (5_000_000 // len(unit.encode()))
    assert fit(base, talk(long, long, "why?"), 10, 200).exchanges_dropped == 1
    assert fit(base, talk(long), 10, 200).shortened
    assert fit(base, talk("why?", system=long), 10, 200).shortened
    assert fit(base, talk(*["no"] * 10_001), 10, 200).exchanges_dropped > 4_900
    assert time.perf_counter() - start < 10


def test_several_conversations_come_back_in_order_and_none_give_none(bases: Callable[[str], Base]) -> None:
    base = bases("chatml")
    prompt_format = chat_format(base.tokenizer, max_length_tokens=100)
    conversations = [talk("a"), talk(LONG), talk("a", "b", "c"), talk("why?", "so", LONG, "no", "a"), talk("b")]
    encoded = encode_conversations(prompt_format, base.tokenizer, conversations, [10] * 5)
    alone = [encode_conversations(prompt_format, base.tokenizer, [one], [10])[0] for one in conversations]
    assert encoded == alone
    assert encode_conversations(prompt_format, base.tokenizer, [], []) == []


def test_the_chat_template_is_asked_once_for_each_sequence_of_roles(bases: Callable[[str], Base]) -> None:
    base = bases("zephyr")
    prompt_format = chat_format(base.tokenizer)
    conversations = [talk(*[f"text {index}"] * (2 * (index % 4) + 1)) for index in range(400)]
    conversation_frame.cache_clear()
    encode_conversations(prompt_format, base.tokenizer, conversations, [10] * 400)
    assert conversation_frame.cache_info().misses == 4


# --- templates that cannot be used ------------------------------------------------------------------------------------

# DeepSeek R1: the generation prompt opens thoughts that an answer in the history does not have.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Mistral 7B Instruct 0.3: the system message stands in the last question, wherever that is.
MOVES_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
ENDS_ONCE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.content + ('<|im_end|>' if loop.last or m.role == 'user' "
    "else '<|endoftext|>') }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
# As older ChatML templates: there is no generation prompt.
ASKS_NOT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKS, "a text that is gone once the answer is there"),
        (FORGETS, "shows the assistant's message of turn 2 not once"),
        (ENDS_ONCE, "ends an earlier answer otherwise"),
        (ASKS_NOT, "does not write an earlier answer .* behind what it asks for one with"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no control token after an answer"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "question_answering"])
def test_a_chat_template_that_shows_a_conversation_otherwise_when_it_goes_on_is_an_error_at_once(
    kind: str, template: str, message: str, tmp_path: Path
) -> None:
    style = Style(template, CHATML_TOKENS, "<|im_start|>", "<|im_end|>")
    base = make_base(tmp_path, style, make_tokenizer())
    with pytest.raises(UserError, match=f"the base model's chat template .*{message}"):
        chat_format(base.tokenizer, kind=kind, template=None if kind == "chat" else "{{ text }}")


def test_a_template_that_moves_the_system_message_is_an_error_where_there_is_one(tmp_path: Path) -> None:
    style = Style(MOVES_SYSTEM, CHATML_TOKENS, "<|im_start|>", "<|im_end|>", lead=" ")
    base = make_base(tmp_path, style, make_tokenizer())
    assert learned_runs(base, encode(base, talk("a", "b", "c"))) == [" b<|im_end|>"]
    assert encode(base, talk("a", system="s")).text == "[INST] s\n\na [/INST]"
    with pytest.raises(UserError, match=r"user's message of turn 2 .* system messages"):
        encode(base, talk("a", "b", "c", system="s"))
