"""Two labels of which one must not be missed: the promised recall, slices, what is left to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta, binomtest, norm

from stages import evaluate
from stages.common.errors import UserError
from stages.common.labels import INVALID
from stages.common.measuring.answers import Answers
from stages.common.measuring.metrics import confusion_matrix, exact_interval
from stages.common.measuring.reading_list import rows_in_order
from stages.common.measuring.slices import label_scores, screening_scores, slice_rows
from stages.common.measuring.thresholds import (
    label_threshold,
    positives_needed,
    promised_threshold,
    recall_lower_bound,
)
from stages.common.schema.measuring import RecallThreshold
from tests.evaluated import Work, finite_numbers_only

PROMISE = {"method": "recall", "recall": 0.95, "confidence": 0.95}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Work]:
    monkeypatch.chdir(tmp_path)
    return lambda *labels, **options: Work(tmp_path, list(labels or ("exclude", "include")), **options)


# --- the promise ------------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], np.ndarray]
Recall = Callable[[float], float]


def rounded_normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.normal(size=count).round(1)


# How scores are drawn, and the share of all positive texts whose score is at least a threshold.
DISTRIBUTIONS: dict[str, tuple[Draw, Recall]] = {
    "normal": (lambda generator, count: generator.normal(size=count), norm.sf),
    "nearly all close to 1": (lambda generator, count: generator.beta(8, 0.3, count), beta(8, 0.3).sf),
    "two heaps": (
        lambda generator, count: generator.normal(size=count) + 6 * (generator.random(count) < 0.9),
        lambda threshold: 0.9 * norm.sf(threshold - 6) + 0.1 * norm.sf(threshold),
    ),
    # A rounded score is at least 0.3 when the score itself is at least 0.25.
    "many rows with one score": (rounded_normal, lambda threshold: norm.sf(threshold - 0.05)),
}


@pytest.mark.parametrize("positives", [60, 118, 400])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_promised_recall_is_met_as_often_as_promised_and_no_threshold_is_lower_than_it_must_be(
    distribution: str, positives: int
) -> None:
    draw, true_recall = DISTRIBUTIONS[distribution]
    generator, simulations = np.random.default_rng(positives), 2_000
    thresholds = [promised_threshold(draw(generator, positives), 0.95, 0.95) for _ in range(simulations)]
    kept = np.mean([true_recall(threshold) >= 0.95 for threshold in thresholds])
    # Three standard deviations of a share of 0.95 in 2,000 simulations: 0.0146.
    error = 3 * math.sqrt(0.95 * 0.05 / simulations)
    assert kept >= 0.95 - error
    if distribution != "many rows with one score":
        # Without ties the recall of the j-th score has the distribution Beta(j, P - j + 1) (Wilks 1941), so the promise
        # is kept just as often as that says; and with one score less it would be kept less often than promised.
        places = np.arange(1, positives + 1)
        exact = beta.sf(0.95, places, positives - places + 1)
        place = int(np.argmax(exact >= 0.95))
        assert kept == pytest.approx(exact[place], abs=error)
        assert place == 0 or exact[place - 1] < 0.95


def test_the_promise_holds_where_the_number_of_positive_rows_is_left_to_chance_too() -> None:
    generator, kept = np.random.default_rng(0), []
    for _ in range(2_000):
        truth = generator.random(1_000) < 0.12
        scores = generator.normal(size=1_000) + 2 * truth
        threshold = label_threshold("include", truth, scores, RecallThreshold.model_validate(PROMISE))
        kept.append(norm.sf(threshold - 2) >= 0.95)
    assert np.mean(kept) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2_000)


def test_the_threshold_is_the_highest_whose_clopper_pearson_bound_reaches_the_recall() -> None:
    generator = np.random.default_rng(0)
    for positives in (59, 60, 93, 250):
        scores = generator.random(positives)
        chosen = promised_threshold(scores, 0.95, 0.95)
        bounds = {
            value: binomtest(int((scores >= value).sum()), positives, alternative="greater")
            .proportion_ci(0.95, "exact")
            .low
            for value in scores
        }
        assert chosen == max(value for value, low in bounds.items() if low >= 0.95)


def test_with_59_positive_rows_all_have_to_be_found_and_with_93_one_may_be_missed() -> None:
    # The sample sizes of one-sided 95 %/95 % tolerance limits: 59 for the extreme, 93 for the next (Wilks 1941).
    falling = np.linspace(1, 0, 93)
    assert promised_threshold(falling[:59], 0.95, 0.95) == falling[58]
    assert promised_threshold(falling[:92], 0.95, 0.95) == falling[91]
    assert promised_threshold(falling, 0.95, 0.95) == falling[91]


@pytest.mark.parametrize(
    ("recall", "confidence", "needed"), [(0.95, 0.95, 59), (0.9, 0.95, 29), (0.99, 0.95, 299), (0.5, 0.75, 2)]
)
def test_as_many_positive_rows_are_needed_as_can_vouch_for_the_recall(
    recall: float, confidence: float, needed: int
) -> None:
    assert positives_needed(recall, confidence) == needed
    assert recall**needed <= 1 - confidence < recall ** (needed - 1)
    scores = np.arange(needed) / needed
    assert promised_threshold(scores, recall, confidence) == 0


def test_the_lower_bound_is_that_of_scipys_exact_interval() -> None:
    for found, positive in ((0, 7), (3, 7), (7, 7), (190, 200)):
        expected = binomtest(found, positive, alternative="greater").proportion_ci(0.9, "exact").low
        assert recall_lower_bound(found, positive, 0.9) == pytest.approx(expected, abs=1e-12)


def test_where_all_scores_are_equal_everything_is_selected() -> None:
    truth = np.arange(200) < 100
    threshold = label_threshold("include", truth, np.full(200, 0.5), RecallThreshold.model_validate(PROMISE))
    assert threshold == 0.5


def test_too_few_positive_rows_promise_nothing_and_the_message_says_how_many_are_needed(
    work: Callable[..., Work],
) -> None:
    work(rows=100, threshold=PROMISE)
    message = r"rows have the label 'include', too few .* recall of 0.95 with confidence 0.95: that needs 59\. Raise"
    with pytest.raises(UserError, match=message):
        evaluate.main()
    assert not Path("metrics").exists()


def test_the_decision_says_what_it_promises_and_test_uses_it(work: Callable[..., Work]) -> None:
    made = work(rows=300, threshold=PROMISE)
    evaluate.main()
    rule = made.json("models/decision.json")["adapter"]
    truth = np.array(made.split("validation")[1]) == "include"
    scores = made.probabilities("adapter", "validation")[:, 1]
    found, positive = int((scores[truth] >= rule["threshold"]).sum()), int(truth.sum())
    bound = binomtest(found, positive, alternative="greater").proportion_ci(0.95, "exact").low
    assert (rule["recall_promised"], rule["confidence"]) == (0.95, 0.95)
    assert rule["recall_lower_bound"] == pytest.approx(bound)
    assert rule["recall"] == found / positive > rule["recall_lower_bound"] >= 0.95
    selected = made.probabilities("adapter", "test")[:, 1] >= rule["threshold"]
    block = made.json("metrics/metrics.json")["adapter"]
    assert block["rows_selected"] == selected.sum() == block["tp"] + block["fp"]
    assert block["wss_at_recall"] == pytest.approx(block["wss_at_95"])
    # The majority has one probability for all rows, so all are to be read.
    majority = made.json("metrics/metrics.json")["majority"]
    assert (majority["rows_selected"], majority["recall"]) == (300, 1)
    assert majority["wss_at_recall"] == pytest.approx(-0.05)
    assert majority["precision_at_recall"] == pytest.approx(majority["tp"] / 300)


def test_numbers_at_a_recall_are_there_only_where_a_recall_is_wanted(work: Callable[..., Work]) -> None:
    made = work(threshold={"method": "recall", "recall": 0.8, "confidence": None})
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    positive = np.array(made.split("test")[1]) == "include"
    falling = positive[np.argsort(-made.probabilities("adapter", "test")[:, 1])]
    read = 1 + int(np.argmax(np.cumsum(falling) / falling.sum() >= 0.8))
    assert block["wss_at_recall"] == pytest.approx(1 - read / 120 - 0.2)
    assert block["precision_at_recall"] == pytest.approx(falling[:read].mean())
    assert "recall_promised" not in made.json("models/decision.json")["adapter"]
    made.edit_params(made.labels, {"threshold": {"method": "max_f1"}})
    evaluate.main()
    assert not {"wss_at_recall", "precision_at_recall"} & set(made.json("metrics/metrics.json")["adapter"])


def test_generated_answers_are_taken_as_they_are_and_nothing_is_promised_of_them(work: Callable[..., Work]) -> None:
    made = work(rows=300, threshold=PROMISE, slices=["one", "two"])
    made.write_generated("adapter", invalid=12)
    evaluate.main()
    assert made.json("models/decision.json")["adapter"] == {"rule": "answer"}
    block = made.json("metrics/metrics.json")["adapter"]
    assert not {"threshold", "wss_at_recall", "precision_at_recall"} & set(block)
    # Twelve invalid answers, which somebody has to read, and the rest is right.
    right = sum(label == "include" for label in made.split("test")[1][12:])
    assert block["rows_selected"] == right + 12
    assert sum(slice_["rows_selected"] for slice_ in block["per_slice"].values()) == right + 12
    assert made.reading_list() == []
    assert {row["adapter"] for row in made.examples()} == {INVALID}
    assert finite_numbers_only(block)


# --- slices -----------------------------------------------------------------------------------------------------------


def test_each_slice_has_the_numbers_of_its_rows(work: Callable[..., Work]) -> None:
    made = work(rows=200, slices=["statins", "asthma", "asthma"])
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    assert list(block["per_slice"]) == ["asthma", "statins"]
    rows = np.arange(200) % 3 == 0
    actual = np.array(made.split("test")[1])[rows] == "include"
    decided = made.probabilities("adapter", "test")[rows, 1] >= block["threshold"]
    found, support = int((actual & decided).sum()), int(actual.sum())
    interval = binomtest(found, support).proportion_ci(0.95, "exact")
    assert block["per_slice"]["statins"] == pytest.approx(
        {
            "n": 67,
            "support": support,
            "recall": found / support,
            "recall_low": interval.low,
            "recall_high": interval.high,
            "precision": found / decided.sum(),
            "rows_selected": decided.sum(),
        }
    )
    for name in ("n", "rows_selected"):
        assert sum(slice_[name] for slice_ in block["per_slice"].values()) == block[name]


def test_without_slices_there_are_no_numbers_of_slices(work: Callable[..., Work]) -> None:
    made = work()
    evaluate.main()
    assert "per_slice" not in made.json("metrics/metrics.json")["adapter"]


def test_a_slice_of_several_labels_has_accuracy_and_macro_f1(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c", slices=["one", "two"])
    evaluate.main()
    found = made.json("metrics/metrics.json")["adapter"]["per_slice"]
    likeliest = made.probabilities("adapter", "test").argmax(axis=1)
    right = np.array(made.labels)[likeliest] == np.array(made.split("test")[1])
    assert set(found["one"]) == {"n", "accuracy", "f1_macro"}
    assert found["one"]["accuracy"] == pytest.approx(right[::2].mean())
    # actual 0 0 1, predicted 0 1 1, and nothing is about label 2: (2/3 + 2/3) / 2.
    by_hand = label_scores(confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 3))
    assert by_hand == pytest.approx({"n": 3, "accuracy": 2 / 3, "f1_macro": 2 / 3})


def test_a_slice_without_positive_rows_has_no_recall_and_one_without_selected_rows_no_precision() -> None:
    # Positive is 1. Rows: three negative, one of them selected and one invalid.
    no_positive = screening_scores(np.array([[1, 1, 1], [0, 0, 0]]), 1)
    assert no_positive == {"n": 3, "support": 0, "precision": 0, "rows_selected": 2}
    nothing_selected = screening_scores(np.array([[2, 0, 0], [1, 0, 0]]), 1)
    assert set(nothing_selected) == {"n", "support", "recall", "recall_low", "recall_high", "rows_selected"}
    assert (nothing_selected["recall"], nothing_selected["recall_low"]) == (0, 0)
    # All positive and all found: the interval ends at 1 and begins at 0.025 ** (1 / 5).
    all_found = screening_scores(np.array([[0, 0, 0], [0, 5, 0]]), 1)
    assert all_found["recall_low"] == pytest.approx(0.025 ** (1 / 5))
    assert (all_found["recall"], all_found["recall_high"], all_found["precision"]) == (1, 1, 1)


def test_the_exact_interval_is_scipys() -> None:
    for found, total in ((0, 1), (1, 1), (0, 30), (17, 30), (30, 30), (828, 1000)):
        expected = binomtest(found, total).proportion_ci(0.95, "exact")
        assert exact_interval(found, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rows_without_a_slice_are_in_none() -> None:
    found = slice_rows(["b", None, "a", "b"])
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [2], "b": [0, 3]}
    assert list(found) == ["a", "b"]
    assert slice_rows([None, None]) == {}


# --- what people read -------------------------------------------------------------------------------------------------


def test_the_reading_list_has_all_test_rows_by_falling_probability(work: Callable[..., Work]) -> None:
    made = work(rows=200, slices=["statins", "asthma"])
    evaluate.main()
    listed = made.reading_list()
    assert list(listed[0]) == ["rank", "id", "slice", "probability", "selected"]
    assert [row["rank"] for row in listed] == [str(rank) for rank in range(1, 201)]
    scores = dict(zip(made.split("test")[0], made.probabilities("adapter", "test")[:, 1], strict=True))
    assert sorted(scores, key=lambda row: -scores[row]) == [row["id"] for row in listed]
    assert [float(row["probability"]) for row in listed] == [scores[row["id"]] for row in listed]
    assert all(row["slice"] == ("statins", "asthma")[int(row["id"].removeprefix("test-")) % 2] for row in listed)
    selected = [row["selected"] == "true" for row in listed]
    assert sum(selected) == made.json("metrics/metrics.json")["adapter"]["rows_selected"]
    assert selected == sorted(selected, reverse=True)


def test_rows_of_one_probability_keep_their_order_in_the_reading_list() -> None:
    probabilities = np.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])
    answers = Answers(["a", "b", "c"], np.array([0, 1, 1]), np.array([0, 1, 0]), probabilities)
    assert rows_in_order(answers, 1, [None, "x", None]) == [
        (1, "b", "x", 0.9, "true"), (2, "a", None, 0.5, "false"), (3, "c", None, 0.5, "false"),
    ]  # fmt: skip


def test_with_more_labels_the_reading_list_is_its_header_alone(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    assert (made.folder / "data/reading_list.csv").read_text() == "rank,id,slice,probability,selected\n"


def test_the_examples_are_the_surest_mistakes_with_their_texts_and_both_answers(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    examples, listed = made.examples(), made.csv("misclassified")
    assert list(examples[0]) == ["id", "text", "label", "adapter", "base"]
    for key, other in (("id", "id"), ("label", "label"), ("adapter", "prediction")):
        assert [row[key] for row in examples] == [row[other] for row in listed]
    base = made.probabilities("base", "test").argmax(axis=1)
    for row in examples:
        assert row["text"] == f"secret text of {row['id']}"
        assert row["base"] == made.labels[base[int(row["id"].removeprefix("test-"))]]


def test_without_mistakes_there_are_no_examples(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    for part in ("validation", "test"):
        made.write("adapter", part, np.eye(3)[[made.labels.index(label) for label in made.split(part)[1]]])
    evaluate.main()
    assert made.examples() == made.csv("misclassified") == []
    assert made.json("metrics/metrics.json")["adapter"]["accuracy"] == 1
