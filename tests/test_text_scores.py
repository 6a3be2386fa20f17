"""Scores of generated texts are those of the packages that define them, and make sense beyond English."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
from scipy import stats

from stages.common.measuring.text_scores import per_row_scores, score_rows, squad_words, text_scores, words

# Reference, answer, ROUGE-L F1 by rouge_score 0.1.2 (RougeScorer(["rougeL"])), F1 and exact match by torchmetrics 1.9.0
# (functional.text.squad, divided by 100); 20,000 random texts of words, articles, signs and white space agreed as well.
PUBLISHED = [
    ("The cat sat on the mat.", "the cat lay on the mat", 0.833333, 0.75, 0),
    (
        "Insulin lowers blood-sugar levels; it isn't a cure!", "It is not a cure, but insulin lowers blood sugar.",
        0.4, 0.5, 0,
    ),
    ("A an the", "the", 0.5, 1, 1),
    ("one two three four five", "five four three two one", 0.2, 1, 0),
    ("1,000 mg twice a day", "1000 mg, two times daily", 0.181818, 0.444444, 0),
    ("yes", "no", 0, 0, 0),
    ("", "", 0, 1, 1),
    ("something", "", 0, 0, 0),
    ("...", "!!!", 0, 1, 1),
    ("snake_case x=1;\ty=2", "snake case X = 1 and y=2", 0.923077, 0.222222, 0),
    (
        "It depends on the dose: small doses help and large doses harm.",
        "It depends. Small doses of it help, it depends on the dose.", 0.416667, 0.636364, 0,
    ),
]  # fmt: skip


def test_scores_of_english_are_those_of_rouge_score_and_torchmetrics() -> None:
    references, answers, rouge_l, token_f1, exact = zip(*PUBLISHED, strict=True)
    rows = score_rows(references, answers)
    assert np.allclose(rows.rouge_l, rouge_l, atol=1e-6)
    assert np.allclose(rows.token_f1, token_f1, atol=1e-6)
    # torchmetrics compares the words in order: the reversed sentence has an F1 of 1 and is no exact match.
    assert rows.exact_match.tolist() == list(exact)
    found_f1, found_rouge = per_row_scores(references, answers)
    assert (found_f1 == rows.token_f1).all()
    assert (found_rouge == rows.rouge_l).all()


def test_one_letter_beyond_ascii_changes_nothing_for_the_other_words() -> None:
    # Texts in ASCII take a shortcut, texts with any other sign do not; both are to be the same rule.
    for reference, answer, *_ in PUBLISHED:
        for text in (reference, answer):
            assert words(text + " é") == [*words(text), "é"]
            assert squad_words(text + " é") == [*squad_words(text), "é"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Привет, МИР!", ["привет", "мир"]),
        ("Café – “naïve”", ["café", "naïve"]),
        ("Cafe\u0301", ["café"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("今天很好。The 天", ["今", "天", "很", "好", "the", "天"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("💊 ✓", []),
    ],
)
def test_words_of_other_languages_count(text: str, expected: list[str]) -> None:
    # rouge_score keeps a-z and 0-9 alone, and would find "caf" and "na" here and nothing in most others.
    assert words(text) == expected


def test_squad_words_of_other_languages_lose_their_punctuation_and_are_split_where_there_are_no_spaces() -> None:
    assert squad_words("Das «ist» der Fall – “the” end… a 5 %") == ["das", "ist", "der", "fall", "end", "5"]
    assert squad_words("每天两次，一次5毫克。") == [*"每天两次一次", "5", *"毫克"]
    token_f1, rouge_l = per_row_scores(["每天两次"], ["每天一次"])
    assert (token_f1[0], rouge_l[0]) == (0.75, 0.75)


def test_perplexity_is_pooled_over_tokens() -> None:
    # exp(-(ln .5 * 2 + ln .1 * 8) / 10), not the mean of 2 and 10.
    likelihoods, tokens = np.array([2 * math.log(0.5), 8 * math.log(0.1)]), np.array([2, 8])
    scores = text_scores(["a b", "c d"], ["a b", "d"], likelihoods, tokens, 100, 0)
    assert scores["perplexity"] == pytest.approx(math.exp(-(2 * math.log(0.5) + 8 * math.log(0.1)) / 10))
    assert scores["perplexity_low"] == pytest.approx(2)
    assert scores["perplexity_high"] == pytest.approx(10)
    assert not {"perplexity", "perplexity_low"} & set(text_scores(["a"], ["a"], None, None, 100, 0))


def test_a_model_that_is_sure_of_nothing_right_has_a_finite_perplexity() -> None:
    scores = text_scores(["a"], ["b"], np.array([-1e6]), np.array([2]), 100, 0)
    assert all(map(math.isfinite, scores.values()))
    assert scores["perplexity"] == math.exp(700)


def test_repetition_lengths_and_empty_answers_are_counted_over_all_answers() -> None:
    # The first has 5 runs of four words, 2 of which (x x x x) occur before; the second has 1, the others have none.
    references, answers = ["a b c", "d", "", "e"], ["x x x x x x b c", "One, two; three four", " \n", "..."]
    scores = text_scores(references, answers, None, None, 100, 0)
    assert scores["repetition_rate"] == pytest.approx(2 / 6)
    assert scores["answer_words"] == (8 + 4) / 4
    assert scores["reference_words"] == 5 / 4
    assert scores["empty_rate"] == 1 / 4
    assert text_scores(["a"], ["b"], None, None, 100, 0)["repetition_rate"] == 0


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    randomness = random.Random(0)
    answers = [randomness.choice(["yes", "no", "yes indeed"]) for _ in range(300)]
    references = ["yes"] * 300
    likelihoods = np.array([-randomness.expovariate(0.1) for _ in answers])
    tokens = np.array([randomness.randint(1, 40) for _ in answers])
    scores = text_scores(references, answers, likelihoods, tokens, 4000, 1)
    token_f1, rouge_l = per_row_scores(references, answers)
    statistics = {
        "token_f1": ((token_f1,), lambda values, axis: values.mean(axis=axis)),
        "rouge_l": ((rouge_l,), lambda values, axis: values.mean(axis=axis)),
        "perplexity": (
            (likelihoods, tokens),
            lambda values, counts, axis: np.exp(-values.sum(axis=axis) / counts.sum(axis=axis)),
        ),
    }
    for name, (data, statistic) in statistics.items():
        expected = stats.bootstrap(
            data, statistic, n_resamples=4000, method="percentile", paired=True, vectorized=True,
            rng=np.random.default_rng(2),
        ).confidence_interval  # fmt: skip
        width = expected.high - expected.low
        assert abs(scores[f"{name}_low"] - expected.low) < 0.08 * width
        assert abs(scores[f"{name}_high"] - expected.high) < 0.08 * width
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]


def test_the_same_seed_gives_the_same_numbers() -> None:
    references, answers = ["a b", "c d", "e"], ["a", "d c", "e"]
    first = text_scores(references, answers, None, None, 200, 3)
    assert text_scores(references, answers, None, None, 200, 3) == first
    assert list(first) == [
        "rouge_l", "token_f1", "exact_match", "answer_words", "reference_words", "repetition_rate", "empty_rate",
        "rouge_l_low", "rouge_l_high", "token_f1_low", "token_f1_high",
    ]  # fmt: skip


def test_long_answers_take_milliseconds() -> None:
    # The textbook's table of 1,000 x 1,000 cells takes half a second in Python; here it is bits of machine words.
    randomness = random.Random(0)
    texts = [" ".join(f"w{randomness.randrange(2000)}" for _ in range(1000)) for _ in range(100)]
    start = time.process_time()
    per_row_scores(texts, texts[::-1])
    assert time.process_time() - start < 2
