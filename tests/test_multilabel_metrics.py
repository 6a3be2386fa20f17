"""Several labels for each text: numbers against scikit-learn and by hand, thresholds, and the stage on whole files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference

from stages import evaluate
from stages.common.errors import UserError
from stages.common.labels import split_labels
from stages.common.measuring.answers import LabelSets, label_matrix
from stages.common.measuring.label_sets import (
    binary_log_loss,
    bootstrap_set_intervals,
    scores_of_labels,
    set_scores,
)
from stages.common.measuring.multi_label import surest_mistakes
from tests.evaluated import Work, finite_numbers_only

LABELS = ["cs.AI", "cs.CL", "stat.ML"]
SETS = {
    "n", "accuracy", "f1_micro", "f1_macro", "f1_samples", "precision_macro", "recall_macro", "hamming_loss",
    "invalid_rate", "log_loss", "accuracy_low", "accuracy_high", "f1_macro_low", "f1_macro_high", "per_class",
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Work]:
    monkeypatch.chdir(tmp_path)
    return lambda **options: Work(tmp_path, LABELS, multi_label=True, **options)


def random_sets(rows: int, labels: int, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True sets, predicted sets and probabilities that are worth something; some rows have no label, nor answer."""
    generator = np.random.default_rng(seed)
    actual = generator.random((rows, labels)) < share
    probabilities = 1 / (1 + np.exp(1 - 2 * actual - generator.normal(size=actual.shape)))
    return actual, probabilities >= 0.5, probabilities


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "labels", "share"), [(400, 5, 0.2), (50, 20, 0.02), (30, 2, 0.9)])
def test_numbers_of_sets_are_those_of_scikit_learn(rows: int, labels: int, share: float) -> None:
    actual, predicted, probabilities = random_sets(rows, labels, 0, share)
    scores = set_scores(actual, predicted)
    assert scores["accuracy"] == pytest.approx(reference.accuracy_score(actual, predicted), abs=1e-12)
    assert scores["hamming_loss"] == pytest.approx(reference.hamming_loss(actual, predicted), abs=1e-12)
    for average, empty in (("micro", 0), ("macro", 0), ("samples", 1)):
        expected = reference.f1_score(actual, predicted, average=average, zero_division=empty)
        assert scores[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
    for name, function in (("precision", reference.precision_score), ("recall", reference.recall_score)):
        expected = function(actual, predicted, average="macro", zero_division=0)
        assert scores[f"{name}_macro"] == pytest.approx(expected, abs=1e-12)
    losses = [reference.log_loss(actual[:, k], probabilities[:, k], labels=[False, True]) for k in range(labels)]
    assert binary_log_loss(actual, probabilities) == pytest.approx(np.mean(losses))


def test_numbers_of_each_label_are_those_of_scikit_learn() -> None:
    actual, predicted, probabilities = random_sets(300, 6, 1)
    actual[:, 5] = False
    expected = reference.precision_recall_fscore_support(actual, predicted, average=None, zero_division=0)
    scores = scores_of_labels(actual, predicted, probabilities)
    for index, name in enumerate(("precision", "recall", "f1", "support")):
        assert [found[name] for found in scores] == pytest.approx(expected[index].tolist(), abs=1e-12)
    for code in range(5):
        ranked = reference.average_precision_score(actual[:, code], probabilities[:, code])
        assert scores[code]["pr_auc"] == pytest.approx(ranked)
    assert "pr_auc" not in scores[5]  # no row has this label: nothing to rank


def test_numbers_of_sets_agree_with_a_case_worked_by_hand() -> None:
    actual = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]], bool)
    predicted = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]], bool)
    scores = set_scores(actual, predicted)
    assert scores["accuracy"] == 1 / 4  # the row without labels and answers
    assert scores["hamming_loss"] == 4 / 12
    # Right 2, true 4, answered 4. Labels: 2*1/(2+2), 0/(1+1), 2*1/(1+1).
    assert scores["f1_micro"] == 4 / 8
    assert scores["f1_macro"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    # Rows: 2*1/3, nothing on both sides, 2*1/3, 0.
    assert scores["f1_samples"] == pytest.approx((2 / 3 + 1 + 2 / 3 + 0) / 4)
    assert binary_log_loss(np.array([[True, False]]), np.array([[0.8, 0.4]])) == pytest.approx(
        -(math.log(0.8) + math.log(0.6)) / 2
    )
    # Sure and wrong: clipped to float64's eps, not infinite.
    assert binary_log_loss(np.array([[True]]), np.array([[0.0]])) == pytest.approx(-math.log(2**-52))


def test_nothing_true_and_nothing_answered_is_right_in_every_row_and_no_label_has_an_f1() -> None:
    nothing = np.zeros((3, 2), bool)
    scores = set_scores(nothing, nothing)
    assert (scores["accuracy"], scores["f1_samples"], scores["hamming_loss"]) == (1, 1, 0)
    assert (scores["f1_micro"], scores["f1_macro"], scores["recall_macro"]) == (0, 0, 0)


def test_the_bootstrap_has_the_intervals_of_a_plain_bootstrap_of_rows() -> None:
    actual, predicted, _ = random_sets(200, 4, 2)
    found = bootstrap_set_intervals(actual, predicted, 2_000, 0)
    generator, values = np.random.default_rng(1), []
    for _ in range(2_000):
        rows = generator.integers(0, 200, 200)
        scores = set_scores(actual[rows], predicted[rows])
        values.append((scores["accuracy"], scores["f1_macro"]))
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    for index, name in enumerate(("accuracy", "f1_macro")):
        # The quantiles' own sampling error is about 0.003 here.
        assert found[f"{name}_low"] == pytest.approx(low[index], abs=0.01)
        assert found[f"{name}_high"] == pytest.approx(high[index], abs=0.01)


def test_intervals_of_sets_cover_the_truth_about_as_often_as_they_promise() -> None:
    # Two labels of probability 1/2; each decision is right with probability 0.8, so a set with 0.64. By symmetry a
    # label's F1 is 2 * 0.4 / (0.5 + 0.5) = 0.8, and so is their mean.
    generator, covered = np.random.default_rng(0), np.zeros(2)
    for seed in range(200):
        actual = generator.random((300, 2)) < 0.5
        predicted = actual ^ (generator.random((300, 2)) < 0.2)
        found = bootstrap_set_intervals(actual, predicted, 200, seed)
        covered[0] += found["accuracy_low"] <= 0.64 <= found["accuracy_high"]
        covered[1] += found["f1_macro_low"] <= 0.8 <= found["f1_macro_high"]
    # 95 % of 200 is 190, with a standard deviation of 3.
    assert ((covered >= 180) & (covered <= 199)).all()


def test_the_seed_decides_the_intervals_and_the_size_of_a_chunk_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    actual, predicted, _ = random_sets(100, 3, 3)
    found = bootstrap_set_intervals(actual, predicted, 150, 7)
    assert found != bootstrap_set_intervals(actual, predicted, 150, 8)
    monkeypatch.setattr("stages.common.measuring.label_sets.CHUNK", 700)  # seven resamples at a time
    assert found == bootstrap_set_intervals(actual, predicted, 150, 7)


def test_the_surest_wrong_decision_makes_a_row_a_sure_mistake() -> None:
    actual = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], bool)
    probabilities = np.array([[0.1, 0.2], [0.9, 0.6], [0.3, 0.8], [0.95, 0.4]])
    # Wrong: row 0 left out its first label with 0.9, row 1 gave its second with 0.6, row 3 its first with 0.95.
    rows, confidence = surest_mistakes(LabelSets(list("abcd"), actual, probabilities >= 0.5, probabilities), 20)
    assert rows.tolist() == [3, 0, 1]
    assert confidence == pytest.approx([0.95, 0.9, 0.6])


