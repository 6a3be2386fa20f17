"""Paired statistics: agreement with scipy, statsmodels, scikit-learn, cases worked by hand, and how often they err."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as reference
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from review import label_sets, labels, texts
from review.changes import Change
from review.decisions import Cells, decision_values, joint_cells, permuted_decisions
from review.differences import take
from review.rankings import rank, resampled_rankings
from review.statistics import (
    holm,
    mcnemar_exact,
    noise_limit,
    percentile_interval,
    permutation_count,
    permutation_p,
    resample_count,
    resampled_rows,
    sign_flip_p,
    swaps,
)
from review.verdicts import BETTER, NOISE, SAME, SIGNIFICANT, WORSE, direction, verdict
from stages.common.measuring import multi_label, single_label
from stages.common.measuring.answers import Answers, LabelSets, Texts
from stages.common.measuring.metrics import confusion_matrix, decision_scores, per_label_scores, two_class_scores
from stages.common.measuring.text_scores import text_scores
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import ClassificationTask, GenerationTask

THREE, TWO = ["a", "b", "c"], ["no", "yes"]


def task_of(names: list[str], multi_label: bool = False) -> ClassificationTask:
    positive = names[1] if len(names) == 2 and not multi_label else None
    return ClassificationTask(
        kind="classification", multi_label=multi_label, labels=names, label_descriptions=None, positive_label=positive
    )


def evaluate_of(samples: int = 200, seed: int = 0, threshold: object = None) -> Evaluate:
    return Evaluate.model_validate(
        {
            "seed": seed,
            "bootstrap_samples": samples,
            "calibration_bins": 10,
            "threshold": threshold,
            "publish_texts": False,
        }
    )


def answers(actual: np.ndarray, strength: float, generator: np.random.Generator, k: int = 3) -> Answers:
    """Answers whose probabilities lean towards the truth; each side draws its own noise."""
    logits = generator.normal(size=(len(actual), k))
    logits[np.arange(len(actual)), actual] += strength
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = [str(row) for row in range(len(actual))]
    return Answers(ids, actual, probabilities.argmax(axis=1), probabilities)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (0, 5), (1, 6), (12, 5), (7, 7), (200, 240), (3_000, 2_800)])
def test_mcnemars_test_is_that_of_statsmodels_and_the_binomial_test_of_scipy(fixed: int, broken: int) -> None:
    found = mcnemar_exact(fixed, broken)
    assert found == pytest.approx(mcnemar([[40, broken], [fixed, 9]], exact=True).pvalue, rel=1e-9)
    if fixed + broken:
        assert found == pytest.approx(scipy.stats.binomtest(fixed, fixed + broken, 0.5).pvalue, rel=1e-9)


def test_mcnemars_test_agrees_with_a_case_worked_by_hand() -> None:
    # At most 1 of 7 coins: (1 + 7) / 128, twice.
    assert mcnemar_exact(1, 6) == mcnemar_exact(6, 1) == pytest.approx(16 / 128)
    assert mcnemar_exact(0, 0) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 5, 77])
def test_holms_correction_is_that_of_statsmodels(count: int) -> None:
    p_values = np.random.default_rng(count).random(count) ** 3
    expected = multipletests(p_values, method="holm")[1] if count else p_values
    np.testing.assert_allclose(holm(p_values), expected, atol=1e-12)


def test_holms_correction_agrees_with_a_case_worked_by_hand() -> None:
    # Rising: .005 * 4, .01 * 3, .03 * 2, and .04 * 1, which must not be below the one before it.
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_the_test_of_means_is_scipys_permutation_test() -> None:
    differences = np.random.default_rng(3).normal(0.3, 1, 10).round(2)
    exact = scipy.stats.permutation_test(
        (differences, np.zeros(10)), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=2_000
    )  # all 2^10 sign patterns
    # 10,000 permutations: a standard error of 0.005 at most.
    assert sign_flip_p(differences[:, None], 0)[0] == pytest.approx(exact.pvalue, abs=0.02)


def test_the_test_of_macro_f1_gives_the_share_of_all_swaps_that_are_as_far() -> None:
    generator = np.random.default_rng(5)
    actual = np.repeat([0, 1, 2], 10)
    before, after = (
        np.where(generator.random(30) < right, actual, generator.integers(0, 3, 30)) for right in (0.5, 0.9)
    )
    differ = np.flatnonzero(before != after)
    assert 5 < len(differ) < 16
    macro = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
    observed = abs(reference.f1_score(actual, after, **macro) - reference.f1_score(actual, before, **macro))
    as_far = 0
    for pattern in itertools.product([False, True], repeat=len(differ)):
        swapped = differ[list(pattern)]
        one, other = before.copy(), after.copy()
        one[swapped], other[swapped] = after[swapped], before[swapped]
        scores = [per_label_scores(confusion_matrix(actual, side, 3)).f1.mean() for side in (one, other)]
        as_far += abs(scores[1] - scores[0]) >= observed - 1e-12
    cells = joint_cells(Answers([], actual, before, None), Answers([], actual, after, None), 3)
    found = permuted_decisions(cells, task_of(THREE), seed=0)[0]["f1_macro"]
    assert found == pytest.approx(as_far / 2 ** len(differ), abs=0.02)


def test_a_p_value_is_never_zero_and_ties_count_against_it() -> None:
    permuted = np.array([[0.3], [-0.5], [0.5 + 1e-15], [0.1]])
    # 2 of 4 are at least as far as 0.5; with the observed one 3 of 5.
    assert permutation_p(np.array([0.5]), [permuted[:3], permuted[3:]])[0] == pytest.approx(3 / 5)
    assert permutation_p(np.array([9.0]), [permuted])[0] == pytest.approx(1 / 5)


def test_swaps_of_equal_rows_are_those_of_the_rows_one_by_one() -> None:
    grouped = np.concatenate(list(swaps(np.array([4]), 0)))[:, 0]
    single = np.concatenate(list(swaps(np.ones(4, int), 0))).sum(axis=1)
    for drawn in (grouped, single):
        # Binomial with 4 and 1/2: 1, 4, 6, 4, 1 of 16.
        shares = np.bincount(drawn.astype(int), minlength=5) / len(drawn)
        np.testing.assert_allclose(shares, np.array([1, 4, 6, 4, 1]) / 16, atol=0.02)


def test_the_noise_of_five_seeds_is_a_quantile_of_students_t() -> None:
    # t(0.975, 4) = 2.776 in every table; 2.776 * sqrt(2) * 0.01.
    assert noise_limit(0.01, 5) == pytest.approx(0.03926, abs=1e-5)
    assert noise_limit(0.0, 2) == 0


# --- resamples of the metrics are the metrics -------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 8])
def test_rankings_of_resamples_are_those_of_scikit_learn_on_the_drawn_rows(decimals: int) -> None:
    generator = np.random.default_rng(decimals)
    positive = generator.random(150) < 0.2
    scores = (generator.random(150) + positive * 0.4).round(decimals)
    weights = next(resampled_rows(150, 20, 1))
    found = resampled_rankings(rank(positive, scores), weights, 0.8)
    for sample, times in enumerate(weights.astype(int)):
        drawn, given = np.repeat(positive, times), np.repeat(scores, times)
        assert found["roc_auc"][sample] == pytest.approx(reference.roc_auc_score(drawn, given))
        assert found["pr_auc"][sample] == pytest.approx(reference.average_precision_score(drawn, given))
        expected = single_label.ranking_scores(drawn, given) | single_label.scores_at_recall(drawn, given, 0.8)
        for name in ("wss_at_95", "wss_at_recall", "precision_at_recall"):
            assert found[name][sample] == pytest.approx(expected[name]), name


def test_a_resample_without_positive_rows_has_no_ranking() -> None:
    found = resampled_rankings(rank(np.array([True, False]), np.array([0.9, 0.1])), np.array([[0.0, 2.0]]), 0.9)
    assert all(np.isnan(values[0]) for values in found.values())
    assert percentile_interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_a_resample_without_positive_rows_has_no_precision_either_where_negative_ones_rank_higher() -> None:
    found = resampled_rankings(rank(np.array([True, False]), np.array([0.1, 0.9])), np.array([[0.0, 2.0]]), 0.9)
    assert all(np.isnan(values[0]) for values in found.values())


@pytest.mark.parametrize("names", [TWO, THREE])
def test_decisions_of_resamples_have_the_numbers_of_evaluate(names: list[str]) -> None:
    generator, k = np.random.default_rng(0), len(names)
    actual, predicted = generator.integers(0, k, (20, 80)), generator.integers(0, k + 1, (20, 80))
    matrices = [confusion_matrix(one, other, k) for one, other in zip(actual, predicted, strict=True)]
    correct = np.stack([np.diagonal(matrix) for matrix in matrices]).astype(float)
    answered = np.stack([matrix[:, :k].sum(axis=0) for matrix in matrices]).astype(float)
    support, invalid = np.stack([m.sum(axis=1) for m in matrices]), np.array([m[:, k].sum() for m in matrices])
    positive = 1 if k == 2 else None
    values, f1 = decision_values(correct, answered, support, invalid, positive)
    for sample, matrix in enumerate(matrices):
        expected = decision_scores(matrix) | (two_class_scores(matrix, 1) if positive else {})
        assert {name: value[sample] for name, value in values.items()} == pytest.approx(
            {name: expected[name] for name in values}
        )
        np.testing.assert_allclose(f1[sample], per_label_scores(matrix).f1)


@pytest.mark.parametrize("names", [TWO, THREE])
def test_every_metric_of_one_label_is_what_evaluate_writes(names: list[str]) -> None:
    generator = np.random.default_rng(1)
    task = task_of(names)
    threshold = {"method": "recall", "recall": 0.9, "confidence": None} if len(names) == 2 else None
    params = evaluate_of(threshold=threshold)
    side = answers(generator.integers(0, len(names), 200), 1, generator, len(names))
    rule = single_label.decision_rule(side, task, params)
    block = single_label.score(single_label.decide(side, rule, task), rule, task, params, {})
    found = labels.metric_values(single_label.decide(side, rule, task), task, params)
    left_out = {"n", "tp", "fp", "tn", "fn", "threshold", "per_class"}
    assert found == {key: value for key, value in block.items() if key not in left_out and "_low" not in key
                     and "_high" not in key}  # fmt: skip


def label_set_answers(actual: np.ndarray, generator: np.random.Generator, strength: float = 2) -> LabelSets:
    odds = np.exp(generator.normal(size=actual.shape) + strength * actual - 1)
    probabilities = odds / (1 + odds)
    return LabelSets([str(row) for row in range(len(actual))], actual, probabilities >= 0.5, probabilities)


def test_every_metric_of_several_labels_is_what_evaluate_writes() -> None:
    generator = np.random.default_rng(2)
    task, params = task_of(THREE, multi_label=True), evaluate_of(threshold={"method": "fixed", "value": 0.5})
    side = label_set_answers(generator.random((150, 3)) < 0.3, generator)
    block = multi_label.score(side, multi_label.decision_rule(side, task, params), task, params, {})
    compared = label_sets.compare(side, label_set_answers(side.actual, generator), task, params)
    assert {name: change.before for name, change in compared.metrics.items()} == {
        name: block[name] for name in compared.metrics
    }
    assert set(compared.metrics) | {"n", "invalid_rate", "per_class"} == {
        name for name in block if "_low" not in name and "_high" not in name
    }
    assert {name: change.before for name, change in compared.per_class.items()} == pytest.approx(
        {name: scores["f1"] for name, scores in block["per_class"].items()}
    )


def text_answers(generator: np.random.Generator, overlap: float, rows: int = 80) -> Texts:
    words = [f"word{number}" for number in range(40)]
    references = [" ".join(np.random.default_rng(row).choice(words, 8)) for row in range(rows)]
    given = [
        " ".join(word if generator.random() < overlap else "other" for word in reference.split())
        for reference in references
    ]
    likelihoods = -generator.random(rows) * 20 / (1 + overlap)
    return Texts([str(row) for row in range(rows)], references, given, likelihoods, np.full(rows, 9))


def test_every_metric_of_texts_is_what_evaluate_writes() -> None:
    generator = np.random.default_rng(3)
    before, after = text_answers(generator, 0.4), text_answers(generator, 0.6)
    compared = texts.compare(before, after, GenerationTask(kind="question_answering"), evaluate_of())
    for end, side in (("before", before), ("after", after)):
        expected = text_scores(side.actual, side.predicted, side.log_likelihoods, side.tokens, 100, 0)
        found = {name: getattr(change, end) for name, change in compared.metrics.items()}
        assert found == pytest.approx({name: expected[name] for name in found})
    assert {"perplexity", "rouge_l", "token_f1", "exact_match", "repetition_rate", "empty_rate"} <= set(found)
    assert verdict("token_f1", compared.metrics["token_f1"]) == BETTER
    assert compared.metrics["perplexity"].p is not None


# --- how often they err -----------------------------------------------------------------------------------------------


@pytest.fixture
def few_permutations() -> Iterator[None]:
    """1,000 of them, since as many comparisons are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("review.statistics.PERMUTATIONS", 999)
        yield


