"""The noise floor: seeds of one configuration, trained as experiments with real git, real dvc and a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dvc.repo import Repo

from review.noise import chosen_seeds, spreads
from review.trials import check_unmoved, committed_trial, configuration, tidied
from stages.common.errors import UserError
from tests.experiments import experiments_of, lock_of
from tests.project import ROOT, Project

NOISE = Path("metrics/noise.json")


def start(project: Project, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "review.noise", *arguments]
    return subprocess.Popen(
        command, cwd=project.folder, env=project.environment | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Where tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(project: Project, *arguments: str, exit_code: int = 0, **environment: str) -> tuple[str, str]:
    """Standard output, and standard error."""
    process = start(project, *arguments, **environment)
    output, errors = process.communicate()
    assert process.returncode == exit_code, output + errors
    return output, errors


def noise_of(project: Project) -> dict[str, Any]:
    return json.loads((project.folder / NOISE).read_text(encoding="utf-8"))


def leftovers(project: Project) -> list[str]:
    """What is left of experiments that did not end: temporary folders, and what waits to be run."""
    folders = [str(path) for path in project.folder.glob(".dvc/tmp/exps/standalone/tmp*")]
    return folders + project.git("for-each-ref", "refs/exps/stash", "refs/exps/celery").splitlines()


@pytest.fixture(scope="module")
def project(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A trained project in which the tests of this file follow each other."""
    return finished_project.copy(tmp_path_factory.mktemp("noise") / "repository")


