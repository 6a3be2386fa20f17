"""`python -m review.compare` with real git, real dvc and a remote: what it says, what it reads, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from review.rendering import Block, Bullets, Heading, Paragraph, Table, html_page, markdown_page
from review.trials import configuration
from tests.evaluated import ROOT, Work
from tests.reviewed import DVC_YAML, Reviewed, predict, write_questions

LABELS = ["bad", "so-so", "good"]
WORKING_TREE_LINE = "with `the working tree`"
Output = pytest.CaptureFixture[str]
Row = dict[str, Any]


def make(folder: Path, labels: list[str], **options: Any) -> tuple[Reviewed, Work]:
    """A repository on a branch: a weak adapter where it left main, a better one with another learning rate behind."""
    folder.mkdir(parents=True)
    project = Reviewed(folder)
    project.start()
    work = Work(folder, labels, **options)
    predict(work, 0.8, seed=1)
    project.commit("A weak adapter")
    project.git("checkout", "-qb", "change")
    project.edit("finetune.learning_rate", 0.002)
    predict(work, 3.0, seed=2)
    project.commit("Twice the learning rate")
    return project, work


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Reviewed:
    """Three labels, 160 rows; not to be changed."""
    project, _ = make(tmp_path_factory.mktemp("finished") / "project", LABELS, rows=160)
    project.push()
    return project


@pytest.fixture
def project(finished: Reviewed, tmp_path: Path) -> Reviewed:
    """A copy to be changed."""
    return finished.copy(tmp_path / "project")


def work_of(project: Reviewed, labels: list[str] | None = None) -> Work:
    """The helper that writes tables, for a folder that has them."""
    work = object.__new__(Work)
    work.folder, work.labels, work.multi_label = project.folder, labels or LABELS, False
    return work


def result(project: Reviewed, capfd: Output, *arguments: str) -> Any:
    capfd.readouterr()
    assert project.compare(*arguments, "--json") == 0
    return json.loads(capfd.readouterr().out)


def page(project: Reviewed, capfd: Output, *arguments: str) -> str:
    capfd.readouterr()
    assert project.compare(*arguments) == 0
    return capfd.readouterr().out


def refused(project: Reviewed, capfd: Output, *arguments: str, code: int = 1) -> str:
    """The one message of a run that ends with 1, or with another code."""
    capfd.readouterr()
    assert project.compare(*arguments) == code
    error = capfd.readouterr().err
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    return error


def edit_rows(work: Work, part: str, change: Callable[[list[Row]], list[Row]]) -> None:
    """Pass the rows of a split through `change`; the predictors that nobody trains answer what comes back."""
    path = work.folder / f"data/splits/{part}.parquet"
    rows = change(pq.read_table(path).to_pylist())
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("id", "text", "label", "slice")}
    pq.write_table(pa.table(columns), path)
    for name in ("base", "tfidf", "majority"):
        predict(work, 1.0, seed=3, predictor=name)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_by_default_the_working_tree_is_compared_with_where_its_branch_left_main(
    finished: Reviewed, capfd: Output
) -> None:
    text = page(finished, capfd)
    assert WORKING_TREE_LINE in text.splitlines()[0]
    assert finished.git("rev-parse", "--short=7", "main").strip() in text.splitlines()[0]
    assert text.splitlines()[2].startswith("**Better:** macro-F1 ")
    assert "on the same 160 test rows" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Parameters", "## Data", "## Metrics on test", "## Labels", "## Flipped rows"]
    assert "| `finetune.learning_rate` | `0.001` | `0.002` |" in text
    named = page(finished, capfd, "main", "HEAD")
    assert named.splitlines()[1:] == text.splitlines()[1:]


def test_before_and_after_are_the_numbers_of_metrics_json(finished: Reviewed, capfd: Output) -> None:
    found = result(finished, capfd)
    for end, commit in (("before", "main"), ("after", "HEAD")):
        block = json.loads(finished.git("show", f"{commit}:metrics/metrics.json"))["adapter"]
        values = {name: entry[end] for name, entry in found["metrics"].items()}
        assert values == pytest.approx({name: block[name] for name in values})
        per_class = {label: entry[end] for label, entry in found["per_class"].items()}
        assert per_class == pytest.approx({label: scores["f1"] for label, scores in block["per_class"].items()})
    assert found["cautions"] == []
    assert (found["own_rows"], found["baselines"]) == ({}, {})


def test_parameters_are_those_of_dvc_params_diff(project: Reviewed, capfd: Output) -> None:
    project.edit("finetune.lora.r", 32)
    project.edit("split.leakage", "group")
    project.edit("ingest.columns.label", {"column": "rating", "bins": [-2, 2]})
    command = [str(Path(sys.executable).with_name("dvc")), "params", "diff", "main", "--json"]
    expected = json.loads(
        subprocess.run(
            command, cwd=project.folder, env=dict(project.environment), capture_output=True, check=True
        ).stdout
    )["params.yaml"]
    found = {entry["key"]: entry for entry in result(project, capfd)["parameters"]}
    assert found.keys() == expected.keys()
    for key, entry in found.items():
        # DVC writes lists as texts.
        ours = [str(value) if isinstance(value, list) else value for value in (entry.get("before"), entry.get("after"))]
        assert ours == [expected[key].get("old"), expected[key].get("new")]


def test_flipped_rows_are_counted_and_the_twenty_surest_listed_by_id(finished: Reviewed, capfd: Output) -> None:
    found = result(finished, capfd)["flipped"]
    tables = []
    for commit in ("main", "HEAD"):
        with finished.entered():
            from dvc.api import DVCFileSystem

            content = DVCFileSystem(rev=commit).read_bytes("data/predictions/adapter/test.parquet")
        tables.append(pq.read_table(pa.BufferReader(content)).to_pylist())
    before, after = tables
    fixed = [
        new for old, new in zip(before, after, strict=True) if old["prediction"] != old["label"] == new["prediction"]
    ]
    broken = [
        new for old, new in zip(before, after, strict=True) if old["prediction"] == new["label"] != new["prediction"]
    ]
    assert (found["fixed"], found["broken"]) == (len(fixed), len(broken))
    assert len(fixed) > 20
    surest = sorted(fixed, key=lambda row: -row[f"probability.{row['prediction']}"])[:20]
    assert [row["id"] for row in found["rows"]["fixed"]] == [row["id"] for row in surest]
    assert all("text" not in row for kind in found["rows"].values() for row in kind)
    text = page(finished, capfd)
    assert f"{len(fixed)} fixed, {len(broken)} broken" in text
    assert "secret text" not in text


def test_identical_predictions_are_no_change_with_a_p_of_one(finished: Reviewed, capfd: Output) -> None:
    found = result(finished, capfd, "HEAD")
    assert {entry["verdict"] for entry in found["metrics"].values()} == {"no change"}
    assert {entry["p"] for entry in found["metrics"].values()} <= {1.0, None}
    assert found["verdict"]["text"] == "No change: both sides give the same predictions on the same 160 test rows."


def test_the_exit_code_is_three_when_a_named_metric_is_significantly_worse(finished: Reviewed, capfd: Output) -> None:
    assert finished.compare("HEAD", "main", "--fail-on-regression", "accuracy", "log_loss") == 3
    output = capfd.readouterr()
    assert output.err == "compare: significantly worse: accuracy, log_loss\n"
    assert "**Worse:** macro-F1" in output.out
    assert finished.compare("main", "HEAD", "--fail-on-regression", "accuracy") == 0
    # Worse metrics that are not named do not count.
    assert finished.compare("HEAD", "main", "--fail-on-regression", "invalid_rate") == 0


def test_an_unknown_metric_is_refused_with_the_names_that_are_known(finished: Reviewed, capfd: Output) -> None:
    message = refused(finished, capfd, "main", "--fail-on-regression", "acuracy", "f1_macro")
    assert "--fail-on-regression: acuracy is none of the metrics to be judged here: accuracy, f1_micro" in message


def test_a_page_goes_into_a_file_whole_or_not_at_all(finished: Reviewed, capfd: Output, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.md"
    assert finished.compare("--output", str(target)) == 0
    assert capfd.readouterr().out.startswith(f"compare: {target}: Better: macro-F1")
    assert target.read_text(encoding="utf-8").startswith("# Comparison of ")
    assert [path.name for path in target.parent.iterdir()] == ["page.md"]
    assert "page.md: " in refused(finished, capfd, "--output", str(target / "below-a-file"))


def test_an_output_that_is_no_file_is_left_alone_and_a_link_is_followed(
    finished: Reviewed, capfd: Output, tmp_path: Path
) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "page.md"
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, tmp_path, Path("/dev/null")):
        assert f"--output: {path} is no regular file" in refused(finished, capfd, "--output", str(path))
    assert pipe.is_fifo()
    assert finished.compare("--output", str(link)) == 0
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").startswith("# Comparison of ")


def test_the_help_names_all_exit_codes(finished: Reviewed, capfd: Output) -> None:
    assert finished.compare("--help") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "Exit code: 0; 1 with one message for what a user can mend; 3 with --fail-on-regression; 4 with" in said


def test_the_page_of_html_loads_nothing_and_says_the_same(finished: Reviewed, capfd: Output) -> None:
    text = page(finished, capfd, "--html")
    assert text.startswith("<!doctype html>")
    for word in ("<script", "src=", "href=", "http:", "https:", "url(", "@import"):
        assert word not in text
    assert "<strong>Better:</strong> macro-F1" in text
    assert "<td><code>finetune.learning_rate</code></td><td><code>0.001</code></td>" in text


def test_a_pager_that_is_left_early_is_no_error(finished: Reviewed) -> None:
    command = [sys.executable, "-m", "review.compare", "main", "HEAD"]
    environment = os.environ | finished.environment | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=finished.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_importing_the_command_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, review.compare; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- other tasks ------------------------------------------------------------------------------------------------------


def test_with_two_labels_each_side_is_decided_by_its_own_threshold(tmp_path: Path, capfd: Output) -> None:
    project, work = make(tmp_path / "project", ["no", "yes"], rows=160)
    project.edit("evaluate.threshold", {"method": "recall", "recall": 0.9, "confidence": None})
    predict(work, 2.0, seed=3)
    project.commit("A promised recall")
    found = result(project, capfd)
    for end, commit in (("before", "main"), ("after", "HEAD")):
        block = json.loads(project.git("show", f"{commit}:metrics/metrics.json"))["adapter"]
        values = {name: entry[end] for name, entry in found["metrics"].items() if name in block}
        assert {"recall", "precision", "pr_auc", "wss_at_95", "threshold", "rows_selected"} <= values.keys()
        assert values == pytest.approx({name: block[name] for name in values})
    assert found["cautions"] == []
    assert found["metrics"]["threshold"]["verdict"] is None
    assert found["metrics"]["roc_auc"]["low"] < found["metrics"]["roc_auc"]["difference"]
    expected = "the working tree: models/decision.json does not say how the adapter decides between no, yes"
    damaged: Any
    for damaged in ({}, [], {"adapter": {"rule": "threshold"}}, {"adapter": {"rule": "thresholds", "thresholds": {}}}):
        (project.folder / "models/decision.json").write_text(json.dumps(damaged))
        assert expected in refused(project, capfd)
    rule = {"rule": "threshold", "positive_label": "yes", "threshold": 0.5}
    (project.folder / "models/decision.json").write_text(json.dumps({"adapter": rule}))
    work.write_generated("adapter", invalid=9)
    assert "has a threshold, but data/predictions/adapter/test.parquet no probabilities" in refused(project, capfd)


def test_with_several_labels_sets_are_compared(tmp_path: Path, capfd: Output) -> None:
    project, _ = make(tmp_path / "project", LABELS, rows=120, multi_label=True)
    found = result(project, capfd)
    block = json.loads(project.git("show", "HEAD:metrics/metrics.json"))["adapter"]
    values = {name: entry["after"] for name, entry in found["metrics"].items()}
    assert {"accuracy", "f1_samples", "hamming_loss"} <= values.keys()
    assert values == pytest.approx({name: block[name] for name in values})
    assert found["verdict"]["result"] == "better"
    assert found["flipped"]["rows"]["fixed"][0]["after"].startswith("[")
    assert page(project, capfd).count("| `[") > 5
    for damaged in ({"adapter": {"rule": "thresholds"}}, {"adapter": {"thresholds": {"bad": 0.5}}}):
        (project.folder / "models/decision.json").write_text(json.dumps(damaged))
        assert "does not say how the adapter decides between bad, so-so, good" in refused(project, capfd)


@pytest.mark.parametrize("publish", [False, True])
def test_answers_are_compared_by_their_scores_and_shown_only_where_texts_may_be(
    tmp_path: Path, capfd: Output, publish: bool
) -> None:
    project = Reviewed(tmp_path / "project")
    project.folder.mkdir()
    project.start()
    write_questions(project.folder, 0.3, seed=0, publish_texts=publish)
    project.commit("Weak answers")
    write_questions(project.folder, 0.8, seed=1, publish_texts=publish)
    project.commit("Better answers")
    found = result(project, capfd, "HEAD~1")
    block = json.loads(project.git("show", "HEAD:metrics/metrics.json"))["adapter"]
    values = {name: entry["after"] for name, entry in found["metrics"].items()}
    assert {"perplexity", "rouge_l", "token_f1", "exact_match"} <= values.keys()
    assert values == pytest.approx({name: block[name] for name in values})
    assert found["verdict"]["text"].startswith("Better: token F1")
    assert found["per_class"] == {}
    text = page(project, capfd, "HEAD~1")
    assert ("answer after" in text, "about word" in text) == (publish, publish)
    # No metric looks at letter case.
    for part in ("validation", "test"):
        path = project.folder / f"data/predictions/adapter/{part}.parquet"
        table = pq.read_table(path)
        shouted = pa.array([text.upper() for text in table["prediction"].to_pylist()])
        pq.write_table(table.set_column(2, "prediction", shouted), path)
    project.commit("Louder answers")
    expected = "No change: no metric moved on the same 40 test rows, but 40 answers differ."
    assert result(project, capfd, "HEAD~1")["verdict"]["text"] == expected
    # Another token budget: perplexities are of other texts.
    for part in ("validation", "test"):
        path = project.folder / f"data/predictions/adapter/{part}.parquet"
        table = pq.read_table(path)
        tokens = pa.array([5] * table.num_rows, pa.int64())
        pq.write_table(table.set_column(4, "reference_tokens", tokens), path)
    project.commit("A smaller budget")
    found = result(project, capfd, "HEAD~1")
    assert (found["metrics"]["perplexity"]["verdict"], found["metrics"]["perplexity"]["p"]) == ("withheld", None)
    assert any("perplexity does not compare" in caution for caution in found["cautions"])


def test_generated_answers_are_compared_with_scored_ones_by_their_decisions(project: Reviewed, capfd: Output) -> None:
    work_of(project).write_generated("adapter", invalid=9)
    project.commit("Generate")
    found = result(project, capfd, "main")
    assert "log_loss" not in found["metrics"]
    assert found["metrics"]["invalid_rate"]["verdict"] == "worse"
    assert "log_loss is none of the metrics" in refused(project, capfd, "main", "--fail-on-regression", "log_loss")


# --- the data changed -------------------------------------------------------------------------------------------------


def test_only_rows_that_both_sides_have_alike_are_compared(project: Reviewed, capfd: Output) -> None:
    def change(rows: list[Row]) -> list[Row]:
        rows[3]["label"] = "good" if rows[3]["label"] != "good" else "bad"
        rows[5]["text"] = "another text"
        return [*rows[10:], *rows[2:10], {"id": "new", "label": "good", "text": "a new one", "slice": "x"}]

    edit_rows(work_of(project), "test", change)
    predict(work_of(project), 3.0, seed=2)
    project.commit("Other rows")
    found = result(project, capfd, "main")
    data = found["data"]["test"]
    assert (data["before"], data["after"], data["common"]) == (160, 159, 156)
    assert (data["added"], data["removed"]) == (["new"], ["test-0", "test-1"])
    assert [row["id"] for row in data["relabelled"]] == ["test-3"]
    assert data["text_changed"] == ["test-5"]
    assert found["data"]["validation"] is None
    tables = [pq.read_table(project.folder / "data/predictions/adapter/test.parquet").to_pylist()]
    kept = [row for row in tables[0] if row["id"] not in {"new", "test-3", "test-5"}]
    expected = np.mean([row["label"] == row["prediction"] for row in kept])
    assert found["metrics"]["accuracy"]["after"] == pytest.approx(expected)
    block = json.loads(project.git("show", "HEAD:metrics/metrics.json"))["adapter"]
    assert found["own_rows"]["accuracy"][1] == pytest.approx(block["accuracy"])
    assert found["cautions"] == []
    text = page(project, capfd, "main")
    assert "160 rows before, 159 after: 1 added, 2 removed, 1 relabelled, 1 with another text. 156 rows" in text
    assert "on the 156 test rows that both sides have alike, of 160 before and 159 after" in text
    assert "test, removed: `test-0`, `test-1`" in text
    assert "The test sets differ, so these columns do not compare" in text


def test_a_difference_out_of_another_test_set_is_no_progress(project: Reviewed, capfd: Output) -> None:
    # The same predictions for the rows that stay; 90 hard rows leave.
    path = project.folder / "data/predictions/adapter/test.parquet"
    table = pq.read_table(path)
    wrong = {row["id"] for row in table.to_pylist() if row["prediction"] != row["label"]}
    assert len(wrong) > 5

    def change(rows: list[Row]) -> list[Row]:
        return [row for row in rows if row["id"] not in wrong]

    edit_rows(work_of(project), "test", change)
    for name in ("adapter", "base", "tfidf", "majority"):
        predictions = project.folder / f"data/predictions/{name}/test.parquet"
        kept = pq.read_table(predictions)
        pq.write_table(kept.filter(pa.array([row not in wrong for row in kept["id"].to_pylist()])), predictions)
    project.commit("Drop what is hard")
    found = result(project, capfd, "change")
    assert (
        found["verdict"]["result"] == "no change"
        or result(project, capfd, "HEAD~1")["verdict"]["result"] == "no change"
    )
    found = result(project, capfd, "HEAD~1")
    before, after = found["own_rows"]["accuracy"]
    assert after == 1 > before
    assert found["metrics"]["accuracy"]["difference"] == 0


def test_verdicts_are_withheld_where_less_than_half_of_the_rows_are_common(project: Reviewed, capfd: Output) -> None:
    def change(rows: list[Row]) -> list[Row]:
        for number, row in enumerate(rows[:100]):
            row["id"] = f"new-{number}"
        return rows

    edit_rows(work_of(project), "test", change)
    predict(work_of(project), 3.0, seed=2)
    project.commit("Split again")
    found = result(project, capfd, "main")
    assert found["verdict"]["result"] == "withheld"
    assert {entry["verdict"] for entry in found["metrics"].values()} == {"withheld"}
    assert "**Withheld, since less than half of the test rows are common to both sides:**" in page(
        project, capfd, "main"
    )
    assert "accuracy cannot be judged. Withheld" in refused(project, capfd, "main", "--fail-on-regression", "accuracy")


def test_test_sets_without_a_common_row_are_said_to_be_that(project: Reviewed, capfd: Output) -> None:
    edit_rows(work_of(project), "test", lambda rows: [row | {"id": f"new-{row['id']}"} for row in rows])
    predict(work_of(project), 3.0, seed=2)
    project.commit("Other ids")
    found = result(project, capfd, "main")
    assert found["verdict"]["text"].startswith("Withheld: no test row of one side is in the other's test set")
    assert found["data"]["test"]["common"] == 0
    assert found["metrics"]["accuracy"]["p"] is None
    assert "accuracy cannot be judged" in refused(project, capfd, "main", "--fail-on-regression", "accuracy")


def test_rows_of_validation_that_changed_are_said(project: Reviewed, capfd: Output) -> None:
    edit_rows(work_of(project), "validation", lambda rows: rows[4:])
    predict(work_of(project), 3.0, seed=2)
    project.commit("Fewer rows to tune on")
    text = page(project, capfd, "main")
    assert "validation: 160 rows before, 156 after: 4 removed" in text
    assert "test: the same 160 rows on both sides" in text
    assert "validation, removed: `validation-0`" in text


# --- where its files come from ----------------------------------------------------------------------------------------


def objects_of(project: Reviewed, commit: str, output: str, *names: str) -> list[str]:
    """Paths in a remote of an output's directory object and of some files in it, at a commit."""
    lock = YAML(typ="safe").load(project.git("show", f"{commit}:dvc.lock"))
    outputs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}
    hashes = [outputs[output]]
    listing = project.folder / ".dvc/cache/files/md5" / hashes[0][:2] / hashes[0][2:]
    if hashes[0].endswith(".dir"):
        hashes += [entry["md5"] for entry in json.loads(listing.read_text()) if entry["relpath"] in names]
    assert len(hashes) == 1 + len(names)
    return [f"files/md5/{value[:2]}/{value[2:]}" for value in hashes]