@pytest.mark.usefixtures("few_permutations")
def test_one_in_twenty_null_comparisons_is_a_false_alarm_and_fewer_with_mcnemars_test() -> None:
    generator, task = np.random.default_rng(0), task_of(THREE)
    alarms: dict[str, int] = {}
    by_label = 0
    for seed in range(1_000):
        actual = generator.integers(0, 3, 150)
        before, after = (answers(actual, 1.0, generator) for _ in range(2))
        compared = labels.compare(before, after, task, evaluate_of(100, seed))
        for name, change in compared.metrics.items():
            alarms[name] = alarms.get(name, 0) + (change.p is not None and change.p < SIGNIFICANT)
        by_label += any(change.p < SIGNIFICANT for change in compared.per_class.values())
    # 5 % of 1,000 are 50, with a standard deviation of 6.9; three of them on each side.
    for name in ("f1_macro", "recall_macro", "precision_macro", "log_loss", "brier"):
        assert 29 <= alarms[name] <= 71, (name, alarms[name])
    # Exact, so conservative: counts are whole numbers.
    assert 10 <= alarms["accuracy"] <= 71
    # Any of three labels, after Holm.
    assert 10 <= by_label <= 71


@pytest.mark.usefixtures("few_permutations")
def test_a_real_difference_is_found_and_intervals_cover_it() -> None:
    generator, task = np.random.default_rng(1), task_of(THREE)
    truth = {}
    many = generator.integers(0, 3, 200_000)
    for strength in (1.0, 1.6):
        truth[strength] = labels.metric_values(answers(many, strength, generator), task, evaluate_of())
    found, covered = dict.fromkeys(("accuracy", "f1_macro", "log_loss"), 0), dict.fromkeys(truth[1.0], 0)
    for seed in range(200):
        actual = generator.integers(0, 3, 300)
        compared = labels.compare(
            answers(actual, 1.0, generator), answers(actual, 1.6, generator), task, evaluate_of(300, seed)
        )
        for name, change in compared.metrics.items():
            assert change.interval is not None
            low, high = change.interval
            covered[name] += low <= truth[1.6][name] - truth[1.0][name] <= high
            if name in found:
                found[name] += verdict(name, change) == BETTER
    # Accuracy rises from about 0.66 to 0.79: a paired z of about 3.6, so nearly always seen.
    assert all(times >= 180 for times in found.values()), found
    # 95 % of 200 are 190, with a standard deviation of 3. Resampling inflates the calibration error.
    for name in ("accuracy", "f1_macro", "precision_macro", "recall_macro", "log_loss", "brier"):
        assert 180 <= covered[name] <= 199, (name, covered[name])


