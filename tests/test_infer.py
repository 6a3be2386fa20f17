"""The infer stage on split files of every kind and a tiny model; other tests hold the scores and answers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from stages import infer
from stages.common.acceleration.choice import FastPaths
from stages.common.acceleration.preparing import prepare_layers
from stages.common.branches import label_branches
from stages.common.errors import UserError
from stages.common.labels import INVALID, join_labels
from stages.common.schema.measuring import Infer
from stages.common.schema.task import Task
from stages.common.scoring.label_predictions import predict_label, predict_label_sets
from tests.sharp import greedy, log_likelihood, sharp_model
from tests.split_files import TERMINATOR, multi_label_format, prompt_format, write_split
from tests.tiny import make_tokenizer

LABELS = ["positive", "negative", "neutral"]
LABEL_IDS = {label: [*make_tokenizer().encode(f" {label}").ids, TERMINATOR] for label in LABELS}
SCORES = Infer(method="label_scores", max_new_tokens=None)
SINGLE = {
    "kind": "classification", "multi_label": False, "labels": LABELS, "label_descriptions": None,
    "positive_label": None,
}  # fmt: skip
QUESTIONS = {"kind": "question_answering"}
ONE_LABEL = prompt_format("classification", LABEL_IDS, LABELS)
SEVERAL = multi_label_format({label: LABEL_IDS[label][:-1] for label in LABELS}, yes=40, no=41)
PARAMS = "task: {}\ninfer: {{method: {}, max_new_tokens: {}}}\n"
REFERENCES = ["a nice day", "it is good", "bad", "what a movie", "no"]


def task(values: dict[str, Any]) -> Task:
    return TypeAdapter(Task).validate_python(values)


@pytest.fixture
def model(base_folder: Path) -> Any:
    return sharp_model(base_folder)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path) -> Path:
    """A repository's root with a tokenizer and split files of 5 and 0 rows with one label each."""
    monkeypatch.chdir(tmp_path)
    write_splits(ONE_LABEL, [{"label": LABELS[row % 3]} for row in range(5)])
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tokenizer").symlink_to(base_folder)
    return tmp_path


def write_splits(footer: Any, rows: list[dict[str, Any]]) -> None:
    """Validation with these rows behind prompts of different lengths, and an empty test part."""
    tokenizer = make_tokenizer()
    for index, row in enumerate(rows):
        # The longest is neither first nor last, so that sorting by length shows.
        row["text"] = "what a nice day " * (1 + index * 3 % 5)
        row["prompt_ids"] = tokenizer.encode(f"Tweet: {row['text']}{index}\nSentiment:").ids
    write_split(Path("data/splits/validation.parquet"), footer, rows)
    write_split(Path("data/splits/test.parquet"), footer, [])


def write_questions() -> None:
    tokenizer = make_tokenizer()
    ids = [tokenizer.encode(f" {text}").ids for text in REFERENCES]
    for answer in ids[:-1]:  # the last one was cut and has no end
        answer.append(TERMINATOR)
    rows = [{"label": text, "completion_ids": answer} for text, answer in zip(REFERENCES, ids, strict=True)]
    write_splits(prompt_format("question_answering"), rows)


def prompts() -> list[list[int]]:
    return pq.read_table("data/splits/validation.parquet")["prompt_ids"].to_pylist()


def run_main(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    arguments: list[str],
    method: str,
    limit: str,
    values: dict[str, Any] = SINGLE,
) -> list[Any]:
    loaded: list[Any] = []

    def load_fast_model(adapter: Path | None, _tokens: int, *, scores_labels: bool) -> Any:
        assert scores_labels == (method == "label_scores")
        loaded.append(adapter)
        prepare_layers(model, FastPaths(*["the test does without"] * 4))
        return model

    monkeypatch.setattr("stages.common.scoring.loading.load_fast_model", load_fast_model)
    monkeypatch.setattr("sys.argv", ["infer", *arguments])
    inline = str(values).replace("None", "null").replace("False", "false").replace("True", "true")
    Path("params.yaml").write_text(PARAMS.format(inline, method, limit))
    infer.main()
    return loaded