def test_a_clone_reads_two_prediction_files_from_the_remote_and_nothing_else(
    finished: Reviewed, capfd: Output, tmp_path: Path
) -> None:
    clone = finished.clone(tmp_path / "clone")
    remote = tmp_path / "remote"
    for commit in ("main", "change"):
        for path in objects_of(finished, commit, "data/predictions/adapter", "test.parquet"):
            (remote / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished.folder.parent / "remote" / path, remote / path)
    clone.git("branch", "main", "origin/main")
    (clone.folder / ".dvc/config.local").write_text(f"['remote \"shared\"']\n    url = {remote}\n")
    found, expected = result(clone, capfd), result(finished, capfd)
    assert found == expected
    # Nothing is left behind either.
    assert clone.cached() == set()
    assert clone.git("status", "--porcelain") == ""
    assert not (clone.folder / "data/predictions/adapter").exists()


def test_a_branch_that_only_origin_has_is_main_too(finished: Reviewed, capfd: Output, tmp_path: Path) -> None:
    clone = finished.clone(tmp_path / "clone")
    (clone.folder / ".dvc/config.local").write_text(
        f"['remote \"shared\"']\n    url = {finished.folder.parent / 'remote'}\n"
    )
    assert clone.git("branch").split() == ["*", "change"]
    assert result(clone, capfd)["before"]["commit"] == finished.git("rev-parse", "main").strip()


