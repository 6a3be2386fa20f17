"""`kill -9` of `dvc repro` at random moments: the next one finishes, and ends in the very same bytes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stages.common.tables import atomic_path, scratch_folder
from stages.common.training.checkpoints import HASHES
from tests.project import DVC, EVERYTHING, Project

MADE = ("models/adapter", "models/decision.json", "data/splits", "data/predictions", "metrics", "dvc.lock")
# About as long as a stage takes here, and the steps of training; where they end before, the kill meets what follows.
SECONDS, SECONDS_OF_FINETUNE, SECONDS_OF_STEPS, SECONDS_OF_LAST = 3, 8, 1, 0.8


def outputs(project: Project) -> dict[str, bytes]:
    """Every file that the pipeline made and that people or later commits see."""
    roots = [project.folder / name for name in MADE]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(project.folder)): path.read_bytes() for path in files}


def processes_in(folder: Path) -> list[psutil.Process]:
    """All that were started in a folder and live, whoever is their parent now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def fresh(finished_project: Project, tmp_path: Path) -> Iterator[Project]:
    """What the finished project was before its first run: no output, no cache, no lock."""
    project = finished_project.clone(tmp_path / "repository")
    project.git("reset", "-q", "--hard", "HEAD~1")
    # After every step, so that a run is also resumed between two logged losses and two evaluations.
    project.environment["CHECKPOINT_EVERY_MINUTES"] = "0"
    yield project
    for process in processes_in(project.folder):
        process.kill()


def killed_in(
    project: Project, stages: set[str], generator: random.Random, whole_group: bool, log: Path
) -> tuple[str, bool]:
    """Run `dvc repro`, and kill it at a random moment after the first of `stages` began, or when the next one begins.

    Returns:
        The stage after whose beginning it was killed, and whether it was; the last stage may have ended before.
    """
    with log.open("wb") as file, subprocess.Popen(
        [DVC, "repro"], cwd=project.folder, env=project.environment, stdout=file, stderr=file, start_new_session=True
    ) as process:  # fmt: skip
        stage = wait_for(process, log, rf"Running stage '({'|'.join(stages)})'")
        seconds = SECONDS_OF_LAST if len(stages) == 1 else SECONDS
        seconds = SECONDS_OF_FINETUNE if stage == "finetune" else seconds
        # Two in three among the steps themselves, which are a small part of that stage here.
        if stage == "finetune" and generator.random() < 2 / 3:
            while not last_sealed(project) and "has ended before" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            seconds = SECONDS_OF_STEPS
        until = time.monotonic() + generator.uniform(0, seconds)
        others = rf"Running stage '({'|'.join(stages - {stage})})'" if len(stages) > 1 else "(?!)"
        while time.monotonic() < until and not re.search(others, log.read_text()) and process.poll() is None:
            time.sleep(0.01)
        ended = process.poll() is not None
        assert not ended or len(stages) == 1, log.read_text()
        if whole_group and not ended:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    return stage, not ended


def wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    return found[1]


def last_sealed(project: Project) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    found = (project.folder / ".dvc/checkpoints").glob(f"*/checkpoint-*/{HASHES}")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def kill_and_finish(fresh: Project, finished: Project, seed: int) -> list[str]:
    """Four kills one after the other on the way to the end; a line about each.

    Raises:
        AssertionError: the end is another one than the finished project's, or something is left behind.
    """
    generator = random.Random(seed)
    left = {"finetune", *generator.sample(sorted(EVERYTHING - {"finetune"}), 3)}
    told, mended, logs, saved = [], "", [fresh.folder.parent / f"log-{number}" for number in range(5)], 0
    for number in range(4):
        mended += fresh.python("-m", "preflight.mend")
        whole_group = bool((number + seed) % 2)
        stage, killed = killed_in(fresh, left, generator, whole_group, logs[number])
        left.remove(stage)
        # Training that is resumed and killed again may have had no time for a further step.
        resumed = re.search(r"from checkpoint-(\d+)\n", logs[number].read_text())
        assert not saved or resumed is None or int(resumed[1]) >= saved
        saved = last_sealed(fresh)
        how = "resumed from step " + resumed[1] if resumed else "no training resumed"
        what = f"{'group' if whole_group else 'dvc alone'} {'killed' if killed else 'had ended before the kill'}"
        told.append(f"seed {seed}: {what} after {stage} began; {how}")
    mended += fresh.python("-m", "preflight.mend")
    logs[4].write_text(fresh.dvc("repro"))
    resumed = re.search(r"from checkpoint-(\d+)\n", logs[4].read_text())
    assert not saved or "ended before" in logs[4].read_text() or (resumed is not None and int(resumed[1]) >= saved)
    told.append(f"seed {seed}: finished; {'resumed from step ' + resumed[1] if resumed else 'no training resumed'}")
    print("", *told, mended, sep="\n")
    expected, found = outputs(finished), outputs(fresh)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert "up to date" in fresh.dvc("status")
    assert processes_in(fresh.folder) == [], "a stage went on without its dvc"
    hidden = [path for name in ("data", "models", "metrics") for path in (fresh.folder / name).rglob(".*.*.*")]
    assert hidden == [], "half-written files"
    [run] = [path.parent for path in (fresh.folder / ".dvc/checkpoints").glob("*/order")]
    assert not list(run.glob("checkpoint-*"))
    return told


