"""Which rows each process works on: the same ones in each step as one process, dealt evenly, none twice."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from accelerate.state import PartialState
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from stages.common.errors import UserError
from stages.common.training.collating import IGNORED, collate, collate_packed
from stages.common.training.rows import row_lengths
from stages.common.training.shares import PIECE, EpochOrder, EvaluationShares, StepShares, deal
from stages.common.training.trainer import MicroBatch, check_shares, micro_batches

SEED = 7
GENERATOR = np.random.default_rng(0)
LENGTHS = GENERATOR.integers(1, 100, 103).tolist()
ROWS = Dataset.from_list(
    [{"prompt_ids": [number] * length, "completion_ids": [number, 2]} for number, length in enumerate(LENGTHS)]
)


@pytest.fixture(autouse=True)
def alone() -> None:
    """Accelerate takes part in no group of processes here."""
    PartialState(cpu=True)


def loader(batches: BatchSampler) -> Any:
    """Numbers of rows, as the trainer's loader gives the rows."""
    plain = DataLoader(ROWS, batch_sampler=batches, collate_fn=lambda rows: [row["completion_ids"][0] for row in rows])
    return prepare_data_loader(plain, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=SEED)


def steps(batches: Iterator[list[int]], accumulation: int) -> list[list[int]]:
    """Rows of each optimizer step: of so many micro-batches."""
    found = list(batches)
    return [[*chain(*found[start : start + accumulation])] for start in range(0, len(found), accumulation)]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (2, 4), (4, 2), (8, 1)])
def test_a_step_has_the_rows_that_it_has_in_one_process_in_every_epoch(processes: int, accumulation: int) -> None:
    micro = 16 // processes // accumulation
    one = loader(BatchSampler(RandomSampler(ROWS), 16, drop_last=False))
    shares = [
        loader(StepShares(ROWS, EpochOrder(len(ROWS), SEED), micro, accumulation, processes, index))
        for index in range(processes)
    ]
    epochs = []
    for epoch in range(2):
        for share in [one, *shares]:
            share.set_epoch(epoch)
        whole = list(one)
        parts = [list(share) for share in shares]
        assert {len(part) for part in parts} == {len(shares[0])}
        assert all(len(batch) <= micro for part in parts for batch in part)
        of_steps = zip(*(steps(iter(part), accumulation) for part in parts), strict=True)
        assert [sorted(chain(*step)) for step in of_steps] == [sorted(step) for step in whole]
        epochs.append(whole)
    assert epochs[0] != epochs[1]
    # The last step has 7 of 16 rows.
    assert len(epochs[0][-1]) == 103 % 16


@pytest.mark.parametrize("rows", [1, PIECE, PIECE + 1, 3 * PIECE - 1])
def test_the_order_of_an_epoch_is_that_of_accelerates_sampler(rows: int) -> None:
    theirs, own = SeedableRandomSampler(range(rows), data_seed=SEED), EpochOrder(rows, SEED)
    for epoch in (0, 1, 5):
        theirs.set_epoch(epoch)
        own.set_epoch(epoch)
        assert list(own) == list(theirs)
    assert len(own) == rows


def test_the_first_row_of_an_epoch_costs_no_list_of_all_of_them() -> None:
    tracemalloc.start()
    next(iter(EpochOrder(500_000, SEED)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20


def test_a_resumed_epoch_goes_on_behind_the_micro_batches_it_has_seen() -> None:
    share = loader(StepShares(ROWS, EpochOrder(len(ROWS), SEED), 2, 2, 4, 3))
    whole = list(share)
    share.set_epoch(0)
    rest = skip_first_batches(share, 6)
    rest.set_epoch(0)
    assert list(rest) == whole[6:]


def test_rows_are_dealt_so_that_processes_have_as_many_tokens() -> None:
    for start in range(0, 96, 32):
        lengths = np.array(LENGTHS[start : start + 32])
        shares = deal(lengths, 2)
        assert sorted(chain(*shares)) == list(range(32))
        assert [len(share) for share in shares] == [16, 16]
        tokens = [lengths[share].sum() for share in shares]
        assert max(tokens) / min(tokens) < 1.01
        assert max(lengths[:16].sum(), lengths[16:].sum()) / min(lengths[:16].sum(), lengths[16:].sum()) > 1.02


@pytest.mark.parametrize(("rows", "batch", "processes"), [(12, 16, 2), (103, 4, 3), (1, 8, 4), (8, 2, 2)])
def test_each_row_is_evaluated_once_and_every_process_has_as_many_batches(
    rows: int, batch: int, processes: int
) -> None:
    shares = [list(EvaluationShares(rows, batch, processes, index)) for index in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(part) <= batch for share in shares for part in share)
    assert sorted(row for share in shares for part in share for row in part) == list(range(rows))


@pytest.mark.parametrize("to_batch", [collate, collate_packed])
def test_a_share_without_rows_is_a_batch_without_a_loss(to_batch: Any) -> None:
    batch = to_batch([], pad_id=0)
    assert int(batch["labels"].ne(IGNORED).sum()) == int(batch["targets"].ne(IGNORED).sum()) == 0
    logits = torch.randn(len(batch["kept"]), 5, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum", ignore_index=IGNORED)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_global_batch_is_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MICRO_BATCH_SIZE", raising=False)
    assert micro_batches(64, 100, "cuda", processes=4)[0] == MicroBatch(16, 1, recompute_activations=False)
    for micro in micro_batches(64, 100, "cuda", processes=4):
        assert micro.rows * micro.accumulation * 4 == 64
    with pytest.raises(UserError, match=r"3 processes.* cannot share the 64 rows .* one of \[1, 2, 4, 8, 16, 32, 64\]"):
        check_shares(64, 3)
    monkeypatch.setenv("MICRO_BATCH_SIZE", "64")
    with pytest.raises(UserError, match=r"64, which 4 processes share: one of \[16, 8, 4, 2, 1\]"):
        micro_batches(64, 100, "cuda", processes=4)


def test_the_length_of_a_row_is_that_of_prompt_and_completion() -> None:
    assert row_lengths(ROWS, [5, 0, 5]).tolist() == [LENGTHS[row] + 2 for row in (5, 0, 5)]