def test_without_predictions_a_reviewer_still_gets_parameters_and_numbers(
    finished: Reviewed, capfd: Output, tmp_path: Path
) -> None:
    clone = finished.clone(tmp_path / "clone")
    clone.git("config", "advice.detachedHead", "false")
    (clone.folder / ".dvc/config.local").write_text(f"['remote \"shared\"']\n    url = {tmp_path / 'empty'}\n")
    found = result(clone, capfd)
    assert found["verdict"]["result"] == "cannot tell"
    expected = "data/predictions/adapter is neither in the cache nor in a remote (object "
    assert expected in found["verdict"]["text"]
    assert "is not in the remote 'shared'" in found["verdict"]["text"]
    assert found["metrics"]["f1_macro"]["before"] < found["metrics"]["f1_macro"]["after"]
    assert {entry["verdict"] for entry in found["metrics"].values()} == {"cannot tell"}
    text = page(clone, capfd)
    assert "| `finetune.learning_rate` | `0.001` | `0.002` |" in text
    assert "test: the same split on both sides, by dvc.lock" in text
    message = refused(clone, capfd, "--fail-on-regression", "f1_macro")
    assert "f1_macro cannot be judged. Cannot tell: predictions are missing" in message
    # Equal predictions are known by their hash.
    found = result(clone, capfd, "HEAD")
    assert found["verdict"]["text"].startswith("No change: dvc.lock has the same predictions")
    assert found["metrics"]["accuracy"]["p"] == 1
    assert clone.compare("HEAD", "--fail-on-regression", "f1_macro") == 0
    clone.git("config", "--file", ".dvc/config", "--remove-section", "core")
    assert "there is no default remote" in result(clone, capfd)["verdict"]["text"]


