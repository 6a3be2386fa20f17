"""The evaluate stage from prediction files to metrics, thresholds and plot data, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference

from stages import evaluate
from stages.common.errors import UserError
from stages.common.labels import INVALID
from stages.common.measuring.curves import POINTS, coverage_rows, one_against_rest, ranking_rows, thin
from stages.common.predictions import write_predictions
from tests.evaluated import Work, finite_numbers_only

HEADLINE = {
    "n", "accuracy", "f1_micro", "f1_macro", "precision_macro", "recall_macro", "invalid_rate", "log_loss", "brier",
    "ece", "per_class", "accuracy_low", "accuracy_high", "f1_macro_low", "f1_macro_high", "recall_macro_low",
    "recall_macro_high",
}  # fmt: skip
TWO_CLASS = {
    "tp", "fp", "tn", "fn", "precision", "recall", "specificity", "roc_auc", "pr_auc", "threshold", "wss_at_95",
    "recall_low", "recall_high", "rows_selected",
}  # fmt: skip
NEED_PROBABILITIES = {"log_loss", "brier", "ece", "roc_auc", "pr_auc", "threshold", "wss_at_95"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Work]:
    monkeypatch.chdir(tmp_path)
    return lambda *labels, **options: Work(tmp_path, list(labels), **options)


def test_metrics_have_exactly_the_contracts_keys_for_several_labels(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    for name in ("metrics", "validation"):
        metrics = made.json(f"metrics/{name}.json")
        assert list(metrics) == ["adapter", "base", "tfidf", "majority"]
        for block in metrics.values():
            assert set(block) == HEADLINE
            assert set(block["per_class"]) == {"a", "b", "c"}
            assert set(block["per_class"]["a"]) == {"precision", "recall", "f1", "support"}
            assert block["accuracy_low"] <= block["accuracy"] <= block["accuracy_high"]
        assert finite_numbers_only(metrics)
    assert made.json("models/decision.json") == {name: {"rule": "argmax"} for name in metrics}


def test_metrics_of_the_adapter_are_those_of_scikit_learn_on_its_prediction_file(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    table = pq.read_table("data/predictions/adapter/test.parquet").to_pandas()
    assert block["n"] == len(table)
    assert block["accuracy"] == pytest.approx(reference.accuracy_score(table["label"], table["prediction"]))
    report = reference.classification_report(table["label"], table["prediction"], output_dict=True, zero_division=0)
    assert block["f1_macro"] == pytest.approx(report["macro avg"]["f1-score"])
    assert block["per_class"]["b"]["recall"] == pytest.approx(report["b"]["recall"])
    expected = reference.log_loss(table["label"], made.probabilities("adapter", "test"), labels=made.labels)
    assert block["log_loss"] == pytest.approx(expected)


def test_with_two_labels_decisions_on_test_use_the_threshold_that_validation_chose(work: Callable[..., Work]) -> None:
    made = work("exclude", "include", threshold={"method": "recall", "recall": 0.9, "confidence": None})
    evaluate.main()
    decision = made.json("models/decision.json")["adapter"]
    scores = made.probabilities("adapter", "validation")[:, 1]
    positive = np.array(made.split("validation")[1]) == "include"
    assert reference.recall_score(positive, scores >= decision["threshold"]) == pytest.approx(decision["recall"])
    assert decision["recall"] >= 0.9 > reference.recall_score(positive, scores > decision["threshold"])
    assert decision | {"positive_label": "include", "method": "recall", "chosen_on": "validation"} == decision

    block = made.json("metrics/metrics.json")["adapter"]
    assert set(block) == HEADLINE | TWO_CLASS | {"wss_at_recall", "precision_at_recall"}
    assert block["threshold"] == decision["threshold"]
    decided = np.where(made.probabilities("adapter", "test")[:, 1] >= decision["threshold"], "include", "exclude")
    labels = np.array(made.split("test")[1])
    assert block["accuracy"] == (block["tp"] + block["tn"]) / block["n"] == np.mean(decided == labels)
    assert block["f1_macro"] == pytest.approx(reference.f1_score(labels, decided, average="macro"))
    assert block["precision"] == pytest.approx(reference.precision_score(labels, decided, pos_label="include"))
    assert block["recall_low"] <= block["recall"] <= block["recall_high"]


def test_a_fixed_threshold_is_taken_as_it_is(work: Callable[..., Work]) -> None:
    made = work("no", "yes", threshold={"method": "fixed", "value": 0.7})
    evaluate.main()
    decision = made.json("models/decision.json")["base"]
    assert (decision["threshold"], decision["chosen_on"]) == (0.7, "params.yaml")


def test_generated_answers_leave_out_what_needs_probabilities_and_invalid_ones_are_wrong(
    work: Callable[..., Work],
) -> None:
    made = work("no", "yes")
    made.write_generated("adapter", invalid=12)
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    assert set(block) == (HEADLINE | TWO_CLASS) - NEED_PROBABILITIES
    assert (block["invalid_rate"], block["accuracy"]) == (0.1, 0.9)
    assert block["tp"] + block["fp"] + block["tn"] + block["fn"] == block["n"] == 120
    assert made.json("models/decision.json")["adapter"] == {"rule": "answer"}
    assert {row["series"] for row in made.csv("roc")} == {"base", "tfidf"}
    assert {(row["prediction"], row["confidence"]) for row in made.csv("misclassified")} == {(INVALID, "")}
    assert sum(int(row["count"]) for row in made.csv("confusion") if row["prediction"] == INVALID) == 12


def test_77_labels_and_labels_without_rows_are_evaluated(work: Callable[..., Work]) -> None:
    labels = [f"intent.{number}" for number in range(77)]
    made = work(*labels, rows=60)
    evaluate.main()
    block = made.json("metrics/metrics.json")["adapter"]
    table = pq.read_table("data/predictions/adapter/test.parquet").to_pandas()
    expected = reference.f1_score(table["label"], table["prediction"], labels=labels, average="macro", zero_division=0)
    assert block["f1_macro"] == pytest.approx(expected)
    assert block["per_class"]["intent.76"]["support"] == 0
    assert len(made.csv("confusion")) == 77 * 78


def test_plot_tables_are_small_and_hold_no_texts(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c", rows=2_000)
    evaluate.main()
    for name in ("precision_recall", "roc", "coverage", "loss"):
        rows = made.csv(name)
        for series in {row["series"] for row in rows}:
            assert 20 < sum(row["series"] == series for row in rows) <= POINTS
    assert sum(int(row["count"]) for row in made.csv("confusion")) == 2_000
    assert {row["series"] for row in made.csv("reliability")} == {"adapter", "base", "tfidf"}
    assert len(made.csv("per_class_f1")) == 9
    assert not [path for path, content in made.everything().items() if b"secret" in content]


def test_the_surest_mistakes_come_first(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    rows = made.csv("misclassified")
    confidences = [float(row["confidence"]) for row in rows]
    assert len(rows) == 20
    assert confidences == sorted(confidences, reverse=True)
    table = pq.read_table("data/predictions/adapter/test.parquet").to_pandas().set_index("id")
    wrong = table[table["label"] != table["prediction"]]
    assert confidences[0] == pytest.approx(wrong.filter(like="probability").max(axis=1).max(), abs=1e-4)
    assert all(wrong.loc[row["id"], "prediction"] == row["prediction"] for row in rows)


def test_the_last_point_of_the_coverage_curve_is_the_accuracy_of_all_rows(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    last = [row for row in made.csv("coverage") if row["series"] == "adapter"][-1]
    assert float(last["coverage"]) == 1
    assert float(last["accuracy"]) == pytest.approx(made.json("metrics/metrics.json")["adapter"]["accuracy"], abs=1e-4)


def test_training_metrics_are_the_finite_numbers_of_the_summary(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    evaluate.main()
    assert made.json("metrics/training.json") == {"steps": 399, "epochs": 1.5}


def test_the_same_input_gives_the_same_bytes(work: Callable[..., Work]) -> None:
    made = work("no", "yes")
    evaluate.main()
    first = made.everything()
    evaluate.main()
    assert made.everything() == first


@pytest.mark.parametrize("name", ["adapter", "base", "tfidf", "majority"])
def test_predictions_for_other_rows_are_refused_with_the_stage_to_run(name: str, work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    ids, labels = made.split("test")
    ids[5], ids[6] = ids[6], ids[5]
    path = made.folder / f"data/predictions/{name}/test.parquet"
    write_predictions(path, ids, labels, labels, made.probabilities(name, "test"), made.labels)
    stage = {"adapter": "infer", "base": "infer_base"}.get(name, "baseline")
    with pytest.raises(UserError, match=rf"{name}/test.parquet: its ids .* row 6\. .*single-item {stage}`"):
        evaluate.main()
    assert not (made.folder / "metrics").exists()


def test_missing_rows_and_other_labels_are_refused(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    ids, labels = made.split("test")
    path = made.folder / "data/predictions/base/test.parquet"
    shares = made.probabilities("base", "test")
    write_predictions(path, ids[:-1], labels[:-1], labels[:-1], shares[:-1], made.labels)
    with pytest.raises(UserError, match="119 rows against 120, the first difference in row 120"):
        evaluate.main()
    write_predictions(path, ids, ["c", *labels[1:]], labels, shares, made.labels)
    with pytest.raises(UserError, match=r"its labels .* row 1\."):
        evaluate.main()


@pytest.mark.parametrize("row", [[0.5, 0.2, 0.2], [math.nan, 0.5, 0.5], [1.5, -0.5, 0.0], [math.inf, 0.0, 0.0]])
def test_numbers_that_are_no_probabilities_are_refused(row: list[float], work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    shares = made.probabilities("tfidf", "validation")
    shares[3] = row
    made.write("tfidf", "validation", shares, made.split("validation")[1])
    with pytest.raises(UserError, match=r"tfidf/validation.parquet: row 4: the probabilities"):
        evaluate.main()


def test_files_for_other_labels_are_refused(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    made.edit_params(["a", "b", "d"], {})
    with pytest.raises(UserError, match=r"splits/test.parquet: row 3 has 'c', which is none of a, b, d"):
        evaluate.main()


def test_a_threshold_cannot_be_chosen_without_positive_rows(work: Callable[..., Work]) -> None:
    made = work("no", "yes")
    ids, labels = made.split("validation")
    made.write_split("validation", ids, ["no"] * len(labels))
    for name in evaluate.PREDICTORS:
        made.write(name, "validation", made.probabilities(name, "validation"))
    with pytest.raises(UserError, match="no row has the label 'yes'"):
        evaluate.main()


def test_an_empty_split_is_refused(work: Callable[..., Work]) -> None:
    made = work("a", "b", "c")
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("id", "text", "label", "slice")}),
        made.folder / "data/splits/test.parquet",
    )
    with pytest.raises(UserError, match="has no rows"):
        evaluate.main()


def test_a_thinned_curve_keeps_its_ends_and_its_shape() -> None:
    x = np.linspace(0, 1, 10_001)
    rows = thin(x, x**2)
    assert len(rows) <= POINTS
    assert (rows[0], rows[-1]) == ((0, 0), (1, 1))
    assert max(abs(y - x**2) for x, y in rows) < 1e-3
    assert thin(np.array([1.0]), np.array([0.5])) == [(1, 0.5)]


def test_the_curves_go_through_the_points_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    actual = generator.integers(0, 3, 20)
    probabilities = generator.dirichlet([1, 1, 1], 20)  # 60 points: few enough for all to be kept
    truth, scores = one_against_rest(actual, probabilities, None)
    assert truth.tolist() == np.eye(3, dtype=bool)[actual].ravel().tolist()  # micro-average: each row for each label
    precision_recall, roc = ranking_rows(truth, scores)
    false_rate, true_rate, _ = reference.roc_curve(truth, scores, drop_intermediate=False)
    assert roc == [(round(x, 4), round(y, 4)) for x, y in zip(false_rate, true_rate, strict=True)]
    precision, recall, _ = reference.precision_recall_curve(truth, scores)
    # scikit-learn adds the point (0, 1), at which nothing is selected.
    points = {(round(x, 4), round(y, 4)) for x, y in zip(recall[:-1], precision[:-1], strict=True)}
    assert set(precision_recall) <= points
    assert precision_recall[-1] == (1, pytest.approx(1 / 3, abs=1e-4))
    positive, own = one_against_rest(np.array([0, 1]), np.array([[0.2, 0.8], [0.3, 0.7]]), 0)
    assert (positive.tolist(), own.tolist()) == ([True, False], [0.2, 0.3])
    assert ranking_rows(np.array([True]), np.array([0.5])) == ([], [])


def test_the_coverage_curve_answers_the_surest_rows_first() -> None:
    # Confidences 0.6 (wrong), 0.9 (right), 0.7 (right): right, right, wrong.
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    rows = coverage_rows(np.array([1, 0, 1]), probabilities)
    assert rows == [(0.3333, 1), (0.6667, 1), (1, 0.6667)]
