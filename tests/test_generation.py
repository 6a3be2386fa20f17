"""Greedy answers against one full forward pass for each token, and the label that an answer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from stages.common.labels import INVALID
from stages.common.scoring.generation import generate_answers, match_label
from tests.sharp import greedy, sharp_model
from tests.split_files import TERMINATOR
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def model(base_folder: Path) -> Any:
    return sharp_model(base_folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Five prompts; the longest is neither first nor last, so that sorting by length shows."""
    texts = [f"Tweet: {'what a nice day ' * (1 + row * 3 % 5)}{row}\nSentiment:" for row in range(5)]
    return [tokenizer.encode(text).ids for text in texts]


def test_generation_is_greedy_in_batches_of_any_size(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    expected = [tokenizer.decode(greedy(model, prompt, 6)) for prompt in prompts]
    assert len(set(expected)) > 1
    # What a hub model may bring along must not change a greedy answer.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    for tokens_per_batch in (1, 10_000):
        assert generate_answers(model, tokenizer, prompts, [TERMINATOR], 6, tokens_per_batch) == expected


def test_generation_stops_at_each_terminator(model: Any, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    answers = [greedy(model, prompt, 6) for prompt in prompts]
    terminators = [answers[2][3], answers[4][2], TERMINATOR]
    expected = []
    for answer in answers:
        end = next((index for index, token in enumerate(answer) if token in terminators), 6)
        expected.append(tokenizer.decode(answer[:end]))
    assert expected[2] != tokenizer.decode(answers[2]) and expected[4] != tokenizer.decode(answers[4])
    assert generate_answers(model, tokenizer, prompts, terminators, 6, 10_000) == expected


def test_progress_is_told_and_no_prompts_give_no_answers(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    told: list[int] = []
    generate_answers(model, tokenizer, prompts, [TERMINATOR], 6, 100, told.append)
    assert sum(told) == 5 and len(told) > 1
    assert generate_answers(model, tokenizer, [], [TERMINATOR], 6, 100) == []


@pytest.mark.parametrize(
    ("answer", "prediction"),
    [
        ("cat", "cat"),
        (" cat\n", "cat"),
        ("catfish", "catfish"),
        ("", INVALID),
        ("   ", INVALID),
        ("ca", INVALID),
        ("Cat", INVALID),
        ("cat.", INVALID),
        ("cat catfish", INVALID),
        ("it is a cat", INVALID),
        (INVALID, INVALID),
    ],
)
def test_only_a_whole_label_counts_as_an_answer(answer: str, prediction: str) -> None:
    assert match_label(answer, ["cat", "catfish"]) == prediction