def test_a_damaged_object_is_not_believed(project: Reviewed, capfd: Output, tmp_path: Path) -> None:
    [_, path] = objects_of(project, "main", "data/predictions/adapter", "test.parquet")
    cached = project.folder / ".dvc/cache" / path
    cached.chmod(0o644)
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    remote = Path(shutil.copytree(finished_remote(project), tmp_path / "other-remote"))
    (project.folder / ".dvc/config.local").write_text(f"['remote \"shared\"']\n    url = {remote}\n")
    # The remote's is whole.
    assert result(project, capfd)["verdict"]["result"] == "better"
    (remote / path).chmod(0o644)
    (remote / path).write_bytes(b"short")
    said = result(project, capfd)["verdict"]["text"]
    assert said.count(" is damaged in ") == 2


def finished_remote(project: Reviewed) -> Path:
    """The folder that a copy's configuration names as its remote."""
    config = (project.folder / ".dvc/config").read_text()
    return Path(config.split("url = ")[1].splitlines()[0])


def test_a_remote_younger_than_a_revision_serves_it(project: Reviewed, capfd: Output) -> None:
    # The first commit's own .dvc/config knows no remote.
    project.git("checkout", "-q", "main")
    config = (project.folder / ".dvc/config").read_text()
    (project.folder / ".dvc/config").write_text("")
    project.git("commit", "-qam", "Forget the remote")
    project.git("checkout", "-q", "change")
    assert (project.folder / ".dvc/config").read_text() == config
    shutil.rmtree(project.folder / ".dvc/cache")
    shutil.rmtree(project.folder / "data")
    assert result(project, capfd, "main")["verdict"]["result"] == "better"