def test_a_number_of_seeds_starts_with_the_committed_one_and_a_list_is_taken_as_it_is() -> None:
    assert chosen_seeds("3", committed=42) == [42, 43, 44]
    assert chosen_seeds("7,3,5", committed=42) == [3, 5, 7]
    assert chosen_seeds("2", committed=2**32 - 1) == [0, 2**32 - 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1", "two or more"),
        ("0", "two or more"),
        ("-3", "two or more"),
        ("7,7", "different"),
        ("7,", "no list of numbers"),
        ("five", "no number"),
        ("1.5", "no number"),
        ("1,-1", "-1 is no seed"),
        ("1,4294967296", "4294967296 is no seed"),
    ],
)
def test_what_is_no_choice_of_seeds_is_refused_with_what_is_allowed(text: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as error:
        chosen_seeds(text, committed=42)
    assert "--seeds 1,2,3" in str(error.value)


def test_the_spread_of_each_number_is_that_of_numpy() -> None:
    values = [0.81, 0.79, 0.84]
    measured = [
        {"adapter": {"f1": value, "per_class": {"a": {"f1": value / 2}}}, "base": {"f1": 0}} for value in values
    ]
    found = spreads(measured)
    assert list(found) == ["adapter.f1", "adapter.per_class.a.f1"]
    assert found["adapter.f1"]["mean"] == pytest.approx(np.mean(values))
    assert found["adapter.f1"]["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert (found["adapter.f1"]["lowest"], found["adapter.f1"]["highest"]) == (0.79, 0.84)
    assert found["adapter.per_class.a.f1"]["mean"] == pytest.approx(np.mean(values) / 2)


def test_what_only_some_seeds_have_is_left_out() -> None:
    measured: list[dict[str, Any]] = [{"adapter": {"n": 4, "ece": 0.1, "auc": None}}, {"adapter": {"n": 4, "auc": 0.5}}]
    assert list(spreads(measured)) == ["adapter.n"]


def test_the_configuration_names_all_that_decides_the_numbers_but_the_seed(finished_project: Project) -> None:
    def lock() -> dict[str, Any]:
        return {"stages": lock_of(finished_project, "HEAD")}

    def block(name: str, key: str) -> dict[str, Any]:
        return changed["stages"][name]["params"]["params.yaml"][key]

    before = configuration(lock())
    assert before["finetune"]["learning_rate"] == 0.001
    assert "seed" not in before["finetune"]
    changed = lock()
    block("finetune", "finetune")["seed"] = 7
    # The adapter and what is predicted with it follow from the seed.
    changed["stages"]["finetune"]["outs"][0]["md5"] = "0.dir"
    next(entry for entry in changed["stages"]["infer"]["deps"] if entry["path"] == "models/adapter")["md5"] = "0.dir"
    assert configuration(changed) == before
    for stage, path in (("finetune", "data/splits/train.parquet"), ("infer", "data/splits/test.parquet")):
        changed = lock()
        next(entry for entry in changed["stages"][stage]["deps"] if entry["path"] == path)["md5"] = "0"
        assert configuration(changed)["inputs"] != before["inputs"]
    changed = lock()
    block("evaluate", "evaluate")["calibration_bins"] = 3
    assert configuration(changed)["inputs"] != before["inputs"]


def test_changes_that_are_not_committed_are_refused(project: Project) -> None:
    project.edit_params("finetune.max_steps", 41)
    assert "not as committed: params.yaml" in run(project, exit_code=1)[1]
    project.git("checkout", "-q", "params.yaml")
    table = project.folder / "data/raw/more.csv"
    table.write_text("number,review,opinion\n", encoding="utf-8")
    assert "files that no commit has: data/raw/more.csv" in run(project, exit_code=1)[1]
    table.unlink()


def test_a_commit_whose_results_are_of_other_parameters_is_refused(project: Project) -> None:
    project.edit_params("finetune.max_steps", 41)
    project.git("commit", "-qam", "More steps, not run")
    errors = run(project, exit_code=1)[1]
    assert "not up to date: finetune" in errors
    assert "dvc repro" in errors
    project.git("reset", "-q", "--hard", "HEAD~1")


def test_a_folder_without_a_pipeline_is_refused(project: Project, tmp_path: Path) -> None:
    elsewhere = Project(tmp_path)
    elsewhere.environment["PYTHONPATH"] = str(ROOT)
    assert "no DVC repository" in run(elsewhere, exit_code=1)[1]


def test_a_workspace_that_changes_while_seeds_are_trained_stops_the_next_training(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    committed = committed_trial()
    check_unmoved(committed, NOISE)
    project.edit_params("finetune.max_steps", 41)
    with pytest.raises(UserError, match="not as committed"):
        check_unmoved(committed, NOISE)
    project.git("commit", "-qam", "More steps, not run")
    with pytest.raises(UserError, match=f"no longer the commit {committed.commit[:7]}"):
        check_unmoved(committed, NOISE)
    project.git("reset", "-q", "--hard", "HEAD~1")


def test_what_an_experiment_interrupted_at_its_start_leaves_is_removed_and_nothing_else(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    folders = project.folder / ".dvc/tmp/exps/standalone"
    (folders / "tmp-of-another").mkdir(parents=True)

    def queue(name: str) -> None:
        with Repo() as repo:
            repo.experiments.workspace_queue.put(params={"params.yaml": ["finetune.seed=60"]}, name=name)

    queue("other")
    before = leftovers(project)
    with pytest.raises(KeyboardInterrupt), tidied("noise-60"):
        queue("noise-60")
        (folders / "tmp-of-this").mkdir()
        raise KeyboardInterrupt
    assert leftovers(project) == before
    with Repo() as repo:
        assert repo.experiments.workspace_queue.remove(["other", "noise-60"]) == ["other"]
    (folders / "tmp-of-another").rmdir()
    assert leftovers(project) == []


def test_an_interrupted_training_leaves_nothing_behind_and_goes_on_from_its_checkpoint(project: Project) -> None:
    # A checkpoint after each step, so that there is one long before the training has ended.
    process = start(project, "--seeds", "2", CHECKPOINT_EVERY_MINUTES="0")
    deadline = time.monotonic() + 300
    while not list(project.folder.glob(".dvc/checkpoints/*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted\n")
    assert leftovers(project) == []
    assert project.git("status", "--porcelain", "--untracked-files=all") == ""

    output, errors = run(project, "--seeds", "2")
    assert re.search(r"from checkpoint-\d+\b", errors)
    # The base was copied along.
    assert "models/base is absent" not in errors
    assert noise_of(project)["seeds"] == [42, 43]
    assert re.search(r"^\| adapter\.log_loss +\| ", output, re.MULTILINE)
    assert output.endswith("noise: 2 seeds (42, 43); metrics/noise.json has these numbers in full\n")


def test_the_numbers_are_those_of_the_commit_and_its_experiments(project: Project) -> None:
    commits = [project.git("rev-parse", "HEAD").strip(), experiments_of(project)["noise-43"]]
    metrics = [json.loads(project.git("show", f"{commit}:metrics/metrics.json")) for commit in commits]
    low, high = sorted(values["adapter"]["log_loss"] for values in metrics)
    assert low < high
    assert noise_of(project)["metrics"]["adapter.log_loss"] == {
        "mean": pytest.approx((low + high) / 2),
        "standard_deviation": pytest.approx((high - low) / 2**0.5),
        "lowest": low,
        "highest": high,
    }
    assert noise_of(project)["parameters"] == configuration({"stages": lock_of(project, "HEAD")})


def test_the_workspace_is_as_it_was_but_for_the_numbers(project: Project) -> None:
    assert project.git("status", "--porcelain", "--untracked-files=all") == f"?? {NOISE}\n"
    assert "up to date" in project.dvc("status")
    assert project.git("symbolic-ref", "HEAD") == "refs/heads/main\n"
    assert leftovers(project) == []


def test_a_second_run_trains_nothing_and_writes_the_same_bytes(project: Project) -> None:
    before = (project.folder / NOISE).read_bytes()
    errors = run(project, "--seeds", "43,42")[1]
    assert "Running stage" not in errors
    assert (project.folder / NOISE).read_bytes() == before


def test_committing_the_numbers_disturbs_neither_metrics_nor_the_cached_trainings(project: Project) -> None:
    shown = project.dvc("metrics", "show", "--json")
    project.git("add", "-A")
    project.git("commit", "-qm", "Measure the noise")
    assert project.dvc("metrics", "show", "--json") == shown
    assert json.loads(project.dvc("metrics", "diff", "HEAD~1", "--json")) == {}
    # Of another commit there are no experiments yet: they come out of the cache.
    errors = run(project, "--seeds", "42,43")[1]
    assert "Stage 'finetune' is cached - skipping run" in errors
    assert "> python -m stages.finetune" not in errors
    assert project.git("status", "--porcelain") == ""


def test_a_failed_training_is_named_finished_ones_are_kept_and_the_numbers_stay(project: Project) -> None:
    before = (project.folder / NOISE).read_bytes()
    # Rows at a time that do not divide the batch of 16.
    errors = run(project, "--seeds", "42,43,99", exit_code=1, MICRO_BATCH_SIZE="7")[1]
    assert "seed 43 (2 of 3): the experiment noise-43" in errors
    assert "MICRO_BATCH_SIZE" in errors
    assert "error: the experiment noise-99 (finetune.seed 99) failed" in errors
    assert (project.folder / NOISE).read_bytes() == before
    assert project.git("status", "--porcelain", "--untracked-files=all") == ""
    assert leftovers(project) == []


def test_an_experiment_of_that_name_with_another_configuration_is_refused(project: Project) -> None:
    head = project.git("rev-parse", "HEAD").strip()
    project.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/noise-50", head)
    errors = run(project, "--seeds", "42,50", exit_code=1)[1]
    assert "dvc exp remove noise-50" in errors