def test_the_bootstrap_of_cells_has_the_intervals_of_a_bootstrap_of_rows() -> None:
    generator, task = np.random.default_rng(2), task_of(TWO)
    actual = generator.integers(0, 2, 250)
    before, after = (answers(actual, strength, generator, 2) for strength in (0.8, 1.2))
    compared = labels.compare(before, after, task, evaluate_of(2_000))
    differences: dict[str, list[float]] = {}
    for _ in range(400):
        rows = generator.integers(0, 250, 250)
        values = [labels.metric_values(take(side, rows), task, evaluate_of()) for side in (before, after)]
        for name, value in values[0].items():
            differences.setdefault(name, []).append(values[1][name] - value)
    for name, drawn in differences.items():
        interval = compared.metrics[name].interval
        if interval is None:
            assert not direction(name)
            continue
        spread = float(np.std(drawn))
        # The quantiles' own sampling error is about 0.14 standard deviations.
        assert interval == pytest.approx(percentile_interval(np.array(drawn)), abs=0.5 * spread), name


# --- nothing changed --------------------------------------------------------------------------------------------------


def test_identical_predictions_have_a_p_of_one_everywhere() -> None:
    generator = np.random.default_rng(4)
    one = answers(generator.integers(0, 2, 100), 1, generator, 2)
    several = label_set_answers(generator.random((100, 3)) < 0.3, generator)
    written = text_answers(generator, 0.5)
    chat = GenerationTask(kind="chat")
    for compared in (
        labels.compare(one, one, task_of(TWO), evaluate_of()),
        label_sets.compare(several, several, task_of(THREE, multi_label=True), evaluate_of()),
        texts.compare(written, written, chat, evaluate_of()),
    ):
        assert compared.same
        assert {change.p for change in compared.metrics.values()} <= {1.0, None}
        assert {change.interval for change in compared.metrics.values()} <= {(0.0, 0.0), None}
        assert {change.p for change in compared.per_class.values()} <= {1.0}
        assert (len(compared.flips.fixed), len(compared.flips.broken), compared.flips.still_wrong) == (0, 0, 0)


