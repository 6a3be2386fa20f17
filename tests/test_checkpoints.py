"""Folders of training runs: found again, held by one process, cleaned up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.common.training.checkpoints import FINISHED, SECONDS_KEPT, fingerprint, last_checkpoint, locked_run

ROOT = Path(__file__).resolve().parents[1]


def test_the_fingerprint_follows_contents_and_values(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("a")
    first = fingerprint([path], {"seed": 1})
    assert fingerprint([path], {"seed": 1}) == first
    assert fingerprint([path], {"seed": 2}) != first
    path.write_text("b")
    assert fingerprint([path], {"seed": 1}) != first


def test_a_run_is_held_by_one_process_and_freed_when_that_is_killed(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from stages.common.training.checkpoints import locked_run\n"
        f"with locked_run(Path({str(tmp_path)!r}), 'k'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training"), locked_run(tmp_path, "k"):
            pass
        with locked_run(tmp_path, "another run"):
            pass
        holder.kill()
    with locked_run(tmp_path, "k") as folder:
        assert folder.is_dir()


def test_finished_runs_are_removed_by_the_next_and_interrupted_ones_kept_for_a_week(tmp_path: Path) -> None:
    finished, interrupted, forgotten, following = (digit * 64 for digit in "abcd")
    for key in (finished, interrupted, forgotten):
        with locked_run(tmp_path, key) as folder:
            (folder / "checkpoint-1").mkdir()
            if key == finished:
                (folder / FINISHED).mkdir()
    long_ago = time.time() - SECONDS_KEPT - 1
    (tmp_path / "thesis" / FINISHED).mkdir(parents=True)
    for name in (forgotten, "thesis"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    with locked_run(tmp_path, following):
        left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == [interrupted, following, "thesis"], "a folder that is no run is left alone"


def state(has_ended: bool = False) -> str:
    control = {"args": {"should_training_stop": has_ended}}
    return json.dumps({"stateful_callbacks": {"TrainerControl": control}})


def test_the_newest_checkpoint_to_continue_from_is_taken_and_useless_ones_are_removed(
    tmp_path: Path,
) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((9, state()), (10, state()), (100, state()[:-5]), (150, state(has_ended=True))):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-200").mkdir()
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