# --- the stage --------------------------------------------------------------------------------------------------------


def test_metrics_have_exactly_these_keys_and_are_finite(work: Callable[..., Work]) -> None:
    made = work()
    evaluate.main()
    for name in ("metrics", "validation"):
        metrics = made.json(f"metrics/{name}.json")
        assert list(metrics) == ["adapter", "base", "tfidf", "majority"]
        for block in metrics.values():
            assert set(block) == SETS
            assert list(block["per_class"]) == LABELS
            expected = {"precision", "recall", "f1", "support", "threshold", "pr_auc"}
            assert set(block["per_class"]["cs.AI"]) == expected
            assert block["f1_macro_low"] <= block["f1_macro"] <= block["f1_macro_high"]
        assert finite_numbers_only(metrics)


def test_every_label_gets_the_threshold_with_its_best_f1_on_validation(work: Callable[..., Work]) -> None:
    made = work()
    evaluate.main()
    rule = made.json("models/decision.json")["adapter"]
    assert (rule["rule"], rule["method"], rule["chosen_on"]) == ("thresholds", "max_f1", "validation")
    truth = [split_labels(cell) for cell in made.split("validation")[1]]
    for code, label in enumerate(LABELS):
        has = np.array([label in row for row in truth])
        scores = made.probabilities("adapter", "validation")[:, code]
        best = max(reference.f1_score(has, scores >= value) for value in scores)
        assert reference.f1_score(has, scores >= rule["thresholds"][label]) == pytest.approx(best)
        assert rule["per_class"][label]["f1"] == pytest.approx(best)
    block = made.json("metrics/metrics.json")["adapter"]
    actual = np.array([[label in split_labels(cell) for label in LABELS] for cell in made.split("test")[1]])
    decided = made.probabilities("adapter", "test") >= [rule["thresholds"][label] for label in LABELS]
    assert block["accuracy"] == pytest.approx(reference.accuracy_score(actual, decided))
    assert block["f1_macro"] == pytest.approx(reference.f1_score(actual, decided, average="macro"))
    assert block["per_class"]["cs.CL"]["threshold"] == rule["thresholds"]["cs.CL"]