# --- what is only said ------------------------------------------------------------------------------------------------


def test_predictions_that_dvc_lock_does_not_name_are_warned_of(project: Reviewed, capfd: Output) -> None:
    predict(work_of(project), 5.0, seed=9)
    cautions = result(project, capfd)["cautions"]
    assert any("data/predictions/adapter is not what dvc.lock names" in caution for caution in cautions)
    assert any("metrics/metrics.json does not say what the predictions give" in caution for caution in cautions)
    assert "- Caution: the working tree: data/predictions/adapter is not what" in page(project, capfd)


def test_parameters_that_were_edited_and_not_run_are_warned_of(
    project: Reviewed, tmp_path: Path, capfd: Output
) -> None:
    project.edit("finetune.learning_rate", 0.5)
    [caution] = result(project, capfd)["cautions"]
    assert "params.yaml is not what its results were made with (finetune.learning_rate)" in caution
    assert project.compare("--output", str(tmp_path / "page.md")) == 0
    assert capfd.readouterr().err == f"caution: {caution}\n"


def test_metrics_that_were_edited_or_removed_are_warned_of(project: Reviewed, capfd: Output) -> None:
    path = project.folder / "metrics/metrics.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    warning = "the working tree: metrics/metrics.json is not what dvc.lock names"
    assert [caution for caution in result(project, capfd)["cautions"] if caution.startswith(warning)]
    path.unlink()
    assert [caution for caution in result(project, capfd)["cautions"] if caution.startswith(warning)]