# --- one label --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "name"), [([], "adapter"), (["base"], "base")])
def test_every_row_is_predicted_in_its_place(
    workspace: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
) -> None:
    loaded = run_main(monkeypatch, model, arguments, "label_scores", "null")
    assert loaded == [Path("models/adapter") if name == "adapter" else None]
    table = pq.read_table(workspace / f"data/predictions/{name}/validation.parquet").to_pydict()
    assert list(table) == ["id", "label", "prediction", *(f"probability.{label}" for label in LABELS)]
    assert table["id"] == [f"row-{row}" for row in range(5)]
    assert table["label"] == [LABELS[row % 3] for row in range(5)]
    # Each row alone, so that a row in another's place would show.
    for row, prompt in enumerate(prompts()):
        answers, probabilities = predict_label(model, [prompt], LABEL_IDS, SCORES, lambda _: None)
        assert probabilities is not None
        found = [table[f"probability.{label}"][row] for label in LABELS]
        np.testing.assert_allclose(found, probabilities[0], rtol=0, atol=1e-5)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert table["prediction"][row] == answers[0] == LABELS[int(np.argmax(found))]
    assert pq.read_table(workspace / f"data/predictions/{name}/test.parquet").num_rows == 0
    assert f"infer: {name} predicted 5 rows of validation" in capsys.readouterr().out