def test_a_fixed_threshold_is_every_labels_and_a_recall_can_be_promised_of_each(work: Callable[..., Work]) -> None:
    made = work(threshold={"method": "fixed", "value": 0.6})
    evaluate.main()
    rule = made.json("models/decision.json")["tfidf"]
    assert rule["thresholds"] == dict.fromkeys(LABELS, 0.6)
    assert rule["chosen_on"] == "params.yaml"
    made.edit_params(LABELS, {"threshold": {"method": "recall", "recall": 0.8, "confidence": 0.9}})
    evaluate.main()
    for reached in made.json("models/decision.json")["adapter"]["per_class"].values():
        assert reached["recall"] > reached["recall_lower_bound"] >= 0.8
        assert (reached["recall_promised"], reached["confidence"]) == (0.8, 0.9)


def test_a_label_that_no_validation_row_has_is_named(work: Callable[..., Work]) -> None:
    made = work()
    ids, labels = made.split("validation")
    made.write_split("validation", ids, [cell.replace('"cs.CL"', '"cs.AI"') for cell in labels])
    for name in evaluate.PREDICTORS:
        made.write(name, "validation", made.probabilities(name, "validation"))
    with pytest.raises(UserError, match=r"no row has the label 'cs\.CL'.*use a fixed threshold"):
        evaluate.main()
    made.edit_params(LABELS, {"threshold": {"method": "fixed", "value": 0.5}})
    evaluate.main()
    block = made.json("metrics/validation.json")["adapter"]
    assert block["per_class"]["cs.CL"]["support"] == 0
    assert "pr_auc" not in block["per_class"]["cs.CL"]


