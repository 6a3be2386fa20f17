"""Whatever stands in texts, labels, exemplars or messages: a prompt has its control tokens, and those alone, in place.

Each prompt is compared with that of harmless words: between the same control tokens, in the same order, stands the same
text but for the words themselves. So nothing adds, removes or imitates a role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serving.common.adapter import Adapter
from serving.common.chat import check_messages
from serving.http.schemas import ChatRequest
from serving.predictor import Predictor
from stages.common.errors import UserError
from stages.common.prompting.conversations import encode_conversations
from stages.common.prompting.prompts import PromptFormat, build_format, encode_prompts
from stages.common.prompting.rows import format_rows
from stages.common.prompting.tokenizer import PromptTokenizer, load_prompt_tokenizer
from stages.common.sources.cells import RefusedRow
from tests.hostile import CHATML, SMOLLM2, anything, examples, labels, texts
from tests.test_chat_prompts import STYLES, make_base
from tests.tiny import make_tokenizer
from tests.workplace import ROOT

# SmolLM2's own tokenizer, where `dvc repro base_model` or `dvc pull` has put it.
REAL = ROOT / "models/tokenizer"
NAMES = ["chatml", "smollm2", "llama_3", "llama_2", "real"]
TEMPLATE = (
    "{% for label in labels %}{{ label }}: {{ descriptions[label] }}\n{% endfor %}"
    "{% for e in exemplars %}Text: {{ e.text }}\nLabel: {{ e.label }}\n{% endfor %}Text: {{ text }}\nLabel:"
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PromptTokenizer]:
    """A tokenizer by its name, made once."""

    @cache
    def loaded(name: str) -> PromptTokenizer:
        if name == "real":
            if not (REAL / "tokenizer.json").is_file():
                pytest.skip("models/tokenizer is not here: `dvc repro base_model`")
            return load_prompt_tokenizer(REAL)
        style = STYLES["chatml" if name == "smollm2" else name]
        backend = make_tokenizer(SMOLLM2 if name == "smollm2" else style.control_tokens)
        return make_base(tmp_path_factory.mktemp(name), style, backend).tokenizer

    return loaded


def make_format(tokenizer: PromptTokenizer, kind: str, style: str, **changes: Any) -> PromptFormat:
    values: dict[str, Any] = {
        "system": None, "template": None if kind == "chat" else "{{ text }}", "labels": [], "label_descriptions": None,
        "exemplars": [], "max_length_tokens": 100_000,
    }  # fmt: skip
    return build_format(kind=kind, style=style, tokenizer=tokenizer, **(values | changes))


def structure(tokenizer: PromptTokenizer, ids: list[int]) -> list[int | str]:
    """Control tokens as ids, and between them what the other tokens are as text."""
    controls = set(tokenizer.control_ids.values())
    found: list[int | str] = []
    for is_control, run in groupby(ids, key=controls.__contains__):
        tokens = list(run)
        found += tokens if is_control else [decoded(tokenizer, tokens)]
    return found


def decoded(tokenizer: PromptTokenizer, ids: list[int]) -> str:
    text: str = tokenizer.backend.decode(ids, skip_special_tokens=False)
    return text


def seen(tokenizer: PromptTokenizer, text: str) -> str:
    """A text as the tokenizer gives it back: SmolLM2's knows no token for some bytes, and leaves them out."""
    return decoded(tokenizer, tokenizer.encode([text])[0])


def with_words(tokenizer: PromptTokenizer, harmless: list[int | str], words: dict[str, str]) -> list[int | str]:
    """A harmless structure with its words replaced, which are unlike anything else."""

    def replaced(text: str) -> str:
        # At once: a content may hold another one's word.
        return re.sub("zqx[0-9]+xqz", lambda match: words[match[0]], text)

    return [seen(tokenizer, replaced(part)) if isinstance(part, str) else part for part in harmless]


def word(number: int) -> str:
    return f"zqx{number}xqz"


@examples(60)
@given(
    names=labels(),
    contents=st.lists(texts(), min_size=5, max_size=5),
    system=st.none() | texts(),
    style=st.sampled_from(["plain", "chat"]),
)
@pytest.mark.parametrize("name", NAMES)
def test_a_classification_prompt_keeps_its_structure(
    name: str, names: list[str], contents: list[str], system: str | None, style: str, load: Callable[..., Any]
) -> None:
    tokenizer = load(name)
    if style == "plain" or not STYLES["chatml" if name in ("smollm2", "real") else name].system:
        system = None
    text, *exemplar_texts = contents

    def prompt(names: list[str], text: str, shown: list[str], system: str | None) -> list[int]:
        exemplars = [{"text": one, "label": label} for one, label in zip(shown, names, strict=False)]
        prompt_format = make_format(
            tokenizer, "classification", style, template=TEMPLATE, labels=names, exemplars=exemplars, system=system,
            label_descriptions=dict(zip(names, reversed(shown), strict=False)) | dict.fromkeys(names[4:], ""),
        )  # fmt: skip
        for entry in prompt_format.completions.values():
            assert not set(entry["ids"][:-1]) & set(tokenizer.control_ids.values())
        [found] = encode_prompts(prompt_format, tokenizer, [text])
        assert not found.shortened
        return found.ids

    plain_names = [word(number) for number in range(len(names))]
    plain_shown = [word(10 + number) for number in range(4)]
    try:
        hostile = prompt(names, text, exemplar_texts, system)
    except UserError as error:
        # Llama 2's tokenizer of these tests has no way to tell some labels apart; nothing else is refused.
        assert "makes the same tokens of" in str(error)
        assume(False)
    harmless = prompt(plain_names, word(20), plain_shown, None if system is None else word(21))
    words = dict(zip([*plain_names, *plain_shown, word(20)], [*names, *exemplar_texts, text], strict=True))
    if system is not None:
        words[word(21)] = system.strip()
    assert structure(tokenizer, hostile) == with_words(tokenizer, structure(tokenizer, harmless), words)


