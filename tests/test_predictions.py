"""Prediction files: their columns and types, whatever the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.common.labels import INVALID
from stages.common.predictions import write_answers, write_predictions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "predictions.parquet"


def test_a_label_outside_the_task_is_a_bug_and_writes_nothing(path: Path) -> None:
    shares = np.array([[0.5, 0.5]])
    for prediction, multi_label in (("c", False), ('["c"]', True), (f'["{INVALID}"]', True)):
        with pytest.raises(AssertionError, match="a prediction is a label"):
            write_predictions(path, ["1"], ["a"], [prediction], shares, ["a", "b"], multi_label=multi_label)
    assert not path.exists()


def test_probabilities_of_several_labels_stand_each_by_itself(path: Path) -> None:
    shares = np.array([[0.9, 0.8], [0.1, 0.2]])
    write_predictions(path, ["1", "2"], ['["a"]', "[]"], ['["a", "b"]', "[]"], shares, ["a", "b"], multi_label=True)
    assert pq.read_table(path).to_pylist() == [
        {"id": "1", "label": '["a"]', "prediction": '["a", "b"]', "probability.a": 0.9, "probability.b": 0.8},
        {"id": "2", "label": "[]", "prediction": "[]", "probability.a": 0.1, "probability.b": 0.2},
    ]


def test_answers_have_their_references_likelihood_or_null(path: Path) -> None:
    columns = {"id": pa.string(), "label": pa.string(), "prediction": pa.string()}
    columns |= {"reference_log_likelihood": pa.float64(), "reference_tokens": pa.int64()}
    write_answers(path, ["1", "2"], ["yes", "no"], ["", "no"], np.array([-1.5, -0.25]), np.array([3, 2]))
    table = pq.read_table(path)
    assert table.schema.equals(pa.schema(columns))
    assert table.to_pylist()[0] == {
        "id": "1", "label": "yes", "prediction": "", "reference_log_likelihood": -1.5, "reference_tokens": 3,
    }  # fmt: skip
    write_answers(path, ["1"], ["yes"], ["no"], None, None)
    assert pq.read_table(path).schema.equals(pa.schema(columns))
    assert pq.read_table(path)["reference_tokens"].to_pylist() == [None]
    write_answers(path, [], [], [], np.empty(0), np.empty(0, dtype=np.int64))
    assert pq.read_table(path).schema.equals(pa.schema(columns))
