"""Metrics against scikit-learn on the same answers, and against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as reference

from stages.common.measuring import metrics
from stages.common.measuring.metrics import (
    bootstrap_intervals,
    calibration_bins,
    confusion_matrix,
    decision_scores,
    per_label_scores,
    probability_scores,
    two_class_scores,
)
from stages.common.measuring.ranking import choose_threshold, operating_points, ranking_scores, scores_at_recall


def random_answers(rows: int, labels: int, seed: int, with_invalid: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True codes, predicted codes (`labels` for an invalid answer) and probabilities that are worth something."""
    generator = np.random.default_rng(seed)
    actual = generator.integers(0, labels, rows)
    logits = generator.normal(size=(rows, labels))
    logits[np.arange(rows), actual] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    if with_invalid:
        predicted[generator.random(rows) < 0.1] = labels
    return actual, predicted, probabilities


@pytest.mark.parametrize("labels", [2, 3, 77])
@pytest.mark.parametrize("with_invalid", [False, True])
def test_decision_scores_are_those_of_scikit_learn(labels: int, with_invalid: bool) -> None:
    actual, predicted, _ = random_answers(1_000, labels, 0, with_invalid)
    scores = decision_scores(confusion_matrix(actual, predicted, labels))
    names = list(range(labels))
    assert scores["accuracy"] == pytest.approx(reference.accuracy_score(actual, predicted), abs=1e-12)
    for average in ("micro", "macro"):
        expected = reference.f1_score(actual, predicted, labels=names, average=average, zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
    for name, function in (("precision", reference.precision_score), ("recall", reference.recall_score)):
        expected = function(actual, predicted, labels=names, average="macro", zero_division=0)
        assert scores[f"{name}_macro"] == pytest.approx(expected, abs=1e-12)
    assert scores["invalid_rate"] == pytest.approx(np.mean(predicted == labels))


@pytest.mark.parametrize("labels", [2, 77])
def test_scores_of_each_label_are_those_of_scikit_learn(labels: int) -> None:
    actual, predicted, _ = random_answers(300, labels, 1, with_invalid=True)
    expected = reference.precision_recall_fscore_support(actual, predicted, labels=list(range(labels)), zero_division=0)
    for ours, theirs in zip(per_label_scores(confusion_matrix(actual, predicted, labels)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_decision_scores_agree_with_a_case_worked_by_hand() -> None:
    # actual 0 0 0 1 1 2, predicted 0 0 1 1 invalid 0.
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 0]), 3)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    scores = decision_scores(matrix)
    assert scores["accuracy"] == 3 / 6
    # Label 0: precision 2/3, recall 2/3, F1 2/3. Label 1: 1/2, 1/2, 1/2. Label 2, never predicted: 0, 0, 0.
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # 3 right of 5 valid answers, 3 of 6 rows: F1 = 2 * 3 / (5 + 6).
    assert scores["f1_micro"] == pytest.approx(6 / 11)
    assert scores["invalid_rate"] == pytest.approx(1 / 6)


def test_every_row_is_in_the_confusion_matrix_even_when_no_answer_is_valid() -> None:
    matrix = confusion_matrix(np.array([0, 1, 1]), np.array([2, 2, 2]), 2)
    assert matrix.sum() == 3
    scores = decision_scores(matrix)
    assert scores == {
        "accuracy": 0,
        "f1_micro": 0,
        "f1_macro": 0,
        "precision_macro": 0,
        "recall_macro": 0,
        "invalid_rate": 1,
    }


def test_a_label_without_rows_and_answers_counts_as_zero_in_the_macro_average() -> None:
    matrix = confusion_matrix(np.array([0, 1]), np.array([0, 1]), 3)
    assert decision_scores(matrix)["f1_macro"] == pytest.approx(2 / 3)


def test_one_row_is_enough() -> None:
    matrix = confusion_matrix(np.array([1]), np.array([1]), 2)
    assert decision_scores(matrix)["accuracy"] == 1
    assert bootstrap_intervals(matrix, 100, 0)["accuracy_low"] == 1
    scores = probability_scores(np.array([1]), np.array([[0.25, 0.75]]), 10)
    # log loss -ln 0.75; Brier 0.25^2 + 0.25^2; one bin with confidence 0.75 and accuracy 1.
    assert scores == pytest.approx({"log_loss": -math.log(0.75), "brier": 0.125, "ece": 0.25})


