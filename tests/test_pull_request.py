"""Reviewing a pull request for real: clones of a repository with a remote, and the very commands of the workflows."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from review import pull_request
from review.file_values import differences
from stages.common.errors import UserError
from tests.forge_server import ACTIONS_TOKEN, GITLAB_TOKEN, HEAD, serve, variables
from tests.project import Project

WORKFLOWS = Path(__file__).resolve().parents[1] / ".github/workflows"


# A runner's shell finds the commands of the environment.
PATH = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}


@pytest.fixture(scope="module")
def repository(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """`main` with all results, `change` with other intervals, both pushed to a folder."""
    folder = tmp_path_factory.mktemp("review")
    repository = finished_project.copy(folder / "repository")
    repository.dvc("remote", "add", "--default", "storage", str(folder / "remote"))
    repository.commit("Add a remote")
    repository.dvc("push", "-q")
    repository.git("checkout", "-qb", "change")
    repository.edit_params("evaluate.bootstrap_samples", 200)
    repository.repro()
    repository.commit("Draw more samples")
    repository.dvc("push", "-q")
    return repository


@pytest.fixture
def fresh(repository: Project, tmp_path: Path) -> Project:
    """A clone of the branch `change` that has pulled nothing."""
    return repository.clone(tmp_path / "clone", "change")


@pytest.fixture(scope="module")
def pulled_once(repository: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = repository.clone(tmp_path_factory.mktemp("pulled") / "clone", "change")
    clone.dvc("pull", "-q")
    return clone.folder


@pytest.fixture
def pulled(pulled_once: Path, tmp_path: Path) -> Project:
    """The same with everything pulled; to be changed."""
    return Project(Path(shutil.copytree(pulled_once, tmp_path / "clone", symlinks=True)))


# review.check


def would_run(message: str) -> set[str]:
    found = re.search(r"stages would run \(([^)]*)\)", message)
    assert found, message
    return set(found[1].split(", "))


def test_a_clone_that_pulled_nothing_is_up_to_date(fresh: Project) -> None:
    assert "none of 11 stages would run" in fresh.python("-m", "review.check")
    assert fresh.git("status", "--porcelain") == ""


EDITS: dict[str, tuple[Any, set[str], str]] = {
    "a parameter": (
        lambda clone: clone.edit_params("finetune.learning_rate", 0.5), {"finetune"},
        "params.yaml: finetune.learning_rate is 0.5, in dvc.lock 0.001 (finetune)",
    ),
    "an empty block": (
        lambda clone: clone.edit_params("split.more", {}), {"split"},
        "params.yaml: split.more is {}, in dvc.lock absent (split)",
    ),
    "a comment": (
        lambda clone: clone.edit_file("stages/split.py", "import math\n", "import math  # why\n"), {"code", "split"},
        "stages/split.py is not what it ran with (split)",
    ),
    "a metric": (
        lambda clone: clone.edit_file("metrics/metrics.json", '"n": ', '"n": 1'), {"evaluate", "report"},
        "metrics/metrics.json is not what it wrote (evaluate)",
    ),
    "a command": (
        lambda clone: clone.edit_file("dvc.yaml", "cmd: python -m stages.report", "cmd: python -B -m stages.report"),
        {"report"}, "its command in dvc.yaml is not the one that ran (report)",
    ),
    "a row": (
        lambda clone: clone.edit_file("data/raw/reviews.csv", ",bad\n", ",good\n"), {"ingest"},
        "data/raw is not what it ran with (ingest)",
    ),
    "a dependency": (
        lambda clone: clone.edit_file("dvc.yaml", "- stages/split.py\n", "- stages/split.py\n      - params.yaml\n"),
        {"split"}, "params.yaml is a new dependency (split)",
    ),
    "a pin": (
        lambda clone: clone.edit_file("requirements.txt", "torch==", "torch==9"), {"code", "baseline", "evaluate"},
        "requirements.txt is not what it ran with (code, baseline, evaluate)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_check_names_the_stages_that_dvc_would_run_and_why(fresh: Project, edit: str) -> None:
    change, stages, reason = EDITS[edit]
    change(fresh)
    message = fresh.python("-m", "review.check", fails=True)
    assert would_run(message) == stages
    assert reason in message
    assert "Run `dvc repro`" in message


def test_check_agrees_with_dvc_where_nothing_is_absent(pulled: Project) -> None:
    # Without its inputs a stage that would run ends DVC's dry run.
    for name in ("a parameter", "a command", "a row"):
        EDITS[name][0](pulled)
    dry_run = pulled.dvc("repro", "--dry", "--allow-missing")
    assert would_run(pulled.python("-m", "review.check", fails=True)) == set(
        re.findall(r"Running stage '(\w+)'", dry_run)
    )


def test_what_git_lacks_is_named_though_dvc_takes_it_for_unchanged(fresh: Project) -> None:
    for name in ("metrics/training.json", "stages/common/strata.py"):
        (fresh.folder / name).unlink()
    message = fresh.python("-m", "review.check", fails=True)
    assert "metrics/training.json is not there; Git has to have it (evaluate)" in message
    assert "stages/common/strata.py is not there; Git has to have it (split)" in message


def test_a_lock_of_two_runs_is_named(fresh: Project) -> None:
    yaml = YAML()
    lock = yaml.load(fresh.folder / "dvc.lock")
    [adapter] = [output for output in lock["stages"]["finetune"]["outs"] if output["path"] == "models/adapter"]
    adapter["md5"] = f"{'0' * 32}.dir"
    yaml.dump(lock, fresh.folder / "dvc.lock")
    message = fresh.python("-m", "review.check", fails=True)
    assert "models/adapter is in dvc.lock not what finetune wrote: the lock mixes two runs (infer)" in message


def test_a_lock_that_is_absent_or_broken_is_named(fresh: Project) -> None:
    lock = fresh.read("dvc.lock")
    (fresh.folder / "dvc.lock").unlink()
    assert "dvc.lock has no entry for it (code, base_model" in fresh.python("-m", "review.check", fails=True)
    fresh.write("dvc.lock", f"<<<<<<< HEAD\n{lock}")
    assert "dvc.lock could not be checked: " in fresh.python("-m", "review.check", fails=True)


LOST = "no list in the cache"
PART = ["data/splits/test.parquet", "models/adapter/README.md"]


def test_folders_that_were_pulled_in_part_are_up_to_date(fresh: Project) -> None:
    fresh.dvc("pull", *PART)
    assert not (fresh.folder / "data/splits/train.parquet").exists()
    assert not (fresh.folder / "models/adapter/adapter_model.safetensors").exists()
    assert "none of 11 stages would run" in fresh.python("-m", "review.check")


@pytest.mark.parametrize("change", ["another content", "a file more", LOST])
def test_folders_that_were_pulled_in_part_and_changed_are_named(fresh: Project, change: str) -> None:
    fresh.dvc("pull", *PART)
    if change == "another content":
        (fresh.folder / PART[0]).unlink()
        fresh.write(PART[0], "other rows")
    elif change == "a file more":
        fresh.write("data/splits/more.parquet", "rows")
    else:
        for listing in (fresh.folder / ".dvc/cache/files/md5").glob("*/*.dir"):
            listing.unlink()
    message = fresh.python("-m", "review.check", fails=True)
    assert "data/splits is not what it wrote (split)" in message
    assert ("models/adapter is not what it wrote (finetune)" in message) == (change == LOST)


@pytest.mark.parametrize("module", ["review.check", "review.recompute"])
def test_commands_without_options_show_help_and_refuse_others(fresh: Project, module: str) -> None:
    assert f"usage: python -m {module}" in fresh.python("-m", module, "--help")
    assert "unrecognized arguments: --nonsense" in fresh.python("-m", module, "--nonsense", fails=True)


@pytest.fixture(scope="module")
def private(pulled_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that lacks one of five tables, which is behind a `.dvc` file."""
    folder = tmp_path_factory.mktemp("private")
    project = Project(Path(shutil.copytree(pulled_once, folder / "project", symlinks=True)))
    # The others add no row, so that no other stage gets other inputs.
    others = [f"data/raw/reviews-{number}.csv" for number in range(1, 5)]
    for name in others:
        project.write(name, project.read("data/raw/reviews.csv").splitlines()[0] + "\n")
    project.edit_params("ingest.source.paths", ["data/raw/reviews.csv", *others])
    project.git("rm", "-q", "--cached", "data/raw/reviews.csv")
    project.dvc("add", "-q", "data/raw/reviews.csv")
    project.dvc("repro", "-q", "ingest", "report")
    project.commit("Keep a table out of Git")
    return project.clone(folder / "other/clone", "change").folder


