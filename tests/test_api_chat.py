"""Answers in pieces: those of `Predictor.predict`, sampled ones, stop texts, and an end when nobody listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from serving.common.chat import Outcome, Sampling, check_messages, stream_answer, write_answer
from serving.predictor import Predictor, load_predictor
from stages.common.errors import UserError
from tests.served import make_served, turns

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=24)
CONVERSATION = turns("what a film", "so it was", "tell me more of it")
Ask = Callable[..., tuple[list[str], Outcome]]


@pytest.fixture(scope="module", params=["chat", "question_answering"])
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictor]:
    place = make_served(tmp_path_factory.mktemp("chat") / "project", request.param)
    with place.entered():
        yield load_predictor(max_new_tokens=24)


def ask(predictor: Predictor, text: str, sampling: Sampling = GREEDY, **options: Any) -> tuple[list[str], Outcome]:
    stream = stream_answer(predictor, turns(text), sampling, **options)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_greedy_pieces_are_the_predictors_answer(predictor: Predictor) -> None:
    texts = [f"the film of day {number} was {word}" for number in range(3) for word in ("fine", "poor", "<|im_end|>")]
    contents: list[Any] = [*texts, *([CONVERSATION] if predictor.adapter.kind == "chat" else [])]
    for content in contents:
        messages = turns(content) if isinstance(content, str) else content
        # One at a time on both sides: a batch-mate changes the last digits, and these answers hang by them.
        [expected] = predictor.predict([content])
        assert "".join(stream_answer(predictor, messages, GREEDY)) == expected["answer"]
    pieces, outcome = ask(predictor, texts[0])
    assert len(pieces) > 3 and outcome.answer_tokens == 24 and outcome.finish_reason == "length"
    [prompt] = predictor.encode([texts[0]])
    assert outcome.prompt_tokens == len(prompt.ids) and not outcome.shortened


def test_a_terminator_ends_the_answer_and_is_not_in_it(predictor: Predictor) -> None:
    """Some token that this random model generates early is declared the terminator."""
    whole, _ = ask(predictor, "a day")
    prompt_format = predictor.adapter.prompt_format
    for token in range(3, 400):
        ended = predictor.adapter._replace(prompt_format=replace(prompt_format, terminator_ids=[token]))
        pieces, outcome = ask(replace(predictor, adapter=ended), "a day")
        if 3 < outcome.answer_tokens < 20:
            break
    assert outcome.finish_reason == "stop"
    [expected] = replace(predictor, adapter=ended).predict(["a day"])
    assert "".join(pieces) == expected["answer"] and "".join(whole).startswith(expected["answer"])


def test_a_seed_repeats_an_answer_and_others_do_not(predictor: Predictor) -> None:
    def sample(seed: int | None, temperature: float = 2, top_p: float = 1) -> str:
        return "".join(ask(predictor, "a day", Sampling(temperature, top_p, 24, seed=seed))[0])

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in (7, 8, -(2**63), 2**63 - 1, None)}) == 5
    greedy = "".join(ask(predictor, "a day")[0])
    assert sample(7, top_p=0) == greedy and sample(7, temperature=1e-300) == greedy, "only the likeliest is left"


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_shown(predictor: Predictor) -> None:
    whole = "".join(ask(predictor, "a day")[0])
    for start in range(2, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        pieces, outcome = ask(predictor, "a day", replace(GREEDY, stop=("never there", stop)))
        assert "".join(pieces) == whole[: whole.find(stop)].strip()
        assert outcome.finish_reason == "stop" and outcome.answer_tokens <= 24
    # What only begins like a stop text is shown after all.
    pieces, outcome = ask(predictor, "a day", replace(GREEDY, stop=(whole[-3:] + "and more",)))
    assert "".join(pieces) == whole and outcome.finish_reason == "length"


def test_nobody_listening_ends_the_generation(predictor: Predictor) -> None:
    limit = 100_000
    cancelled, heard = threading.Event(), []

    def listen(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 3:
            cancelled.set()

    outcome = write_answer(predictor, turns("a day"), replace(GREEDY, max_new_tokens=limit), listen, cancelled)
    assert outcome.finish_reason == "cancelled" and outcome.answer_tokens < 100
    stream = stream_answer(predictor, turns("a day"), replace(GREEDY, max_new_tokens=limit))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("generation")]
    assert ask(predictor, "a day", cancelled=cancelled) == ([], Outcome("cancelled", outcome.prompt_tokens, 0, False))


def test_messages_are_taken_as_ingest_takes_them() -> None:
    system = {"role": "developer", "content": " be brief "}
    assert check_messages("chat", [system, *turns(" a ", "b", "c")]) == [
        {"role": "system", "content": "be brief"},
        *turns("a", "b", "c"),
    ]
    wrong: list[tuple[str, list[dict[str, str]], str]] = [
        ("chat", [], "the conversation is empty"),
        ("chat", turns("a", "b"), "the last one is the assistant's"),
        ("chat", [*turns("a"), *turns("secret")], "turns 1 and 2 are both the user's"),
        ("chat", [*turns("a", "b"), system], "turn 3 is a system turn"),
        ("chat", [{"role": "tool", "content": "secret"}], "turn 1 has the role 'tool'"),
        ("chat", turns("secret", " ", "c"), r"turn 2 \(assistant\) is empty"),
        ("chat", turns("secret \0"), "a NUL byte"),
        ("chat", turns("secret \ud800"), "half of a surrogate pair"),
        ("question_answering", [system, *turns("secret")], "takes no system turn"),
        ("question_answering", turns("secret", "b", "c"), "takes one"),
    ]
    for kind, messages, expected in wrong:
        with pytest.raises(UserError, match=expected) as caught:
            check_messages(kind, messages)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": 2.1}, "temperature: 2.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 1.1}, "top_p: 1.1"),
        ({"max_new_tokens": 0}, "the longest answer: 0"),
        ({"stop": ("a", "")}, "stop: an empty text"),
        ({"seed": 2**63}, "seed: "),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Sampling(**{"temperature": 1, "top_p": 1, "max_new_tokens": 9} | values)