def test_the_four_counts_of_two_labels_sum_to_n_and_invalid_answers_are_wrong_ones() -> None:
    # Positive is 1. Positive rows: 3 found, 1 missed, 1 invalid. Negative rows: 2 right, 1 wrong, 2 invalid.
    matrix = np.array([[2, 1, 2], [1, 3, 1]])
    scores = two_class_scores(matrix, positive=1)
    expected = {"tp": 3, "fp": 3, "tn": 2, "fn": 2, "precision": 3 / 6, "recall": 3 / 5, "specificity": 2 / 5}
    # Of 3 in 5, from tables of Clopper & Pearson: .147 and .947.
    assert scores == pytest.approx(expected | {"recall_low": 0.14663, "recall_high": 0.94726}, abs=1e-5)
    assert decision_scores(matrix)["accuracy"] == (scores["tp"] + scores["tn"]) / matrix.sum()


def test_rates_of_two_labels_are_those_of_scikit_learn_and_zero_without_rows() -> None:
    actual, predicted, _ = random_answers(200, 2, 3, with_invalid=False)
    scores = two_class_scores(confusion_matrix(actual, predicted, 2), positive=0)
    assert scores["precision"] == pytest.approx(reference.precision_score(actual, predicted, pos_label=0))
    assert scores["recall"] == pytest.approx(reference.recall_score(actual, predicted, pos_label=0))
    assert scores["specificity"] == pytest.approx(reference.recall_score(actual, predicted, pos_label=1))
    assert two_class_scores(np.array([[0, 0, 0], [0, 4, 0]]), positive=0)["recall"] == 0


@pytest.mark.parametrize("labels", [2, 3, 77])
def test_log_loss_and_brier_are_those_of_scikit_learn(labels: int) -> None:
    actual, _, probabilities = random_answers(500, labels, 2, with_invalid=False)
    probabilities[0] = np.eye(labels)[(actual[0] + 1) % labels]  # sure and wrong: clipped, not infinite
    scores = probability_scores(actual, probabilities, 10)
    names = list(range(labels))
    assert scores["log_loss"] == pytest.approx(reference.log_loss(actual, probabilities, labels=names))
    if labels == 2:  # scikit-learn halves the sum for two labels, Brier (1950) does not
        assert scores["brier"] == pytest.approx(2 * reference.brier_score_loss(actual, probabilities[:, 1]))
    else:
        expected = reference.brier_score_loss(actual, probabilities, labels=names, scale_by_half=False)
        assert scores["brier"] == pytest.approx(expected)


def test_calibration_error_agrees_with_a_case_worked_by_hand() -> None:
    # Five bins: 0.55 and 0.6 lie in (0.4, 0.6], 0.9 and 1.0 in (0.8, 1.0]; right, wrong, right, right.
    probabilities = np.array([[0.55, 0.45], [0.6, 0.4], [0.1, 0.9], [1.0, 0.0]])
    actual = np.array([0, 1, 1, 0])
    # |1/2 - 0.575| * 2/4 + |1 - 0.95| * 2/4 = 0.0375 + 0.025
    assert probability_scores(actual, probabilities, 5)["ece"] == pytest.approx(0.0625)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_zero_to_the_first() -> None:
    bins = calibration_bins(np.array([0.0, 0.5, 0.51, 1.0]), np.array([False, True, True, True]), 2)
    assert bins.number.tolist() == [0, 1]
    assert bins.rows.tolist() == [2, 2]
    assert bins.accuracy.tolist() == [0.5, 1]


def test_ranking_scores_are_those_of_scikit_learn_also_with_ties() -> None:
    actual, _, probabilities = random_answers(400, 2, 4, with_invalid=False)
    scores = probabilities[:, 1].round(1)
    ranked = ranking_scores(actual == 1, scores)
    assert ranked["roc_auc"] == pytest.approx(reference.roc_auc_score(actual, scores))
    assert ranked["pr_auc"] == pytest.approx(reference.average_precision_score(actual, scores))


