"""Training and inference on two GPUs; run with `pytest -m gpu` where there are two."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.common.sharding import base_bytes, skeleton
from tests.launched import (
    finish,
    losses,
    ranks_of,
    start,
    start_limited,
    start_on_small_gpus,
    wait_for_checkpoint,
)
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
    limited = copied(place, tmp_path / "project")
    said = finish(start_limited(limited, most_rows=10))
    assert "20 rows x 1 a step on 2 processes, from the start" in said
    assert "10 rows x 2 a step on 2 processes, from the start" in said
    assert np.abs(np.array(losses(limited)) / losses(place) - 1).max() < RELATIVE


def test_two_gpus_that_share_the_base_train_to_the_losses_of_two_that_hold_it(
    trained: dict[str, tuple[Workplace, str]], tmp_path: Path
) -> None:
    whole, sharded = (copied(trained["two"][0], tmp_path / name) for name in ("whole", "sharded"))
    running = [
        start(whole, "stages.finetune", LOW_MEMORY="1"),
        start(sharded, "stages.finetune", SHARD_BASE="1"),
    ]
    _, said = map(finish, running)
    assert "on 2 processes, which share the base, activations recomputed, from the start" in said
    difference = np.abs(np.array(losses(sharded)) / losses(whole) - 1).max()
    print(f"losses of a shared base differ from those of a whole one by {difference:.6f} at most")
    assert difference < RELATIVE


def test_two_gpus_train_on_a_base_that_none_of_them_could_hold_and_predict_with_it(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "project")
    settings = json.loads((place.folder / "base/config.json").read_text()) | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64,
    }  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    model.save_pretrained(place.folder / "base")
    del model
    torch.cuda.empty_cache()
    place.set("base_model.path", str(place.folder / "base"))
    place.set("finetune.lora.r", 4)
    place.run_up_to_splits()
    memory = 0.9 * base_bytes(skeleton(place.folder / "base", torch.bfloat16))
    said = finish(start_on_small_gpus(place, memory, "finetune", LOW_MEMORY="1"), code=1)
    assert "error: the GPU is out of memory" in said
    said = finish(start_on_small_gpus(place, memory, "finetune", SHARD_BASE="1"))
    print(f"{memory / 2**30:.2f} GiB a GPU: {said}")
    assert "which share the base" in said
    assert len(losses(place)) > 0

    running, tables = {}, {}
    for method in ("label_scores", "generate"):
        for gpus in ("two", "one"):
            folder = tmp_path / f"{method} {gpus}"
            copied(place, folder).set("infer.method", method)
            Workplace(folder).set("infer.max_new_tokens", 8 if method == "generate" else None)
            running[folder] = (
                start_on_small_gpus(Workplace(folder), memory, "infer", SHARD_BASE="1")
                if gpus == "two"
                else start(Workplace(folder), "stages.infer", NUM_PROCESSES="1", DENSE_BASE="0")
            )
    for folder, process in running.items():
        print(said := finish(process))
        assert ("the base's layers lie on several GPUs" in said) == folder.name.endswith("two")
        tables[folder.name] = pq.read_table(folder / "data/predictions/adapter/test.parquet")
    scored, spread = tables["label_scores one"], tables["label_scores two"]
    for name in (name for name in scored.column_names if name.startswith("probability.")):
        np.testing.assert_allclose(scored[name].to_numpy(), spread[name].to_numpy(), atol=0.02)
    answered, answered_spread = (tables[f"generate {gpus}"]["prediction"].to_pylist() for gpus in ("one", "two"))
    same = np.mean(np.array(answered) == answered_spread)
    print(f"answers that are the same on one GPU and on two: {same:.2f}")
    assert same > 0.9


def copied(place: Workplace, folder: Path) -> Workplace:
    """A project of its own, without checkpoints."""
    shutil.copytree(place.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return Workplace(folder)