def test_the_seed_decides_and_both_directions_mirror_each_other() -> None:
    generator = np.random.default_rng(6)
    actual = generator.integers(0, 3, 120)
    before, after = (answers(actual, strength, generator) for strength in (1, 1.3))
    there, again = (labels.compare(before, after, task_of(THREE), evaluate_of()) for _ in range(2))
    assert there.metrics == again.metrics
    back = labels.compare(after, before, task_of(THREE), evaluate_of())
    assert back.metrics["accuracy"].p == there.metrics["accuracy"].p
    assert there.flips.fixed.tolist() != []
    assert sorted(back.flips.broken) == sorted(there.flips.fixed)


def test_lower_is_better_for_losses_and_errors_and_higher_for_scores() -> None:
    assert [direction(name) for name in ("log_loss", "hamming_loss", "brier", "ece", "perplexity")] == [-1] * 5
    assert [direction(name) for name in ("f1_macro", "some_score", "exact_match", "pr_auc")] == [1] * 4
    assert direction("threshold") == 0
    lower = Change(0.5, 0.4, (-0.2, -0.01), None, None)
    assert [verdict(name, lower) for name in ("ece", "roc_auc", "threshold")] == [BETTER, WORSE, None]
    # A test decides where there is one.
    assert verdict("log_loss", lower._replace(p=0.06)) == NOISE
    assert verdict("ece", lower._replace(interval=(-0.2, 0.0))) == NOISE
    assert verdict("ece", Change(0.1, 0.1, (0.0, 0.0), None, None)) == SAME