def test_baselines_that_moved_are_said(project: Reviewed, capfd: Output) -> None:
    predict(work_of(project), 1.7, seed=4, predictor="tfidf")
    project.commit("Another library")
    found = result(project, capfd, "main")
    assert list(found["baselines"]) == ["tfidf"]
    text = page(project, capfd, "main")
    assert "## Baselines that moved" in text
    assert "- TF-IDF + logistic regression: " in text


@pytest.mark.parametrize(("deviation", "place"), [(0.5, "inside"), (0.001, "outside")])
def test_a_difference_is_compared_with_the_noise_of_seeds(
    project: Reviewed, capfd: Output, deviation: float, place: str
) -> None:
    made_with = configuration(YAML(typ="safe").load(project.folder / "dvc.lock"))
    noise = {
        "parameters": made_with,
        "seeds": [1, 2, 3, 4, 5],
        "metrics": {"adapter.f1_macro": {"mean": 0.8, "standard_deviation": deviation, "lowest": 0.7, "highest": 0.9}},
    }
    (project.folder / "metrics/noise.json").write_text(json.dumps(noise))
    found = result(project, capfd)
    # t(0.975, 4) = 2.776.
    assert found["metrics"]["f1_macro"]["noise"]["limit"] == pytest.approx(2.776 * 2**0.5 * deviation, rel=1e-3)
    assert found["metrics"]["f1_macro"]["noise"]["inside"] == (place == "inside")
    assert found["metrics"]["accuracy"]["noise"] is None
    assert found["cautions"] == []
    text = page(project, capfd)
    assert f"The difference lies {place} the noise of 5 seeds." in text
    assert "| noise of 5 seeds" in text
    # Other parameters; and another base, split, prompt or task.
    for other in ({"finetune": {"learning_rate": 9}}, {"inputs": "0" * 64}):
        (project.folder / "metrics/noise.json").write_text(json.dumps(noise | {"parameters": made_with | other}))
        [caution] = result(project, capfd)["cautions"]
        assert "measured with other training parameters, data, prompts, base or code than either side has" in caution
    (project.folder / "metrics/noise.json").write_text("{}")
    assert "seeds" not in page(project, capfd)