def test_generated_labels_have_no_probabilities_and_keep_their_rows(
    workspace: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_main(monkeypatch, model, ["base"], "generate", "6")
    table = pq.read_table(workspace / "data/predictions/base/validation.parquet")
    assert table["id"].to_pylist() == [f"row-{row}" for row in range(5)]
    assert set(table["prediction"].to_pylist()) <= {*LABELS, INVALID}
    assert table["probability.positive"].null_count == 5


def test_slow_scoring_is_announced_with_its_reason(
    workspace: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model.config._attn_implementation = "flex_attention"
    infer.predict_labels(model, Path("data/splits/test.parquet"), ONE_LABEL, SCORES, Path("out.parquet"))
    assert "'flex_attention' takes no mask" in capsys.readouterr().out


# --- several labels ---------------------------------------------------------------------------------------------------


def test_each_label_of_a_multi_label_row_has_a_probability_of_its_own(
    workspace: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [join_labels(labels) for labels in ([], ["positive"], ["negative", "neutral"], LABELS, ["neutral"])]
    write_splits(SEVERAL, [{"label": cell} for cell in cells])
    run_main(monkeypatch, model, [], "label_scores", "null", SINGLE | {"multi_label": True})
    table = pq.read_table("data/predictions/adapter/validation.parquet").to_pydict()
    assert list(table) == ["id", "label", "prediction", *(f"probability.{label}" for label in LABELS)]
    assert table["label"] == cells
    for row, prompt in enumerate(prompts()):
        answers, probabilities = predict_label_sets(model, [prompt], label_branches(SEVERAL), lambda _: None)
        found = [table[f"probability.{label}"][row] for label in LABELS]
        np.testing.assert_allclose(found, probabilities[0], rtol=0, atol=1e-5)
        assert table["prediction"][row] == answers[0]
    assert pq.read_table("data/predictions/adapter/test.parquet").num_rows == 0


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["question_answering", "chat"])
def test_answers_are_greedy_and_stand_beside_the_likelihood_of_their_references(
    workspace: Path, model: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_questions()
    if kind == "chat":
        rows = pq.read_table("data/splits/validation.parquet").to_pylist()
        write_splits(prompt_format("chat"), rows)
    run_main(monkeypatch, model, [], "generate", "7", {"kind": kind})
    table = pq.read_table("data/predictions/adapter/validation.parquet").to_pydict()
    assert list(table) == ["id", "label", "prediction", "reference_log_likelihood", "reference_tokens"]
    assert table["id"] == [f"row-{row}" for row in range(5)]
    assert table["label"] == REFERENCES
    tokenizer = make_tokenizer()
    references = pq.read_table("data/splits/validation.parquet")["completion_ids"].to_pylist()
    for row, (prompt, reference) in enumerate(zip(prompts(), references, strict=True)):
        answer = greedy(model, prompt, 7)
        answer = answer[: answer.index(TERMINATOR)] if TERMINATOR in answer else answer
        assert table["prediction"][row] == tokenizer.decode(answer).strip()
        expected = log_likelihood(model, prompt, reference)
        assert table["reference_log_likelihood"][row] == pytest.approx(expected, abs=1e-4)
        assert table["reference_tokens"][row] == len(reference)
    assert len(set(table["prediction"])) > 1
    assert pq.read_table("data/predictions/adapter/test.parquet").column_names == list(table)


def test_both_passes_over_the_answers_show_their_progress(
    workspace: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions()
    bars: list[tuple[int, str]] = []
    progress = infer.progress

    def noted(total: int, what: str) -> Any:
        bars.append((total, what))
        return progress(total, what)

    monkeypatch.setattr(infer, "progress", noted)
    run_main(monkeypatch, model, ["base"], "generate", "3", QUESTIONS)
    assert bars[:2] == [(5, "scoring the reference answers of validation"), (5, "answering validation")]


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["bass"], ["base", "base"], ["adapter"], ["--help"]])
def test_other_arguments_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["infer", *arguments])
    with pytest.raises(UserError, match=r"Allowed: none.*`base`"):
        infer.main()


def test_split_files_for_other_labels_are_refused(workspace: Path) -> None:
    for footer, multi_label in ((ONE_LABEL, False), (SEVERAL, True)):
        write_splits(footer, [])
        other = task(SINGLE | {"labels": LABELS[::-1], "multi_label": multi_label})
        with pytest.raises(UserError, match="made for the labels") as error:
            infer.read_prompt_format(Path("data/splits/test.parquet"), other, SCORES)
        assert "data/splits/test.parquet" in str(error.value) and "format_prompts" in str(error.value)


@pytest.mark.parametrize(
    ("footer", "values", "wanted"),
    [
        (ONE_LABEL, SINGLE | {"multi_label": True}, "kind 'classification', but params.yaml asks for 'multi_label'"),
        (SEVERAL, SINGLE, "kind 'multi_label', but params.yaml asks for 'classification'"),
        (ONE_LABEL, QUESTIONS, "kind 'classification', but params.yaml asks for 'question_answering'"),
        (prompt_format("chat"), QUESTIONS, "kind 'chat', but params.yaml asks for 'question_answering'"),
        ({"labels": LABELS}, SINGLE, "kind None, but params.yaml asks for 'classification'"),
    ],
)
def test_split_files_for_another_kind_of_task_are_refused(
    workspace: Path, footer: Any, values: dict[str, Any], wanted: str
) -> None:
    write_splits(footer, [])
    with pytest.raises(UserError, match=wanted) as error:
        infer.read_prompt_format(Path("data/splits/test.parquet"), task(values), SCORES)
    assert "data/splits/test.parquet" in str(error.value) and "`dvc repro format_prompts split`" in str(error.value)


def test_answers_shorter_than_a_label_are_refused(workspace: Path) -> None:
    longest = max(map(len, LABEL_IDS.values()))
    short = Infer(method="generate", max_new_tokens=longest - 1)
    path = Path("data/splits/test.parquet")
    with pytest.raises(UserError, match=rf"infer.max_new_tokens: {longest - 1} .* takes {longest} tokens"):
        infer.read_prompt_format(path, task(SINGLE), short)
    enough = Infer(method="generate", max_new_tokens=longest)
    assert infer.label_ids(infer.read_prompt_format(path, task(SINGLE), enough)) == LABEL_IDS
