"""Folders of training runs: found again, held by one process, cleaned up."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.common.training.checkpoints import (
    FINISHED,
    HASHES,
    RUNS_KEPT,
    fingerprint,
    last_checkpoint,
    locked_run,
    remove_old_checkpoints,
    seal,
    shared_dataset,
)
from tests.stored import damage, flipped

ROOT = Path(__file__).resolve().parents[1]


def test_the_fingerprint_follows_contents_and_values(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("a")
    first = fingerprint([path], {"seed": 1})
    assert fingerprint([path], {"seed": 1}) == first
    assert fingerprint([path], {"seed": 2}) != first
    path.write_text("b")
    assert fingerprint([path], {"seed": 1}) != first


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_of_checkpoints_that_cannot_be_made_is_refused_by_the_name_of_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / below
    monkeypatch.setenv("CHECKPOINT_DIR", str(root))
    with (
        pytest.raises(UserError, match=r"CHECKPOINT_DIR=\S+ in the environment: .* or unset it"),
        locked_run(root, "k"),
    ):
        pass
    monkeypatch.delenv("CHECKPOINT_DIR")
    with pytest.raises(OSError), locked_run(root, "k"):
        pass


def hold(root: Path, seconds: int) -> subprocess.Popen[str]:
    """Another process that holds the run "k"."""
    code = (
        "import time; from pathlib import Path; from stages.common.training.checkpoints import locked_run\n"
        f"with locked_run(Path({str(root)!r}), 'k'): print('held', flush=True); time.sleep({seconds})"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_run_is_held_by_one_process_and_freed_when_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.common.training.checkpoints.SECONDS_TO_WAIT", 0.1)
    with hold(tmp_path, seconds=60) as holder:
        with pytest.raises(UserError, match="another process is training"), locked_run(tmp_path, "k"):
            pass
        with locked_run(tmp_path, "another run"):
            pass
        holder.kill()
    with locked_run(tmp_path, "k") as folder:
        assert folder.is_dir()


def test_a_second_run_waits_for_the_first_and_goes_on_when_that_has_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with hold(tmp_path, seconds=1) as holder, locked_run(tmp_path, "k"):
        assert holder.wait() == 0
    assert "another process is training this very run; waits" in capfd.readouterr().out


def test_finished_runs_are_removed_by_the_next_and_as_many_interrupted_ones_kept_whatever_the_clock_says(
    tmp_path: Path,
) -> None:
    finished, following = "f" * 64, "e" * 64
    interrupted = [f"{number:064x}" for number in range(RUNS_KEPT + 2)]
    for age, key in enumerate([finished, *interrupted]):
        with locked_run(tmp_path, key) as folder:
            (folder / "checkpoint-1").mkdir()
            if key == finished:
                (folder / FINISHED).mkdir()
        # The clock has been set back before each of them, and forward by years before the next one.
        os.utime(folder, (age * -86_400 + 2e9, age * -86_400 + 2e9))
    (tmp_path / "thesis" / FINISHED).mkdir(parents=True)
    with locked_run(tmp_path, interrupted[2]):
        pass
    with locked_run(tmp_path, following):
        left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {*interrupted[2:], following, "thesis"}, "a folder that is no run is left alone"


def write_x(folder: Path) -> None:
    folder.mkdir()
    (folder / "x").write_text("rows")


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} is made a second time")


def datasets(root: Path) -> set[str]:
    return {path.name for path in (root / "datasets").iterdir()}


def test_runs_of_the_same_data_share_its_rows_until_none_of_them_is_kept(tmp_path: Path) -> None:
    one, other, data, more_data = ("a" * 64, "b" * 64, "d" * 64, "e" * 64)
    with locked_run(tmp_path, one) as run:
        shared = shared_dataset(run, data, write_x)
        assert (shared / "x").read_text() == "rows"
    with locked_run(tmp_path, one) as run:
        assert shared_dataset(run, data, never) == shared
    (tmp_path / "datasets/my-own").mkdir()
    with locked_run(tmp_path, other) as run:
        assert shared_dataset(run, data, never) == shared
        (tmp_path / one / FINISHED).mkdir()
    # The first run is gone, and the second still uses the data.
    with locked_run(tmp_path, "c" * 64) as run:
        shared_dataset(run, more_data, write_x)
        assert not (tmp_path / one).exists()
        assert datasets(tmp_path) == {data, more_data, "my-own"}
        (tmp_path / other / FINISHED).mkdir()
    with locked_run(tmp_path, "c" * 64) as run:
        shared_dataset(run, more_data, never)
    assert datasets(tmp_path) == {more_data, "my-own"}


def test_rows_that_a_killed_process_was_writing_are_written_again_while_others_wait(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / ("a" * 64), "d" * 64
    code = (
        "import time; from pathlib import Path; from stages.common.training.checkpoints import shared_dataset\n"
        "def make(folder):\n"
        "    folder.mkdir(); (folder / 'x').write_text('ro'); print('half', flush=True); time.sleep(60)\n"
        f"shared_dataset(Path({str(run)!r}), {data!r}, make)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        assert not (tmp_path / "datasets" / data).exists()
        threading.Timer(0.5, writer.kill).start()
        assert (shared_dataset(run, data, write_x) / "x").read_text() == "rows"
    assert "another process writes or removes mapped rows; waits" in capfd.readouterr().out
    assert datasets(tmp_path) == {data}


def test_rows_that_could_not_be_written_or_removed_to_the_end_are_not_taken_for_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tmp_path / ("a" * 64), "d" * 64

    def fail(folder: Path) -> None:
        write_x(folder)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        shared_dataset(run, data, fail)
    assert datasets(tmp_path) == set(), "no room is taken by what nobody will read"

    def remove_some(folder: Path, ignore_errors: bool = False) -> None:
        if (folder / "x").exists():
            (folder / "x").unlink()
            raise KeyboardInterrupt

    shared_dataset(run, data, write_x)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", remove_some)
        shared_dataset(run, "e" * 64, write_x)
    assert (shared_dataset(run, data, write_x) / "x").read_text() == "rows"
    assert datasets(tmp_path) == {data}


def checkpoint(folder: Path, step: int, best: int | None = None, has_ended: bool = False) -> Path:
    """A checkpoint as training leaves it: with files below folders as well, and their hashes."""
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    control = {"args": {"should_training_stop": has_ended}}
    state = {"best_global_step": best, "stateful_callbacks": {"TrainerControl": control}}
    (path / "trainer_state.json").write_text(json.dumps(state))
    (path / "shards/optimizer.bin").write_bytes(bytes([step]) * 200)
    seal(path)
    return path


def test_the_newest_checkpoint_to_continue_from_is_taken_and_later_ones_are_removed(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, has_ended in ((9, False), (10, False), (100, True)):
        checkpoint(tmp_path, step, has_ended=has_ended)
    # Killed before the hashes were written.
    cut = checkpoint(tmp_path, 200)
    (cut / HASHES).unlink()
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_without_the_best_checkpoint_of_its_state_none_is_continued_from(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20)):
        checkpoint(tmp_path, step, best)
    damage(tmp_path / "checkpoint-20/shards/optimizer.bin", flipped(bytes([20]) * 200))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_last_checkpoints_and_the_best_are_kept_by_their_steps_when_the_clock_was_set_back(tmp_path: Path) -> None:
    for age, step in enumerate((5, 10, 15, 20, 100)):
        path = checkpoint(tmp_path, step)
        # Each seems older than the one before.
        os.utime(path, (2e9 - age * 3600, 2e9 - age * 3600))
    remove_old_checkpoints(tmp_path, best_step=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20", "checkpoint-5"]
    remove_old_checkpoints(tmp_path, best_step=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]


def test_the_checkpoint_before_a_new_best_one_keeps_its_own_best_one(tmp_path: Path) -> None:
    for step, best in ((100, 100), (140, 100), (180, 100), (200, 200)):
        checkpoint(tmp_path, step, best)
    remove_old_checkpoints(tmp_path, best_step=200)
    (tmp_path / "checkpoint-200/trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-180"