def test_what_comes_from_the_data_is_shown_as_it_is(tmp_path: Path, capfd: Output) -> None:
    project = Reviewed(tmp_path / "project")
    project.folder.mkdir()
    project.start()
    evil = "<script>alert(1)</script> **bold** | [a](javascript:b) `x` &amp; \u202e\x1b[2J\n# no heading"
    labels = ["<b>bad</b>", "so|so", "*good*"]
    work = Work(project.folder, labels, rows=60, publish_texts=True)
    for part in ("test", "validation"):
        edit_rows(work, part, lambda rows: [row | {"id": f"{evil}{row['id']}", "text": evil} for row in rows])
    predict(work, 0.5, seed=1)
    project.commit("One")
    predict(work, 4.0, seed=2)
    project.commit("Two")
    text = page(project, capfd, "HEAD~1")
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    html = page(project, capfd, "HEAD~1", "--html")
    for made in (rendered, html):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made
        for markup in ("<script", "<b>", "<strong>bold", "href=", "<em>good", "\u202e", "\x1b", "# no heading</h1"):
            assert markup not in made
        assert "alert(1)" in made
    # A sign in a cell makes no new column.
    rows = [row for row in rendered.split("<tr>") if "<td>" in row and "confidence" not in row and "alert" in row]
    assert {row.count("<td>") for row in rows} == {6}


def test_a_name_of_a_branch_or_a_message_of_a_remote_is_no_markup_either() -> None:
    line = "<i>x</i>: [a](b) *c* ~d~ <http://e> <!-- f --> $g$ &lt; | `code <j>` 0.1 < 0.2"
    blocks: list[Block] = [Heading(1, [line]), Paragraph([line]), Bullets([[line]]), Table(["a"], [[[line]]])]
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown_page(blocks))
    for made in (rendered, html_page(blocks, line)):
        assert not re.findall(r"<(i|em|a|s|!--)\b", made.partition("<body>")[2] or made)
        assert made.count("<code>code &lt;j&gt;</code>") == 4
    # A cell stays one cell, and what is shown is what was said.
    assert rendered.count("<td>") == 1
    assert "&lt;i&gt;x&lt;/i&gt;: [a](b) *c* ~d~ &lt;http://e&gt; &lt;!-- f --&gt; $g$ &amp;lt; | <code>" in rendered
    assert "0.1 &lt; 0.2" in rendered


# --- what cannot be compared ------------------------------------------------------------------------------------------


def test_an_unknown_revision_is_refused(finished: Reviewed, capfd: Output) -> None:
    expected = "nowhere: is no commit, branch, tag or experiment of this clone; `git fetch` brings"
    assert expected in refused(finished, capfd, "nowhere")
    assert expected in refused(finished, capfd, "main", "nowhere")


def test_a_shallow_clone_without_a_merge_base_is_refused_with_the_way_out(
    finished: Reviewed, capfd: Output, tmp_path: Path
) -> None:
    clone = finished.clone(tmp_path / "clone", "--depth", "1", "--no-single-branch")
    message = refused(clone, capfd)
    assert "HEAD and origin/main have no commit in common. This clone is shallow: `git fetch --unshallow`" in message
    alone = finished.clone(tmp_path / "alone", "--depth", "1")
    assert "there is no branch main or origin/main to compare with. Name a revision" in refused(alone, capfd)
    assert "`git fetch --unshallow` brings the history" in refused(alone, capfd, "HEAD~1")


@pytest.mark.parametrize("arguments", [[""], ["main", ""], [" "]])
def test_an_empty_revision_is_refused(finished: Reviewed, capfd: Output, arguments: list[str]) -> None:
    assert "is no revision. Give a commit, branch, tag or experiment" in refused(finished, capfd, *arguments)


def test_a_revision_without_results_is_refused(project: Reviewed, capfd: Output) -> None:
    project.git("checkout", "-q", "--orphan", "early")
    project.git("rm", "-q", "--cached", "dvc.lock")
    project.git("commit", "-qm", "Before the first run")
    expected = "early: has no dvc.lock, so there are no results to compare. Name a revision whose results were"
    # What is to be compared with has yet to be made: not the fault of the other side.
    assert expected in refused(project, capfd, "early", "main", code=4)
    assert expected in refused(project, capfd, "main", "early")
    (project.folder / "dvc.lock").unlink()
    assert "the working tree: has no dvc.lock, so there are no results to compare. Run `dvc repro`" in refused(
        project, capfd, "main"
    )