def test_a_label_with_too_few_rows_for_a_promise_is_named(work: Callable[..., Work]) -> None:
    work(rows=100, threshold={"method": "recall", "recall": 0.99, "confidence": 0.99})
    with pytest.raises(UserError, match=r"rows have the label 'cs\.AI', too few .* needs 459\."):
        evaluate.main()


def test_plots_are_about_single_decisions_and_all_files_are_there(work: Callable[..., Work]) -> None:
    made = work(rows=1_000)
    evaluate.main()
    assert len(made.csv("per_class_f1")) == 9
    for name in ("precision_recall", "roc", "reliability"):
        assert {row["series"] for row in made.csv(name)} == {"adapter", "base", "tfidf"}
    # A row for each label of each text.
    assert sum(int(row["rows"]) for row in made.csv("reliability") if row["series"] == "base") == 3_000
    assert made.csv("confusion") == made.csv("coverage") == made.reading_list() == []
    assert len(made.csv("loss")) > 20


def test_the_surest_mistakes_and_their_texts_are_listed(work: Callable[..., Work]) -> None:
    made = work()
    evaluate.main()
    listed, examples = made.csv("misclassified"), made.examples()
    assert len(listed) == len(examples) == 20
    confidences = [float(row["confidence"]) for row in listed]
    assert confidences == sorted(confidences, reverse=True)
    cells = dict(zip(*made.split("test"), strict=True))
    for row, example in zip(listed, examples, strict=True):
        assert cells[row["id"]] == row["label"] == example["label"] != row["prediction"] == example["adapter"]
        assert set(split_labels(example["base"])) <= set(LABELS)
        assert example["text"] == f"secret text of {row['id']}"


def test_slices_have_accuracy_and_macro_f1_of_their_rows(work: Callable[..., Work]) -> None:
    made = work(slices=["one", "two"])
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    actual = np.array([[label in split_labels(cell) for label in LABELS] for cell in made.split("test")[1]])
    thresholds = [block["per_class"][label]["threshold"] for label in LABELS]
    decided = made.probabilities("adapter", "test") >= thresholds
    expected = {
        "n": 60,
        "accuracy": reference.accuracy_score(actual[1::2], decided[1::2]),
        "f1_macro": reference.f1_score(actual[1::2], decided[1::2], average="macro"),
    }
    assert block["per_slice"]["two"] == pytest.approx(expected)


def test_the_same_input_gives_the_same_bytes(work: Callable[..., Work]) -> None:
    made = work()
    evaluate.main()
    first = made.everything()
    evaluate.main()
    assert made.everything() == first


def test_cells_are_read_as_lists_of_the_tasks_labels() -> None:
    matrix = label_matrix(Path("data/splits/test.parquet"), ['["b", "a"]', "[]", '["b"]', "[]"], ["a", "b"])
    assert matrix.tolist() == [[True, True], [False, False], [False, True], [False, False]]


@pytest.mark.parametrize("cell", ["a", '["c"]', '"a"', "5", '{"a": 1}', "[1]", ""])
def test_a_cell_that_is_no_list_of_the_tasks_labels_is_refused(cell: str) -> None:
    with pytest.raises(UserError, match=r"splits/test.parquet: row 2 has .*, which is none of a, b.*item split`"):
        label_matrix(Path("data/splits/test.parquet"), ['["a"]', cell], ["a", "b"])


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan, math.inf])
def test_numbers_that_are_no_probabilities_are_refused(wrong: float, work: Callable[..., Work]) -> None:
    made = work()
    shares = made.probabilities("base", "test")
    shares[6, 1] = wrong
    made.write("base", "test", shares)
    with pytest.raises(UserError, match=r"base/test.parquet: row 7: the probabilities .* from 0 to 1\. Run"):
        evaluate.main()


def test_predictions_without_probabilities_are_refused(work: Callable[..., Work]) -> None:
    made = work()
    made.write("adapter", "test", None, made.split("test")[1])
    with pytest.raises(UserError, match=r"adapter/test.parquet: row 1: the probabilities \[nan"):
        evaluate.main()