def test_work_saved_over_sampling_agrees_with_cases_worked_by_hand() -> None:
    # 100 rows, 20 positive, ranked perfectly: 19 of 20 are 95 %, so 81 rows need no reading: 0.81 - 0.05.
    positive = np.arange(100) < 20
    assert ranking_scores(positive, -np.arange(100.0))["wss_at_95"] == pytest.approx(0.76)
    # One score for all: everything has to be read.
    assert ranking_scores(positive, np.full(100, 0.3))["wss_at_95"] == pytest.approx(-0.05)


def test_reading_from_the_top_until_a_recall_is_reached_agrees_with_a_case_worked_by_hand() -> None:
    # Positive rows at places 1, 2, 4, 7 of 10. Half of them: 2 read, 8/10 saved against 1/2. All: 7 read.
    positive = np.isin(np.arange(1, 11), [1, 2, 4, 7])
    falling = -np.arange(10.0)
    half, everything = (scores_at_recall(positive, falling, recall) for recall in (0.5, 1.0))
    assert half == pytest.approx({"wss_at_recall": 0.8 - 0.5, "precision_at_recall": 1.0})
    assert everything == pytest.approx({"wss_at_recall": 0.3, "precision_at_recall": 4 / 7})
    # 0.6 of 4 is 2.4: the third has to be found.
    assert scores_at_recall(positive, falling, 0.6)["precision_at_recall"] == 3 / 4


def test_rows_of_one_score_are_read_together_and_without_positive_rows_there_is_nothing_to_reach() -> None:
    positive = np.arange(100) < 20
    # Everything is read: nothing saved, less than what leaving out 5 % at random would have.
    expected = {"wss_at_recall": -0.05, "precision_at_recall": 0.2}
    assert scores_at_recall(positive, np.full(100, 0.3), 0.95) == pytest.approx(expected)
    ties = scores_at_recall(np.array([True, False, True]), np.array([0.5, 0.5, 0.1]), 0.5)
    assert ties == pytest.approx({"wss_at_recall": 1 / 3 - 0.5, "precision_at_recall": 0.5})
    assert scores_at_recall(np.zeros(3, bool), np.arange(3.0), 0.9) == {}
    assert scores_at_recall(np.ones(2, bool), np.arange(2.0), 0.5) == {"wss_at_recall": 0, "precision_at_recall": 1}


def test_work_saved_at_95_is_the_number_for_that_recall() -> None:
    actual, _, probabilities = random_answers(400, 2, 4, with_invalid=False)
    scores = probabilities[:, 1]
    expected = scores_at_recall(actual == 1, scores, 0.95)["wss_at_recall"]
    assert ranking_scores(actual == 1, scores)["wss_at_95"] == pytest.approx(expected)


def test_ranking_scores_that_need_missing_rows_are_left_out() -> None:
    assert ranking_scores(np.array([False, False]), np.array([0.1, 0.2])) == {}
    assert set(ranking_scores(np.array([True, True]), np.array([0.1, 0.2]))) == {"pr_auc", "wss_at_95"}


def test_perfect_separation_has_perfect_scores() -> None:
    positive, scores = np.array([False, False, True]), np.array([0.0, 0.2, 1.0])
    assert ranking_scores(positive, scores) == pytest.approx({"roc_auc": 1, "pr_auc": 1, "wss_at_95": 2 / 3 - 0.05})
    assert choose_threshold(positive, scores, "max_f1") == 1.0


def test_operating_points_join_rows_of_one_score() -> None:
    thresholds, found, selected = operating_points(np.array([True, False, True, False]), np.array([0.5, 0.5, 0.9, 0.1]))
    assert thresholds.tolist() == [0.9, 0.5, 0.1]
    assert found.tolist() == [1, 2, 2]
    assert selected.tolist() == [1, 3, 4]


def test_the_best_f1_threshold_is_the_best_of_all_and_the_highest_of_equals() -> None:
    actual, _, probabilities = random_answers(200, 2, 5, with_invalid=False)
    scores = probabilities[:, 1].round(2)
    chosen = choose_threshold(actual == 1, scores, "max_f1")
    by_threshold = {value: reference.f1_score(actual, scores >= value) for value in np.unique(scores)}
    best = max(by_threshold.values())
    assert chosen == max(value for value, f1 in by_threshold.items() if f1 == pytest.approx(best, abs=1e-12))
    # From 0.9 on: 1 found of 1, F1 2/3. From 0.4 on: 2 found of 4, F1 4/6. Equal, so 0.9.
    positive = np.array([True, False, False, True])
    assert choose_threshold(positive, np.array([0.9, 0.8, 0.7, 0.4]), "max_f1") == 0.9


