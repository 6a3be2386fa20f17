"""The evaluate stage where answers are texts; what the numbers mean is tested in tests/test_text_scores.py."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import evaluate
from stages.common.errors import UserError
from stages.common.measuring.text_scores import per_row_scores, text_scores
from stages.common.predictions import write_answers
from stages.common.tables import read_json
from tests.evaluated import edit_params, finite_numbers_only, write_split, write_training_log

ROWS = 60
REFERENCES = [f"Case {row} is treated with rest and water." for row in range(ROWS)]
LIKELIHOODS, TOKENS = -np.linspace(5, 12, ROWS), np.arange(ROWS) % 7 + 4


def answers_of(name: str) -> list[str]:
    """The adapter is nearly right, the base empty in every third row, the baselines answer one thing."""
    if name == "adapter":
        return [text.replace("water", "tea") if row % 4 else text for row, text in enumerate(REFERENCES)]
    if name == "base":
        return ["" if row % 3 == 0 else f"I cannot say, {row}" for row in range(ROWS)]
    return [REFERENCES[0]] * ROWS


@pytest.fixture(params=["question_answering", "chat"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, request.param, slices=None)
    return tmp_path


def make(folder: Path, kind: str, slices: list[str] | None) -> None:
    edit_params(folder, {}, {"calibration_bins": None, "threshold": None})
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    begin, end = text.index("task:"), text.index("\n# SmolLM2")
    (folder / "params.yaml").write_text(text[:begin] + f"task:\n  kind: {kind}\n" + text[end:], encoding="utf-8")
    for part in ("validation", "test"):
        write_split(folder, part, ids(part), REFERENCES, slices)
        for name in evaluate.PREDICTORS:
            write(name, part, *((LIKELIHOODS, TOKENS) if name in ("adapter", "base") else (None, None)))
    write_training_log(folder)


def ids(part: str) -> list[str]:
    return [f"{part}-{row}" for row in range(ROWS)]


def write(name: str, part: str, likelihoods: np.ndarray | None, tokens: np.ndarray | None, **changed: Any) -> None:
    columns = {"ids": ids(part), "references": REFERENCES, "answers": answers_of(name)} | changed
    path = Path(f"data/predictions/{name}/{part}.parquet")
    write_answers(path, columns["ids"], columns["references"], columns["answers"], likelihoods, tokens)


def test_metrics_are_those_of_the_texts_and_perplexity_needs_a_model(folder: Path) -> None:
    evaluate.main()
    for name in ("metrics", "validation"):
        metrics = read_json(f"metrics/{name}.json")
        assert list(metrics) == ["adapter", "base", "tfidf", "majority"]
        expected = text_scores(REFERENCES, answers_of("adapter"), LIKELIHOODS, TOKENS, 100, 42)
        assert metrics["adapter"] == {"n": ROWS, **expected}
        # exp of the mean loss over all tokens.
        perplexity = math.exp(-LIKELIHOODS.sum() / TOKENS.sum())
        assert metrics["base"]["perplexity"] == pytest.approx(perplexity)
        assert metrics["base"]["empty_rate"] == pytest.approx(1 / 3)
        assert metrics["adapter"]["exact_match"] == pytest.approx(1 / 4)
        needs_model = {"perplexity", "perplexity_low", "perplexity_high"}
        assert set(metrics["adapter"]) - set(metrics["tfidf"]) == needs_model
        assert finite_numbers_only(metrics)
    assert read_json("models/decision.json") == {name: {"rule": "text"} for name in evaluate.PREDICTORS}


def test_all_plot_files_are_there_and_only_the_losses_have_rows(folder: Path) -> None:
    evaluate.main()
    rows = {}
    for path in (folder / "metrics/evaluation").iterdir():
        with path.open(encoding="utf-8", newline="") as file:
            rows[path.stem] = len(list(csv.DictReader(file)))
    assert {name for name, count in rows.items() if count} == {"loss"}
    assert set(rows) == {
        "confusion", "misclassified", "per_class_f1", "loss", "precision_recall", "roc", "reliability", "coverage",
    }  # fmt: skip
    assert (folder / "data/reading_list.csv").read_text() == "rank,id,slice,probability,selected\n"


def test_twenty_rows_chosen_by_the_seed_are_examples_with_both_answers(folder: Path) -> None:
    evaluate.main()
    first = pq.read_table("data/examples.parquet").to_pylist()
    rows = [int(row["id"].removeprefix("test-")) for row in first]
    assert len(set(rows)) == 20
    assert rows == sorted(rows)
    for number, row in zip(rows, first, strict=True):
        assert row == {
            "id": f"test-{number}",
            "text": f"secret text of test-{number}",
            "label": REFERENCES[number],
            "adapter": answers_of("adapter")[number],
            "base": answers_of("base")[number],
        }
    evaluate.main()
    assert pq.read_table("data/examples.parquet").to_pylist() == first
    values = (folder / "params.yaml").read_text()
    before, after = values.split("\nevaluate:\n  seed: 42")
    (folder / "params.yaml").write_text(f"{before}\nevaluate:\n  seed: 7{after}")
    evaluate.main()
    assert pq.read_table("data/examples.parquet").to_pylist() != first


def test_of_fewer_than_twenty_rows_all_are_examples(folder: Path) -> None:
    write_split(folder, "test", ids("test")[:7], REFERENCES[:7], None)
    for name in evaluate.PREDICTORS:
        few = {"ids": ids("test")[:7], "references": REFERENCES[:7], "answers": answers_of(name)[:7]}
        write(name, "test", None, None, **few)
    evaluate.main()
    assert pq.read_table("data/examples.parquet")["id"].to_pylist() == ids("test")[:7]


def test_slices_have_their_own_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "chat", slices=["dolly", "oasst", "oasst"])
    evaluate.main()
    found = read_json("metrics/metrics.json")["adapter"]["per_slice"]
    token_f1, rouge_l = per_row_scores(REFERENCES, answers_of("adapter"))
    assert list(found) == ["dolly", "oasst"]
    assert found["dolly"] == pytest.approx({"n": 20, "token_f1": token_f1[::3].mean(), "rouge_l": rouge_l[::3].mean()})
    assert found["oasst"]["n"] == 40


@pytest.mark.parametrize(
    ("likelihood", "count"), [(0.5, 3), (math.nan, 3), (-math.inf, 3), (-1.0, 0)], ids=["over 1", "nan", "0", "empty"]
)
def test_impossible_likelihoods_are_refused(likelihood: float, count: int, folder: Path) -> None:
    likelihoods, tokens = LIKELIHOODS.copy(), TOKENS.copy()
    likelihoods[8], tokens[8] = likelihood, count
    write("base", "test", likelihoods, tokens)
    with pytest.raises(UserError, match=r"base/test.parquet: row 9: the reference's log-likelihood.*infer_base`"):
        evaluate.main()


def test_likelihoods_of_some_rows_only_are_refused(folder: Path) -> None:
    table = pq.read_table("data/predictions/adapter/test.parquet")
    values = [None, *table["reference_log_likelihood"].to_pylist()[1:]]
    place = table.column_names.index("reference_log_likelihood")
    changed = table.set_column(place, "reference_log_likelihood", pa.array(values, pa.float64()))
    pq.write_table(changed, "data/predictions/adapter/test.parquet")
    with pytest.raises(UserError, match=r"adapter/test.parquet: row 1: the reference's log-likelihood"):
        evaluate.main()


@pytest.mark.parametrize(
    ("column", "changed", "message"),
    [
        ("ids", lambda values: [values[1], values[0], *values[2:]], r"its ids are not .* row 1\."),
        ("references", lambda values: [*values[:-1], "another"], r"its labels are not .* row 60\."),
    ],
)
def test_answers_to_other_questions_are_refused(
    column: str, changed: Callable[[list[str]], list[str]], message: str, folder: Path
) -> None:
    values = {"ids": ids("test"), "references": REFERENCES}[column]
    write("tfidf", "test", None, None, **{column: changed(values)})
    with pytest.raises(UserError, match=message):
        evaluate.main()


def test_predictions_of_labels_are_refused(folder: Path) -> None:
    table = pq.read_table("data/predictions/adapter/test.parquet").drop_columns(["reference_tokens"])
    pq.write_table(table, "data/predictions/adapter/test.parquet")
    with pytest.raises(UserError, match=r"has the columns .* but the block task of params.yaml asks for"):
        evaluate.main()
