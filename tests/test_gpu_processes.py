"""Training and inference on two GPUs; run with `pytest -m gpu` where there are two."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.launched import finish, losses, ranks_of, start, start_limited, wait_for_checkpoint
from tests.workplace import Workplace, make_workplace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here"),
]
# bfloat16 has eight bits of precision; sums are made in another order.
RELATIVE = 0.02


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Workplace, str]]:
    """The same project trained on one GPU, on two, and on two with one process killed and all started again."""
    folder = tmp_path_factory.mktemp("processes")
    place = make_workplace(folder / "project")
    place.set("base_model.path", str(place.folder / "base"))
    # Of 96 rows: the last step of an epoch is not full.
    place.set("finetune.global_batch_size", 40)
    place.set("finetune.max_steps", 24)
    place.set("finetune.evaluate_every_steps", 5)
    place.set("finetune.early_stopping_patience", None)
    place.run_up_to_splits()
    places = {}
    for name in ("one", "two", "killed"):
        shutil.copytree(place.folder, folder / name)
        places[name] = Workplace(folder / name)
    one = start(places["one"], "stages.finetune", NUM_PROCESSES="1")
    two = start(places["two"], "stages.finetune")
    killed = start(places["killed"], "stages.finetune")
    wait_for_checkpoint(places["killed"], killed)
    os.kill(ranks_of(killed.pid)[1], signal.SIGKILL)
    said_when_killed = finish(killed, code=1)
    assert "process 2 of 2 was killed by signal 9 (SIGKILL)" in said_when_killed
    assert "Traceback" not in said_when_killed
    resumed = start(places["killed"], "stages.finetune")
    said = {"one": finish(one), "two": finish(two), "killed": finish(resumed)}
    return {name: (places[name], said[name]) for name in places}


def test_two_gpus_train_to_the_losses_of_one(trained: dict[str, tuple[Workplace, str]]) -> None:
    one, two = trained["one"], trained["two"]
    assert "40 rows x 1 a step, from the start" in one[1]
    assert "20 rows x 1 a step on 2 processes, from the start" in two[1]
    for _, said in (one, two):
        assert "steps recorded" in said.split("fast paths:")[1].split(";")[0]
    assert len(losses(one[0])) == len(losses(two[0])) == 10
    difference = np.abs(np.array(losses(two[0])) / losses(one[0]) - 1).max()
    print(f"losses of two GPUs differ from those of one by {difference:.5f} at most")
    assert difference < RELATIVE


def test_a_killed_process_ends_both_and_the_next_run_continues(trained: dict[str, tuple[Workplace, str]]) -> None:
    place, said = trained["killed"]
    assert "on 2 processes, from checkpoint-" in said
    difference = np.abs(np.array(losses(place)) / losses(trained["two"][0]) - 1).max()
    print(f"losses of the resumed run differ from those of the whole one by {difference:.5f} at most")
    assert difference < RELATIVE


def test_two_gpus_predict_what_one_predicts(trained: dict[str, tuple[Workplace, str]]) -> None:
    found = {}
    running = {}
    for processes in ("1", "2"):
        place = trained["two"][0]
        folder = place.folder.with_name(f"infer-{processes}")
        shutil.copytree(place.folder, folder)
        running[folder] = start(Workplace(folder), "stages.infer", NUM_PROCESSES=processes)
    for folder, process in running.items():
        finish(process)
        tables = [pq.read_table(folder / f"data/predictions/adapter/{part}.parquet") for part in ("validation", "test")]
        found[folder] = tables
    for one, two in zip(*found.values(), strict=True):
        assert one["id"].equals(two["id"])
        assert one["label"].equals(two["label"])
        for name in (name for name in one.column_names if name.startswith("probability.")):
            np.testing.assert_allclose(one[name].to_numpy(), two[name].to_numpy(), atol=0.02)


def test_memory_that_runs_out_on_one_gpu_makes_the_micro_batch_smaller_on_both(
    trained: dict[str, tuple[Workplace, str]], tmp_path: Path
) -> None:
    place = trained["two"][0]
    shutil.copytree(place.folder, tmp_path / "project")
    shutil.rmtree(tmp_path / "project/checkpoints")
    limited = Workplace(tmp_path / "project")
    said = finish(start_limited(limited, most_rows=10))
    assert "20 rows x 1 a step on 2 processes, from the start" in said
    assert "10 rows x 2 a step on 2 processes, from the start" in said
    assert np.abs(np.array(losses(limited)) / losses(place) - 1).max() < RELATIVE
