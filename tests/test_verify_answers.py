"""How far a second answer may be from the first: scores by a bound, decisions where they are no close call."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from review.verifying.answers import EXACT, ROUNDED, compare_answers


def labelled(*probabilities: tuple[float, float], predictions: list[str] | None = None) -> pa.Table:
    """Rows of two labels, the likelier one predicted."""
    answers = predictions or ["no" if no >= yes else "yes" for no, yes in probabilities]
    columns: dict[str, Any] = {"id": [f"r{row}" for row in range(len(probabilities))]}
    columns |= {"label": ["yes"] * len(probabilities), "prediction": answers}
    columns |= {
        "probability.no": [row[0] for row in probabilities],
        "probability.yes": [row[1] for row in probabilities],
    }
    return pa.table(columns)


def answered(answers: list[str], log_likelihoods: list[float | None], tokens: list[int | None]) -> pa.Table:
    """Generated texts with the likelihoods of references."""
    ids = [str(row) for row in range(len(answers))]
    columns = {"id": ids, "label": ["reference"] * len(answers), "prediction": answers}
    scores = pa.array(log_likelihoods, pa.float64())
    return pa.table(columns | {"reference_log_likelihood": scores, "reference_tokens": pa.array(tokens, pa.int64())})


def test_the_same_answers_are_no_difference() -> None:
    table = labelled((0.25, 0.75), (0.9, 0.1))
    assert compare_answers(table, table, EXACT, several=False) == (0.0, [])


@pytest.mark.parametrize(("bounds", "off"), [(EXACT, 0.0009), (ROUNDED, 0.02)])
def test_a_score_may_be_off_by_what_rounding_does(bounds: Any, off: float) -> None:
    compared = compare_answers(labelled((0.25, 0.75)), labelled((0.25 + off, 0.75 - off)), bounds, several=False)
    assert compared.farthest == pytest.approx(off)
    assert compared.differences == []


@pytest.mark.parametrize(("bounds", "off"), [(EXACT, 0.0011), (ROUNDED, 0.26)])
def test_a_score_beyond_the_bound_is_named_with_its_row_and_both_values(bounds: Any, off: float) -> None:
    rows = [(0.1, 0.9)] * 30
    compared = compare_answers(labelled(*rows, (0.6, 0.4)), labelled(*rows, (0.6 + off, 0.4)), bounds, several=False)
    assert compared.differences == [f"row 'r30', probability.no: committed 0.6, re-scored {0.6 + off}"]


def test_many_rows_are_counted_and_not_all_named() -> None:
    compared = compare_answers(labelled(*[(0.1, 0.9)] * 9), labelled(*[(0.2, 0.8)] * 9), EXACT, several=False)
    assert len(compared.differences) == 6
    assert compared.differences[-1] == "and 4 more"


def test_small_differences_that_are_all_there_are_another_adapter() -> None:
    # Rounding to bfloat16 moves a probability by .005 on average, another adapter moves all of them.
    compared = compare_answers(labelled(*[(0.1, 0.9)] * 9), labelled(*[(0.2, 0.8)] * 9), ROUNDED, several=False)
    assert compared.differences == ["scores are off by 0.1 on average; 0.03 may be rounding"]


@pytest.mark.parametrize(("bounds", "margin", "said"), [(EXACT, 0.001, 0), (EXACT, 0.003, 1), (ROUNDED, 0.1, 0)])
def test_another_decision_is_named_unless_it_was_a_close_call(bounds: Any, margin: float, said: int) -> None:
    odds = (0.5 - margin / 2, 0.5 + margin / 2)
    compared = compare_answers(labelled(odds), labelled(odds, predictions=["no"]), bounds, several=False)
    assert len(compared.differences) == said
    assert all("committed 'yes', re-scored 'no'" in text for text in compared.differences)


def test_a_decision_that_is_no_label_is_none_however_close_the_labels_are() -> None:
    table = labelled((0.5, 0.5))
    assert compare_answers(labelled((0.5, 0.5), predictions=["<invalid>"]), table, ROUNDED, several=False).differences


@pytest.mark.parametrize(("odds", "said"), [(0.5009, 0), (0.7, 1)])
def test_of_several_labels_each_is_a_call_of_its_own(odds: float, said: int) -> None:
    before = labelled((odds, 0.1), predictions=['["no"]'])
    for cell in ("[]", '["yes"]', "no JSON"):
        after = labelled((odds, 0.1), predictions=[cell])
        far = said or cell != "[]"
        assert len(compare_answers(before, after, EXACT, several=True).differences) == far


def test_likelihoods_of_references_are_compared_for_each_token() -> None:
    first = answered(["a", "b"], [-40.0, -2.0], [40, 2])
    assert compare_answers(first, answered(["a", "b"], [-40.03, -2.0], [40, 2]), EXACT, several=False).differences == []
    [said] = compare_answers(first, answered(["a", "b"], [-40.0, -2.03], [40, 2]), EXACT, several=False).differences
    assert said == "row '1', reference_log_likelihood: committed -2.0, re-scored -2.03"


@pytest.mark.parametrize(("bounds", "others", "said"), [(EXACT, 1, 1), (ROUNDED, 1, 0), (ROUNDED, 2, 2)])
def test_some_generated_answers_may_be_others_in_bfloat16_alone(bounds: Any, others: int, said: int) -> None:
    likelihoods, tokens = [-1.0] * 10, [1] * 10
    first = answered(["a"] * 10, likelihoods, tokens)  # type: ignore[arg-type]
    again = answered(["b"] * others + ["a"] * (10 - others), likelihoods, tokens)  # type: ignore[arg-type]
    assert len(compare_answers(first, again, bounds, several=False).differences) == said


def test_scores_that_only_one_side_has_are_a_difference() -> None:
    scored, unscored = answered(["a"], [-1.0], [1]), answered(["a"], [None], [1])
    assert compare_answers(unscored, scored, ROUNDED, several=False).differences
    assert compare_answers(scored, unscored, ROUNDED, several=False).differences
    assert compare_answers(unscored, unscored, EXACT, several=False) == (0.0, [])


@pytest.mark.parametrize("name", ["id", "label", "probability.yes"])
def test_other_rows_labels_or_columns_are_named(name: str) -> None:
    table = labelled((0.25, 0.75))
    place = table.column_names.index(name)
    other = table.drop([name]) if name not in ("id", "label") else table.set_column(place, name, [["other"]])
    [said] = compare_answers(table, other, ROUNDED, several=False).differences
    assert said == "it has not the columns, the rows and the labels that `infer` writes"