@pytest.fixture
def lacking(private: Path, tmp_path: Path) -> Project:
    """The same; to be changed."""
    return Project(Path(shutil.copytree(private, tmp_path / "clone")))


def test_private_tables_behind_a_dvc_file_need_not_be_pulled(lacking: Project) -> None:
    assert not (lacking.folder / "data/raw/reviews.csv").exists()
    assert "none of 11 stages would run" in lacking.python("-m", "review.check")
    lacking.edit_file("data/raw/reviews.csv.dvc", "md5: ", "md5: 0")
    assert would_run(lacking.python("-m", "review.check", fails=True)) == {"ingest"}


def test_a_change_near_the_end_of_a_long_list_is_named_though_a_private_table_is_absent(lacking: Project) -> None:
    lacking.edit_file("params.yaml", "data/raw/reviews-4.csv", "data/raw/renamed.csv")
    message = lacking.python("-m", "review.check", fails=True)
    assert would_run(message) == {"ingest"}
    [now, before] = re.findall(r"ingest.source.paths is (.*), in dvc.lock (.*) \(ingest\)", message)[0]
    assert now.startswith("…")
    assert now.endswith("'data/raw/renamed.csv']")
    assert before.endswith("'data/raw/reviews-4.csv']")


def test_a_stage_that_always_runs_is_named_though_a_private_table_is_absent(lacking: Project) -> None:
    lacking.edit_file(
        "dvc.yaml", "cmd: python -m stages.ingest", "always_changed: true\n    cmd: python -m stages.ingest"
    )
    message = lacking.python("-m", "review.check", fails=True)
    assert would_run(message) == {"ingest"}
    assert "DVC finds it changed" in message