def test_a_task_from_before_several_labels_were_possible_is_one_of_one_label(project: Reviewed, capfd: Output) -> None:
    block = project.params()["task"]
    del block["multi_label"]
    project.git("checkout", "-q", "main")
    project.edit("task", block)
    project.git("commit", "-qam", "As it was")
    project.git("checkout", "-q", "change")
    assert result(project, capfd, "main")["verdict"]["result"] == "better"


def test_another_task_cannot_be_compared(project: Reviewed, capfd: Output) -> None:
    project.edit("task.labels", ["bad", "good", "fine"])
    message = refused(project, capfd, code=4)
    assert (
        "cannot be compared: they are about different tasks (task.labels is ['bad', 'so-so', 'good'], then" in message
    )
    project.edit("task", {"kind": "chat"})
    assert "task.kind is 'classification', then 'chat'" in refused(project, capfd, code=4)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("dvc.lock", "<<<<<<< ours\nstages: {\n", "dvc.lock is not valid YAML in UTF-8 (an open merge conflict?)"),
        ("params.yaml", "- 1\n", "params.yaml holds no keys"),
        ("metrics/metrics.json", "<<<<<<<", "metrics/metrics.json is not valid JSON (an open merge conflict?)"),
        ("models/decision.json", "{", ""),
        ("dvc.lock", "schema: '2.0'\nstages:\n", "has no stage in dvc.lock, so there are no results to compare"),
        ("dvc.lock", "stages: {infer: {outs: [1]}}\n", "dvc.lock is not as DVC writes it"),
        ("metrics/metrics.json", '{"adapter": {"accuracy": null}}', "metrics/metrics.json has something else than"),
        ("metrics/metrics.json", '{"base": {"brier": NaN}}', "metrics/metrics.json has something else than finite"),
        ("metrics/metrics.json", '{"adapter": 1}', "metrics/metrics.json has something else than finite numbers in"),
        ("metrics/metrics.json", '{"adapter": {"per_class": 1}}', "metrics/metrics.json has something else than"),
        ("metrics/noise.json", '{"seeds": [1]}', "metrics/noise.json lacks metrics, parameters"),
        (
            "metrics/noise.json",
            '{"seeds": [1, 2], "metrics": [], "parameters": []}',
            "metrics/noise.json lacks metrics",
        ),
        (
            "metrics/noise.json",
            '{"seeds": [1, 2], "metrics": {"adapter.f1_macro": 1}, "parameters": {"finetune": {}}}',
            "metrics/noise.json lacks metrics.adapter.f1_macro.standard_deviation",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    project: Reviewed, capfd: Output, name: str, content: str, expected: str
) -> None:
    (project.folder / name).write_text(content)
    if expected:
        assert f"the working tree: {expected}" in refused(project, capfd)
    else:
        # Three labels are decided without it.
        assert project.compare() == 0


def test_a_block_that_this_code_cannot_use_is_named(project: Reviewed, capfd: Output) -> None:
    project.edit("evaluate.bootstrap_samples", 3)
    assert "the working tree: params.yaml is not usable by this version of the code:" in refused(project, capfd)
    project.edit("evaluate", None)
    assert "evaluate" in refused(project, capfd)


def test_blocks_that_hold_nothing_or_do_not_suit_the_task_are_named(project: Reviewed, capfd: Output) -> None:
    block = project.params()["task"]
    project.edit("task", None)
    project.git("commit", "-qam", "An empty block")
    assert "the working tree: params.yaml is not usable" in refused(project, capfd)
    project.edit("task", block)
    assert "HEAD: in params.yaml the block task holds no keys" in refused(project, capfd, "HEAD")
    project.edit("evaluate.calibration_bins", None)
    assert "evaluate.calibration_bins: is needed with the task" in refused(project, capfd, "main")


def test_parameters_that_json_has_no_word_for_are_shown_as_texts(project: Reviewed, capfd: Output) -> None:
    project.edit("finetune.learning_rate", float("inf"))
    [changed] = result(project, capfd)["parameters"]
    assert changed == {"key": "finetune.learning_rate", "before": 0.001, "after": "Infinity"}


def test_another_folder_than_the_root_is_refused(finished: Reviewed, capfd: Output, tmp_path: Path) -> None:
    for folder in (tmp_path, finished.folder / "metrics"):
        assert "Run this in the root of the" in refused(Reviewed(folder), capfd)


def test_a_repository_in_a_folder_of_another_one_works(tmp_path: Path, capfd: Output) -> None:
    outer = Reviewed(tmp_path)
    outer.git("init", "-q", "-b", "main")
    project = Reviewed(tmp_path / "inside")
    project.folder.mkdir()
    with project.entered():
        from dvc.repo import Repo

        Repo.init(subdir=True).close()
    (project.folder / "dvc.yaml").write_text(DVC_YAML)
    (project.folder / ".gitignore").write_text("/data\n/models\n/metrics/evaluation\n")
    work = Work(project.folder, LABELS, rows=60)
    project.commit("One")
    predict(work, 4.0, seed=2)
    project.commit("Two")
    assert result(project, capfd, "HEAD~1")["data"]["test"]["common"] == 60
