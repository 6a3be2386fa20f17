"""The same commit gives the same bytes in another clone; other micro-batches give the same rows and nearly the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch._inductor import config as inductor

from stages.common.acceleration.determinism import settle_determinism
from stages.common.params import load_params
from stages.common.predictions import probability_column
from stages.common.training.rows import read_rows
from stages.common.training.trainer import MicroBatch, make_trainer
from stages.finetune import PARTS
from tests.project import EVERYTHING, Project
from tests.stored import files_in
from tests.workplace import Workplace, make_workplace


def test_another_fresh_clone_ends_in_the_same_bytes(finished_project: Project, tmp_path: Path) -> None:
    # `finished_project` ran in a fresh repository too: nothing but the commit before its results is common to both.
    clone = finished_project.clone(tmp_path / "clone")
    clone.git("checkout", "-q", "HEAD~1")
    clone.environment |= {"PYTHONHASHSEED": "1"}
    assert not (clone.folder / "dvc.lock").exists()
    assert clone.repro() == EVERYTHING
    for folder in ("data", "models", "metrics"):
        found, expected = (files_in(project.folder / folder) for project in (clone, finished_project))
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert clone.read("dvc.lock") == finished_project.read("dvc.lock")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits."""
    place = make_workplace(tmp_path_factory.mktemp("repeat") / "project")
    place.set("base_model.path", str(place.folder / "base"))
    # Until the adapter answers by the text, and seeds differ in more than their first steps.
    place.set("finetune.max_steps", 30)
    place.set("finetune.evaluate_every_steps", 30)
    place.run_up_to_splits()
    return place


@pytest.fixture
def one_thread_and_no_traces() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    inductor.deterministic = False
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_the_rows_of_each_step_are_the_same_however_the_step_is_cut(prepared: Workplace, tmp_path: Path) -> None:
    def steps(rows: int) -> list[list[list[int]]]:
        micro = MicroBatch(rows, 16 // rows, recompute_activations=False)
        folder = tmp_path / str(rows)
        with prepared.entered():
            params = load_params("finetune").finetune
            trainer = make_trainer(params, micro, folder, read_rows(PARTS, "none", 0, folder / "datasets"))
        batches = [token_ids(batch) for batch in trainer.get_train_dataloader()]
        return [
            [row for batch in batches[first : first + 16 // rows] for row in batch]
            for first in range(0, len(batches), 16 // rows)
        ]

    whole = steps(16)
    assert len(whole) == 6
    assert sum(map(len, whole)) == 96
    assert steps(4) == steps(1) == whole


def token_ids(batch: dict[str, Any]) -> list[list[int]]:
    """The rows of a batch without what fills it up, which is the last one."""
    ends = batch["boundaries"].tolist()
    return [batch["input_ids"][0, start:end].tolist() for start, end in pairwise(ends[:-1])]


def test_what_another_micro_batch_changes_is_far_below_what_another_seed_changes(
    prepared: Workplace, tmp_path: Path, one_thread_and_no_traces: None
) -> None:
    def probabilities(name: str, seed: int = 42, **environment: str) -> np.ndarray:
        place = Workplace(Path(shutil.copytree(prepared.folder, tmp_path / name, symlinks=True)))
        place.set("finetune.seed", seed)
        for stage in ("stages.finetune", "stages.infer"):
            assert place.main(stage, **environment) == 0
        table = pq.read_table(place.folder / "data/predictions/adapter/test.parquet")
        names = [probability_column(label) for label in place.params()["task"]["labels"]]
        return np.column_stack([table[name].to_numpy() for name in names])

    whole = probabilities("whole", MICRO_BATCH_SIZE="16")
    cut = np.abs(probabilities("cut", MICRO_BATCH_SIZE="2") - whole)
    other_seed = np.abs(probabilities("seed", seed=43) - whole)
    print(f"a probability: other micro-batch at most {cut.max():.2g}, other seed on average {other_seed.mean():.2g}")
    assert cut.max() < 1e-4
    assert cut.max() < 0.1 * other_seed.mean()


def test_deterministic_settings_are_taken_where_the_environment_asks_for_them(
    prepared: Workplace, tmp_path: Path, one_thread_and_no_traces: None, capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    for value in ("0", "1"):
        place = Workplace(Path(shutil.copytree(prepared.folder, tmp_path / value, symlinks=True)))
        place.set("finetune.max_steps", 3)
        place.set("finetune.evaluate_every_steps", 3)
        assert place.main("stages.finetune", DETERMINISTIC=value) == 0
        asked = value == "1"
        assert (torch.are_deterministic_algorithms_enabled(), inductor.deterministic) == (asked, asked)
        found.append(files_in(place.folder / "models/adapter"))
    assert found[0] == found[1], "on a CPU they change nothing"
    assert place.main("stages.infer", DETERMINISTIC="yes") == 1
    assert "DETERMINISTIC=yes in the environment: 0 turns it off, 1 on; unset, it is off" in capfd.readouterr().err


def test_cublas_keeps_its_work_space_to_itself(monkeypatch: pytest.MonkeyPatch, one_thread_and_no_traces: None) -> None:
    monkeypatch.setenv("DETERMINISTIC", "1")
    settle_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