# review.recompute


def test_committed_metrics_are_recomputed_and_nothing_here_is_written(pulled: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in pulled.folder.glob("[dm]*/**/*")}
    output = pulled.python("-m", "review.recompute")
    assert "the committed metrics are what evaluate makes" in output
    assert "compared" not in output
    assert {path: path.stat().st_mtime_ns for path in pulled.folder.glob("[dm]*/**/*")} == before


def test_a_changed_number_is_named_with_both_values(pulled: Project) -> None:
    metrics = json.loads(pulled.read("metrics/metrics.json"))
    true = metrics["adapter"]["log_loss"]
    metrics["adapter"]["log_loss"] = 0.125
    metrics["adapter"]["n"] += 1
    pulled.write("metrics/metrics.json", json.dumps(metrics))
    pulled.edit_file("metrics/evaluation/loss.csv", "series", "serie")
    (pulled.folder / "models/decision.json").unlink()
    pulled.write("models/decision.json", "{}")
    message = pulled.python("-m", "review.recompute", fails=True)
    assert f"metrics/metrics.json: adapter.log_loss: committed 0.125, recomputed {true!r}" in message
    assert "metrics/metrics.json: adapter.n: committed " in message
    assert "metrics/evaluation/loss.csv: columns: committed " in message
    assert "models/decision.json: " in message
    assert "Run `dvc pull`, then `dvc repro evaluate report`" in message
    assert json.loads(pulled.read("metrics/metrics.json")) == metrics