def test_the_recall_threshold_is_the_highest_that_reaches_the_recall() -> None:
    positive = np.array([True] * 10 + [False] * 2)
    scores = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.95, 0.35])
    # 7 of 10 positive rows have 0.4 or more, and the two others do not lower recall.
    assert choose_threshold(positive, scores, "recall", 0.7) == 0.4
    assert choose_threshold(positive, scores, "recall", 1.0) == 0.1


def test_the_bootstrap_of_cells_has_the_intervals_of_a_bootstrap_of_rows() -> None:
    actual, predicted, _ = random_answers(300, 2, 6, with_invalid=True)
    found = bootstrap_intervals(confusion_matrix(actual, predicted, 2), 3_000, 0)
    generator = np.random.default_rng(1)
    values = []
    for _ in range(3_000):
        rows = generator.integers(0, 300, 300)
        matrix = confusion_matrix(actual[rows], predicted[rows], 2)
        scores = decision_scores(matrix)
        values.append((scores["accuracy"], scores["f1_macro"], scores["recall_macro"]))
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    for index, name in enumerate(("accuracy", "f1_macro", "recall_macro")):
        # The quantiles' own sampling error is about 0.002 here.
        assert found[f"{name}_low"] == pytest.approx(low[index], abs=0.008)
        assert found[f"{name}_high"] == pytest.approx(high[index], abs=0.008)


def test_the_interval_of_accuracy_is_the_binomials() -> None:
    # 80 % of 400 rows: the normal approximation gives 0.8 +- 1.96 * sqrt(0.8 * 0.2 / 400) = 0.8 +- 0.0392.
    found = bootstrap_intervals(np.array([[160, 40, 0], [40, 160, 0]]), 4_000, 0)
    assert found["accuracy_low"] == pytest.approx(0.7608, abs=0.005)
    assert found["accuracy_high"] == pytest.approx(0.8392, abs=0.005)


def test_intervals_cover_the_truth_about_as_often_as_they_promise() -> None:
    generator = np.random.default_rng(0)
    shares = np.array([[0.30, 0.08, 0.02], [0.10, 0.45, 0.05]])
    covered = 0
    for seed in range(200):
        matrix = generator.multinomial(200, shares.ravel()).reshape(2, 3)
        found = bootstrap_intervals(matrix, 200, seed)
        covered += found["accuracy_low"] <= 0.75 <= found["accuracy_high"]
    # 95 % of 200 is 190, with a standard deviation of 3.
    assert 180 <= covered <= 199


def test_the_seed_decides_the_intervals() -> None:
    matrix = np.array([[50, 10, 0], [5, 35, 0]])
    assert bootstrap_intervals(matrix, 200, 7) == bootstrap_intervals(matrix, 200, 7)
    assert bootstrap_intervals(matrix, 200, 7) != bootstrap_intervals(matrix, 200, 8)


def test_the_intervals_of_a_seed_stay_what_they_were_before_macro_recall_had_one() -> None:
    # Written down from the version without recall_macro_low and recall_macro_high: no draw may be added or moved.
    found = bootstrap_intervals(np.array([[50, 10, 0], [5, 35, 0]]), 200, 7)
    expected = {
        "accuracy_low": 0.79,
        "accuracy_high": 0.91,
        "f1_macro_low": 0.7801944141767506,
        "f1_macro_high": 0.9095622686502206,
    }
    assert {name: found[name] for name in expected} == expected
    assert set(found) - set(expected) == {"recall_macro_low", "recall_macro_high"}


def test_the_bootstrap_draws_the_same_however_many_resamples_it_holds_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actual, predicted, _ = random_answers(500, 20, 0, with_invalid=True)
    matrix = confusion_matrix(actual, predicted, 20)
    whole = bootstrap_intervals(matrix, 300, 7)
    # Three resamples at a time, then one, as where there are very many labels.
    for cells in (3 * matrix.size, 1):
        monkeypatch.setattr(metrics, "RESAMPLED_CELLS", cells)
        assert bootstrap_intervals(matrix, 300, 7) == whole