def turns(contents: list[str], system: str | None) -> list[dict[str, str]]:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def conversation_pairs(
    contents: list[str], system: str | None
) -> tuple[list[dict[str, str]], list[dict[str, str]], dict[str, str]]:
    """A conversation, one of harmless words with the same roles, and which word stands for which content."""
    words = {word(number): content.strip() for number, content in enumerate(contents)}
    plain_system = None
    if system is not None:
        plain_system = word(99)
        words[plain_system] = system.strip()
    return turns(contents, system), turns([word(number) for number in range(len(contents))], plain_system), words


odd_contents = st.lists(texts(), min_size=1, max_size=5).filter(lambda contents: len(contents) % 2 == 1)


@examples(60)
@given(contents=odd_contents, system=st.none() | texts(), answer=texts())
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_keeps_its_roles(
    name: str, contents: list[str], system: str | None, answer: str, load: Callable[..., Any]
) -> None:
    tokenizer = load(name)
    prompt_format = make_format(tokenizer, "chat", "chat")
    hostile, harmless, words = conversation_pairs(contents, system)
    one, other = encode_conversations(prompt_format, tokenizer, [hostile, harmless], [1, 1])
    assert structure(tokenizer, one.ids) == with_words(tokenizer, structure(tokenizer, other.ids), words)
    # What is learned: each earlier answer, and the terminator behind it.
    runs = [[token for _, token in run] for learned, run in groupby(zip(one.answer_mask, one.ids, strict=True),
            key=lambda pair: pair[0]) if learned]  # fmt: skip
    assert [run[-1] for run in runs] == [prompt_format.terminator_ids[0]] * (len(contents) // 2)
    assert [decoded(tokenizer, run[:-1]).strip() for run in runs] == [
        seen(tokenizer, text.strip()).strip() for text in contents[1::2]
    ]
    # The answer to learn ends with the one terminator too.
    messages = [*hostile, {"role": "assistant", "content": answer}]
    [row] = format_rows(prompt_format, tokenizer, [{"messages": json.dumps(messages)}])
    assert row.prompt_ids == one.ids and row.completion_ids is not None
    assert not set(row.completion_ids[:-1]) & set(tokenizer.control_ids.values())
    assert row.completion_ids[-1] == prompt_format.terminator_ids[0]


@pytest.fixture(scope="module")
def predictor(load: Callable[[str], PromptTokenizer]) -> Iterator[Predictor]:
    """What the service encodes with; no model is needed for that."""
    tokenizer = load("smollm2")
    adapter = Adapter(Path("nowhere"), make_format(tokenizer, "chat", "chat"), None)
    yield Predictor(adapter, None, tokenizer, 4)  # type: ignore[arg-type]


@examples(100)
@given(contents=st.lists(anything(), min_size=1, max_size=5), system=st.none() | anything(), parts=st.booleans())
def test_a_request_to_the_service_keeps_its_roles_or_is_refused(
    contents: list[str], system: str | None, parts: bool, predictor: Predictor
) -> None:
    hostile, harmless, words = conversation_pairs(contents, system)
    body: dict[str, Any] = {"model": "m", "messages": [dict(message) for message in hostile]}
    if parts:
        for message in body["messages"]:
            message["content"] = [{"type": "text", "text": message["content"]}]
    taken = []
    try:
        # JSON can spell half of a surrogate pair.
        asked = ChatRequest.model_validate_json(json.dumps(body))
    except ValueError:
        assume(False)
    for turn in asked.messages:
        text = turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content)
        taken.append({"role": turn.role, "content": text})
    try:
        checked = check_messages("chat", taken)
    except UserError:
        assert len(contents) % 2 == 0 or not all(map(valid, [*contents, *([] if system is None else [system])]))
        return
    one, other = predictor.encode([checked, check_messages("chat", harmless)])
    tokenizer = predictor.tokenizer
    assert structure(tokenizer, one.ids) == with_words(tokenizer, structure(tokenizer, other.ids), words)


def valid(content: str) -> bool:
    return bool(content.strip()) and "\0" not in content and content.encode(errors="replace").decode() == content


@examples(100)
@given(role=anything(), form=st.sampled_from(["request", "messages"]))
def test_a_role_is_one_of_those_that_are_known(role: str, form: str) -> None:
    message = {"role": role, "content": "x"}
    known = role in ("system", "developer", "user", "assistant")
    if form == "request":
        body = json.dumps({"model": "m", "messages": [message]})
        try:
            ChatRequest.model_validate_json(body)
        except ValueError:
            assert not known
        else:
            assert known
        return
    try:
        check_messages("chat", [message])
    except (UserError, RefusedRow):
        assert role != "user"
    else:
        assert role == "user"


def test_the_real_tokenizer_has_the_control_tokens_that_are_tried() -> None:
    if not (REAL / "tokenizer.json").is_file():
        pytest.skip("models/tokenizer is not here: `dvc repro base_model`")
    assert set(load_prompt_tokenizer(REAL).control_ids) == set(SMOLLM2) > set(CHATML)
    # They do mean something to the tokenizer as it is published.
    published = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    assert [len(published.encode(token).ids) for token in SMOLLM2] == [1] * len(SMOLLM2)
