"""Sweeps through DVC's queue, as docs/experiments.md shows them, with real git, real dvc and a tiny model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.experiments import experiments_of, lock_of, wait_for_queue
from tests.project import Project
from tests.workplace import Workplace

RATES = ("5e-4", "1e-3", "2e-3")  # the second is the committed one


class Sweep(NamedTuple):
    project: Project
    states: dict[str, str]
    commits: dict[float, str]
    before: dict[str, bytes]


def workspace(project: Project) -> dict[str, bytes]:
    """What a run of its own would change, by path."""
    names = ("params.yaml", "dvc.lock", "metrics/metrics.json", "models/adapter/adapter_model.safetensors")
    return {name: (project.folder / name).read_bytes() for name in names}


def weights_at(project: Project, commit: str) -> bytes:
    """The adapter of a commit, out of DVC's cache."""
    cache = project.folder / ".dvc/cache/files/md5"
    [output] = lock_of(project, commit)["finetune"]["outs"]
    listing = json.loads((cache / output["md5"][:2] / output["md5"][2:]).read_text(encoding="utf-8"))
    [key] = [entry["md5"] for entry in listing if entry["relpath"] == "adapter_model.safetensors"]
    return (cache / key[:2] / key[2:]).read_bytes()


def rate_at(project: Project, commit: str) -> float:
    return lock_of(project, commit)["finetune"]["params"]["params.yaml"]["finetune"]["learning_rate"]


@pytest.fixture(scope="module")
def sweep(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """Three learning rates and one that is refused, two at a time; the tests of this file follow each other."""
    project = finished_project.copy(tmp_path_factory.mktemp("sweep") / "repository")
    before = workspace(project)
    values = f"finetune.learning_rate={','.join(RATES)}"
    project.dvc("exp", "run", "--queue", "-n", "rate", "-C", "models/base", "-S", values)
    project.dvc("exp", "run", "--queue", "-n", "broken", "-S", "finetune.learning_rate=1.5")
    project.dvc("queue", "start", "-j", "2")
    states = wait_for_queue(project)
    commits = {rate_at(project, commit): commit for commit in experiments_of(project).values()}
    yield Sweep(project, states, commits, before)
    project.dvc("queue", "stop")


def test_each_value_gives_an_experiment_with_an_adapter_of_its_own(sweep: Sweep) -> None:
    assert {name: state for name, state in sweep.states.items() if name != "broken"} == {
        "rate-1": "Success", "rate-2": "Success", "rate-3": "Success"
    }  # fmt: skip
    assert sorted(sweep.commits) == [float(rate) for rate in RATES]
    assert len({weights_at(sweep.project, commit) for commit in sweep.commits.values()}) == 3
    logs = {name: sweep.project.dvc("queue", "logs", name) for name in ("rate-1", "rate-2", "rate-3")}
    assert [name for name, log in logs.items() if "> python -m stages.finetune" in log] == ["rate-1", "rate-3"]
    assert not any("models/base is absent" in log for log in logs.values())  # it was copied along


@pytest.mark.parametrize("rate", [float(rate) for rate in RATES])
def test_a_training_beside_another_one_gives_what_it_gives_alone(
    sweep: Sweep, rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Workplace(sweep.project.copy(tmp_path / "repository").folder)
    alone.set("finetune.learning_rate", rate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS says to the experiments
    try:
        assert alone.main("stages.finetune") == 0
    finally:
        torch.set_num_threads(threads)
    weights = (alone.folder / "models/adapter/adapter_model.safetensors").read_bytes()
    assert weights == weights_at(sweep.project, sweep.commits[rate])


def test_a_failed_task_is_reported_with_its_reason(sweep: Sweep) -> None:
    assert sweep.states["broken"] == "Failed"
    assert "finetune.learning_rate" in sweep.project.dvc("queue", "logs", "broken")
    assert "broken" not in experiments_of(sweep.project)


def test_the_workspace_is_untouched_and_no_folder_of_a_run_is_left(sweep: Sweep) -> None:
    assert workspace(sweep.project) == sweep.before
    assert sweep.project.git("status", "--porcelain", "--untracked-files=all") == ""
    assert list(sweep.project.folder.glob(".dvc/tmp/exps/tmp*")) == []


def test_experiments_are_shown_with_what_differs_and_what_came_of_it(sweep: Sweep) -> None:
    table = sweep.project.dvc("exp", "show", "--csv", "--only-changed")
    rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(table)) if row["Experiment"]}
    assert rows["broken"]["State"] == "Failed"
    shown = {float(rows[name]["finetune.learning_rate"]) for name in ("rate-1", "rate-2", "rate-3")}
    assert shown == set(sweep.commits)
    assert len({rows[name]["metrics/validation.json:adapter.log_loss"] for name in ("rate-1", "rate-2", "rate-3")}) == 3


def test_an_applied_experiment_is_up_to_date_and_nothing_is_trained_again(sweep: Sweep) -> None:
    sweep.project.dvc("exp", "apply", "rate-3")
    assert "up to date" in sweep.project.dvc("status")
    assert sweep.project.repro() == set()
    weights = workspace(sweep.project)["models/adapter/adapter_model.safetensors"]
    assert weights == weights_at(sweep.project, sweep.commits[0.002])
    changed = sweep.project.git("diff", "--unified=0", "--", "params.yaml").splitlines()
    assert changed[-2:] == ["-  learning_rate: 1.0e-3", "+  learning_rate: 0.002"]
    assert len(changed) == 7  # four lines of head, one of place