def test_many_rows_get_fewer_resamples_but_never_too_few() -> None:
    assert [resample_count(2_000, rows) for rows in (10, 25_000, 50_000, 100_000, 10**7)] == [
        2000,
        2000,
        1000,
        500,
        500,
    ]
    assert resample_count(100, 10**6) == 100


@pytest.mark.parametrize("several", [False, True])
def test_one_of_many_labels_can_be_significant_where_many_rows_leave_few_permutations(
    monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    # As with millions of rows that differ.
    monkeypatch.setattr("review.statistics.MOST_BINOMIALS", 1)
    monkeypatch.setattr("review.statistics.MOST_COINS", 1)
    names, actual = [f"label {number}" for number in range(120)], np.repeat(np.arange(120), 3)
    actual = np.concatenate([actual, np.zeros(60, int)])
    wrong = np.where(actual == 0, 119, actual)
    ids = [str(row) for row in range(len(actual))]
    if several:
        sets = [np.eye(120)[codes] for codes in (wrong, actual)]
        sides = [LabelSets(ids, sets[1] > 0, one > 0, one * 0.8 + 0.1) for one in sets]
        compared = label_sets.compare(sides[0], sides[1], task_of(names, multi_label=True), evaluate_of(100))
    else:
        one, other = (Answers(ids, actual, codes, None) for codes in (wrong, actual))
        compared = labels.compare(one, other, task_of(names), evaluate_of(100))
    assert compared.per_class["label 0"].p < SIGNIFICANT
    assert compared.per_class["label 7"].p == 1
    assert [permutation_count(10**9, labels=number) for number in (0, 50, 77, 500)] == [2_000, 2_000, 3_080, 20_000]


def test_all_intervals_of_a_comparison_come_from_the_number_of_resamples_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []

    def counted(differences: np.ndarray) -> tuple[float, float]:
        counts.append(len(differences))
        return percentile_interval(differences)

    monkeypatch.setattr("review.statistics.MOST_DRAWS", 60_000)
    monkeypatch.setattr("review.labels.percentile_interval", counted)
    generator = np.random.default_rng(0)
    actual = generator.integers(0, 3, 100)
    before, after = (answers(actual, 1, generator) for _ in range(2))
    compared = labels.compare(before, after, task_of(THREE), evaluate_of(2_000))
    assert set(counts) == {600} == {compared.resamples}


def test_cells_count_every_row() -> None:
    sides = [Answers([], np.array([0, 0, 1, 2]), np.array(codes), None) for codes in ([0, 0, 3, 1], [0, 0, 1, 1])]
    cells: Cells = joint_cells(sides[0], sides[1], 3)
    found = set(zip(*(column.tolist() for column in cells), strict=True))
    assert found == {(0, 0, 0, 2), (1, 3, 1, 1), (2, 1, 1, 1)}