@pytest.mark.parametrize(
    ("name", "committed", "recomputed", "places"),
    [
        ("a.json", '{"x": {"loss": 0.5}}', '{"x": {"loss": 0.500000000001}}', []),
        ("a.json", '{"x": {"loss": 0.5}}', '{"x": {"loss": 0.50000001}}', ["a.json: x.loss"]),
        ("a.json", '{"n": 5, "k": 1.0}', '{"n": 6, "k": 1}', ["a.json: n"]),
        ("a.json", '{"n": 5}', '{"n": true}', ["a.json: n"]),
        ("a.json", '{"labels": ["a", "b"]}', '{"labels": ["a"]}', ["a.json: labels.1"]),
        ("a.json", '{"rules": {}}', '{"rules": {"cut": null}}', ["a.json: rules", "a.json: rules.cut"]),
        ("a.csv", "id,p\n007,0.1\n", "id,p\n007,0.10000000000001\n", []),
        ("a.csv", "id,p\n007,0.1\n", "id,p\n7,0.2\n", ["a.csv: row 1, id", "a.csv: row 1, p"]),
        ("a.csv", "id,p\n1,0.1\n", "id,p\n1,0.1\n2,0.1\n", ["a.csv: row 2, id", "a.csv: row 2, p"]),
        ("a.csv", "id,p\n", "p,id\n", ["a.csv: columns"]),
        ("a.md", "one\ntwo\n", "one\n2\n", ["a.md: line 2"]),
    ],
)
def test_counts_and_texts_are_compared_exactly_and_other_numbers_but_for_their_last_digits(
    tmp_path: Path, name: str, committed: str, recomputed: str, places: list[str]
) -> None:
    (tmp_path / f"before.{name}").write_text(committed, encoding="utf-8")
    (tmp_path / f"after.{name}").write_text(recomputed, encoding="utf-8")
    found = differences(Path(name), tmp_path / f"before.{name}", tmp_path / f"after.{name}")
    assert [one.place for one in found] == places


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.md"])
@pytest.mark.parametrize("committed", [b'{"label": "caf\xe9"}', b"\xff\xfe{\x00}\x00"])
def test_a_committed_file_that_is_not_in_utf8_gets_one_message(tmp_path: Path, name: str, committed: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(committed)
    (tmp_path / f"after.{name}").write_text('{"label": "café"}', encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: is "):
        differences(Path(name), path, tmp_path / f"after.{name}")


def test_a_committed_table_with_an_endless_cell_gets_one_message(tmp_path: Path) -> None:
    for name in ("a.csv", "after.a.csv"):
        (tmp_path / name).write_text(f"id\n{'x' * 200_000}\n", encoding="utf-8")
    # A process that has read users' tables allows longer cells.
    limit = csv.field_size_limit(131_072)
    try:
        with pytest.raises(UserError, match=r"field larger than field limit"):
            differences(Path("a.csv"), tmp_path / "a.csv", tmp_path / "after.a.csv")
    finally:
        csv.field_size_limit(limit)


def test_a_report_that_was_edited_is_named(pulled: Project) -> None:
    pulled.edit_file("metrics/report.md", "macro-F1", "micro-F1")
    assert "metrics/report.md: line " in pulled.python("-m", "review.recompute", fails=True)


def test_absent_predictions_are_named_with_the_command_that_fetches_them(fresh: Project) -> None:
    message = fresh.python("-m", "review.recompute", fails=True)
    command = re.search(r"`dvc (pull [^`]*)`", message)
    assert command
    fresh.dvc(*command[1].split())
    assert not (fresh.folder / "models/adapter/adapter_model.safetensors").exists()
    assert not (fresh.folder / "data/splits/train.parquet").exists()


def test_other_predictions_than_the_locks_are_refused(pulled: Project) -> None:
    shutil.rmtree(pulled.folder / "data/predictions/adapter")
    shutil.copytree(pulled.folder / "data/predictions/base", pulled.folder / "data/predictions/adapter")
    message = pulled.python("-m", "review.recompute", fails=True)
    assert "data/predictions/adapter: not what dvc.lock names" in message


# The workflows' own commands


def steps_of(workflow: str, job: str) -> dict[str, dict[str, Any]]:
    """The steps of a job that run a command, by name."""
    jobs = YAML(typ="safe").load((WORKFLOWS / workflow).read_text(encoding="utf-8"))["jobs"]
    return {step["name"]: step for step in jobs[job]["steps"] if "run" in step}


def run_step(clone: Project, step: dict[str, Any], values: dict[str, str], fails: bool = False) -> str:
    """Run a step's command as a runner does; `values` are what its expressions and the runner's variables would be."""
    constants = {name: value for name, value in step.get("env", {}).items() if "${{" not in value}
    expressions = step.get("env", {}).keys() - constants.keys()
    assert not {name for name in expressions - values.keys() if not name.startswith("AWS_")}
    assert "${{" not in step["run"]
    return clone.run("bash", "-eo", "pipefail", "-c", step["run"], fails=fails, environment=PATH | constants | values)


def run_review(clone: Project, predictions: str = "required", fails: bool = False) -> str:
    """The review job's steps behind the installation; the comment that they leave."""
    steps = steps_of("review.yml", "review")
    run_step(clone, steps["Review"], {"GITHUB_BASE_REF": "main", "PREDICTIONS": predictions}, fails)
    run_step(clone, steps["Note the number for comment-on-fork.yml"], {"NUMBER": "12"})
    return clone.read("review-results/comment.md")


def results(comment: str) -> dict[str, str]:
    cells = re.findall(r"^\| ([^|]+?) +\| ([^|]+?) +\|$", comment, flags=re.MULTILINE)
    return dict(cells)


LOCK = "`dvc.lock` belongs to code, parameters and data"
METRICS = "The committed metrics follow from the predictions"
PREDICTIONS = "Predictions are at hand"


def test_githubs_commands_review_and_comment_on_a_pull_request(fresh: Project) -> None:
    found = results(run_review(fresh))
    assert found[LOCK] == found[METRICS] == found[PREDICTIONS] == "yes"
    assert found["Comparison"] == "below"
    assert "Confusion matrix" in fresh.read("review-results/plots/index.html")
    # What is expensive or private stays where it is.
    assert not (fresh.folder / "models/adapter/adapter_model.safetensors").exists()
    assert not (fresh.folder / "data/splits/train.parquet").exists()
    assert not (fresh.folder / "data/records.parquet").exists()
    post = steps_of("review.yml", "comment")["Post or update the comment"]
    with serve() as forge:
        github = variables(forge, ACTIONS_TOKEN) | {
            "GITHUB_SERVER_URL": "https://example.org", "GITHUB_RUN_ID": "77", "NUMBER": "12", "HEAD_SHA": HEAD,
        }  # fmt: skip
        run_step(fresh, post, github)
        run_step(fresh, post, github)
        [comment] = forge.comments
    assert "https://example.org/owner/name/actions/runs/77#artifacts" in comment["body"]
    assert METRICS in comment["body"]


def test_a_forks_results_are_posted_by_the_other_workflow(fresh: Project) -> None:
    # A fork's run has no credentials: here the remote is somewhere that nobody can reach.
    fresh.dvc("remote", "modify", "storage", "url", str(fresh.folder / "nowhere/remote"))
    fresh.commit("A remote out of reach")
    found = results(run_review(fresh, predictions="optional"))
    assert found[LOCK] == "yes"
    assert found[PREDICTIONS].startswith("no: this run has no access to the remote")
    assert found[METRICS] == "not checked"
    post = steps_of("comment-on-fork.yml", "comment")["Post or update the comment"]
    with serve() as forge:
        github = variables(forge, ACTIONS_TOKEN) | {"RUN_URL": "https://example.org/runs/77", "HEAD_SHA": HEAD}
        run_step(fresh, post, github)
        assert "fork's own code" in forge.comments[0]["body"]
        fresh.write("review-results/number.txt", "13\n")
        run_step(fresh, post, github, fails=True)
        fresh.write("review-results/number.txt", "12\n")
        assert "its newest commit is" in run_step(fresh, post, github | {"HEAD_SHA": "b" * 40}, fails=True)
        assert len(forge.comments) == 1


def test_predictions_that_nobody_pushed_fail_the_review_where_they_are_required(fresh: Project) -> None:
    (fresh.folder.parent / "empty").mkdir()
    fresh.dvc("remote", "modify", "storage", "url", str(fresh.folder.parent / "empty"))
    comment = run_review(fresh, fails=True)
    assert results(comment)[PREDICTIONS] == "**no: the remote refuses, or the author has yet to `dvc push`**"
    assert results(comment)[METRICS] == "not checked"
    # DVC's own words, with the names of what is missing.
    assert "data/predictions/adapter" in comment


def test_gitlabs_commands_without_a_remote_check_the_lock_and_say_what_is_missing(
    fresh: Project, repository: Project
) -> None:
    fresh.dvc("remote", "remove", "storage")
    jobs = YAML(typ="safe").load((WORKFLOWS.parents[1] / ".gitlab-ci.yml").read_text(encoding="utf-8"))
    of_forks, install, review = jobs["review"]["script"]
    assert "pip install" in install
    with serve() as forge:
        values = variables(forge, GITLAB_TOKEN) | {
            "CI_MERGE_REQUEST_DIFF_BASE_SHA": repository.git("rev-parse", "main").strip(),
            "CI_MERGE_REQUEST_PROJECT_ID": "7", "CI_MERGE_REQUEST_IID": "12", "CI_COMMIT_SHA": HEAD,
            "PREDICTIONS": "required", "LINK": "https://example.org/pipelines/77",
        }  # fmt: skip
        fresh.run("bash", "-eo", "pipefail", "-c", f"{of_forks}\n{review}", environment=PATH | values)
        for _ in range(2):
            fresh.run("bash", "-eo", "pipefail", "-c", *jobs["comment"]["script"], environment=PATH | values)
        [comment] = forge.comments
    found = results(comment["body"])
    assert found[LOCK] == "yes"
    assert found[PREDICTIONS].startswith("no: the repository has no default remote")
    assert found[METRICS] == "not checked"


def test_a_pull_request_with_invented_metrics_and_a_stale_lock_fails_and_says_why(fresh: Project) -> None:
    fresh.edit_params("finetune.learning_rate", 0.7)
    metrics = json.loads(fresh.read("metrics/metrics.json"))
    metrics["adapter"]["f1_macro"] = 0.99
    fresh.write("metrics/metrics.json", json.dumps(metrics))
    fresh.commit("State of the art")
    comment = run_review(fresh, fails=True)
    found = results(comment)
    assert found[LOCK] == found[METRICS] == "**no**"
    assert "finetune.learning_rate is 0.7, in dvc.lock 0.001" in comment
    assert "adapter.f1_macro: committed 0.99, recomputed" in comment


COMPARE = ["-m", "review.compare"]


@pytest.mark.parametrize(("status", "failed"), [(4, False), (1, True), (2, True), (-9, True)])
def test_only_a_comparison_that_would_mean_nothing_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, failed: bool
) -> None:
    def run(command: list[str]) -> tuple[int, str]:
        return (status, "error: other labels\n") if command[1:3] == COMPARE else (0, f"table of {command[1]}\n")

    monkeypatch.setattr(pull_request, "run", run)
    step = pull_request._compare("a" * 40, tmp_path, available=True)
    assert step.failed == failed
    assert step.said == "error: other labels\n"
    assert "table of params" in step.markdown
    assert "table of metrics" in step.markdown
    shown = results(pull_request.comment("a" * 40, [step]))["Comparison"]
    assert shown.startswith("**not possible" if failed else "not comparable")


def test_a_pull_request_that_adds_a_label_can_pass(fresh: Project) -> None:
    fresh.edit_params("task.labels", ["bad", "so-so", "good", "superb"])
    fresh.commit("Add a label")
    # Its lock is stale here: training takes too long. The comparison has nothing against it.
    comment = run_review(fresh, fails=True)
    assert results(comment)["Comparison"] == "not comparable; the plain numbers are below"
    assert "superb" in comment


def test_a_base_that_has_no_results_yet_is_no_failure(fresh: Project) -> None:
    [first] = fresh.git("rev-list", "--max-parents=0", "HEAD").split()
    fresh.python("-m", "review.pull_request", "--base", first, "--output", "review-results")
    found = results(fresh.read("review-results/comment.md"))
    assert found[LOCK] == found[METRICS] == "yes"
    assert found["Comparison"] == "not comparable; the plain numbers are below"


def test_a_second_review_of_the_same_clone_passes_too_and_takes_the_branch_of_origin(fresh: Project) -> None:
    assert fresh.git("branch", "--list", "main") == ""
    for _ in range(2):
        fresh.python("-m", "review.pull_request", "--output", "review-results")
        assert results(fresh.read("review-results/comment.md"))[LOCK] == "yes"
    left = fresh.git("merge-base", "origin/main", "HEAD").strip()
    assert f"Compared with `{left[:10]}`" in fresh.read("review-results/comment.md")


def test_a_clone_without_the_base_says_so(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fresh.folder)
    fresh.git("update-ref", "-d", "refs/remotes/origin/main")
    with pytest.raises(UserError, match="there is no branch main or origin/main here: `git fetch origin main:main`"):
        pull_request.merge_base("main")
    way_out = "there is no branch origin/main here: `git fetch origin main:refs/remotes/origin/main`"
    with pytest.raises(UserError, match=way_out):
        pull_request.merge_base("origin/main")
    fresh.git("fetch", "origin", "main:refs/remotes/origin/main")
    assert len(pull_request.merge_base("origin/main")) == 40


def test_only_a_shallow_clone_is_told_to_fetch_the_history(
    fresh: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fresh.folder)
    fresh.git("checkout", "-q", "--orphan", "other")
    fresh.commit("Another beginning")
    with pytest.raises(UserError, match="has no commit in common with HEAD") as whole:
        pull_request.merge_base("origin/main")
    assert "--unshallow" not in str(whole.value)
    url = f"file://{fresh.folder}"
    fresh.git("clone", "-q", "--depth", "1", "--branch", "change", "--no-single-branch", url, str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    for base in ("origin/other", "HEAD~1"):
        with pytest.raises(UserError, match="git fetch --unshallow"):
            pull_request.merge_base(base)