def test_killed_at_four_random_moments_the_pipeline_ends_in_the_same_bytes(
    fresh: Project, finished_project: Project
) -> None:
    kill_and_finish(fresh, finished_project, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_killed_at_twenty_random_moments_the_pipeline_ends_in_the_same_bytes(
    fresh: Project, finished_project: Project, seed: int
) -> None:
    kill_and_finish(fresh, finished_project, seed)


def test_of_two_repro_at_once_one_does_the_work_and_the_other_says_so_or_finds_it_done(
    finished_project: Project, tmp_path: Path
) -> None:
    project = finished_project.copy(tmp_path / "repository")
    project.edit_params("evaluate.bootstrap_samples", 120)
    both = [project.start(DVC, "repro") for _ in range(2)]
    outputs_of_both = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both].count(0) >= 1
    for process, output in zip(both, outputs_of_both, strict=True):
        assert process.returncode == 0 or "is busy, it is being" in output or "Unable to acquire lock" in output, output
        assert "Traceback" not in output
    assert sum("Running stage 'evaluate'" in output for output in outputs_of_both) == 1
    assert project.repro() == set()


@pytest.mark.parametrize("kept_bytes", [0, 700])
def test_a_lock_that_dvc_was_killed_in_writing_is_mended_and_nothing_runs_again(
    finished_project: Project, tmp_path: Path, kept_bytes: int
) -> None:
    project = finished_project.copy(tmp_path / "repository")
    whole = project.read("dvc.lock")
    project.write("dvc.lock", whole[:kept_bytes])
    project.write(".dvc/tmp/rwlock", '{"write": {"/a')
    output = project.python("-m", "preflight.mend")
    assert "dvc.lock was cut" in output
    assert ".dvc/tmp/rwlock was cut" in output
    assert project.read("dvc.lock") == whole
    assert project.python("-m", "preflight.mend") == "", "what is whole stays"
    conflict = f"<<<<<<< HEAD\n{whole}"
    project.write("dvc.lock", conflict)
    assert project.python("-m", "preflight.mend") == ""
    assert project.read("dvc.lock") == conflict, "a person has to resolve it"
    if kept_bytes == 0:
        project.write("dvc.lock", "")
        project.git("rm", "-q", "--cached", "dvc.lock")
        project.git("commit", "-qm", "No lock")
        assert "is removed" in project.python("-m", "preflight.mend")
        assert project.repro() <= {"code", "report", "evaluate"}, "the run cache has the others"


def test_what_a_killed_process_was_writing_is_removed_before_its_parent_has_asked_for_it(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        left = tmp_path / f".table.json.{process.pid}.abc"
        left.write_text("half")
        spooled = tmp_path / f".rows.parquet.{process.pid}.abc/spool.parquet"
        spooled.parent.mkdir()
        spooled.write_text("half")
        with atomic_path(tmp_path / "table.json"):
            assert left.exists(), "it may be writing yet"
        with scratch_folder(tmp_path / "rows.parquet"):
            assert spooled.exists()
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with atomic_path(tmp_path / "table.json"):
            assert not left.exists()
        with scratch_folder(tmp_path / "rows.parquet") as folder:
            assert list(tmp_path.glob(".rows*")) == [folder]
        assert not folder.exists()
