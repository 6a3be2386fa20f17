"""Which rows each of several processes works on: the rows of a step are those of one process, dealt out evenly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, Sampler

from stages.common.training.rows import row_lengths

# Rows whose numbers are Python's at a time.
PIECE = 10_000


class EpochOrder(Sampler[int]):
    """Which row comes when: all of them, shuffled anew in each epoch, in the order of accelerate's sampler.

    That one (SeedableRandomSampler, of torch's RandomSampler) makes a list of all rows before it gives the first: of
    ten million 0.4 s and 400 MB. accelerate leaves samplers alone that are not torch's.

    Args:
        rows: how many there are.
        seed: of the first epoch's order; the next one's is one more.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def __len__(self) -> int:
        return self._rows

    def set_epoch(self, epoch: int) -> None:
        """Whose order comes next; from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        for piece in torch.randperm(self._rows, generator=generator).split(PIECE):
            yield from piece.tolist()


class StepShares(BatchSampler):
    """This process's micro-batches of each optimizer step, as indices of rows.

    Every process has as many of them as the others, since the trainer counts micro-batches. At the end of an epoch,
    where rows do not fill a step, some have fewer rows, or none.

    Args:
        rows: to train on.
        order: of all rows.
        micro_rows: rows of a micro-batch.
        accumulation: micro-batches of a step, for each process.
        processes: how many there are.
        index: of this one, from 0.
    """

    def __init__(
        self, rows: Dataset, order: EpochOrder, micro_rows: int, accumulation: int, processes: int, index: int
    ) -> None:
        self.sampler = order  # where accelerate looks for what to tell the epoch
        self.batch_size, self.drop_last = micro_rows, False
        self._rows, self._index, self._processes = rows, index, processes
        self._rows_a_step = micro_rows * accumulation * processes

    def __len__(self) -> int:
        steps, rest = divmod(len(self._rows), self._rows_a_step)
        share = -(-rest // self._processes)
        return steps * (self._rows_a_step // self._processes // self.batch_size) + -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while step := list(islice(order, self._rows_a_step)):
            places = deal(row_lengths(self._rows, step), self._processes)[self._index]
            share = [step[place] for place in places]
            count = -(-len(step) // (self._processes * self.batch_size))
            yield from cut(share, self.batch_size, count)


class EvaluationShares(BatchSampler):
    """This process's batches of the rows to evaluate on, as indices; as many as every other process has.

    Args:
        rows: how many there are.
        batch_rows: rows of a batch.
        processes: how many there are.
        index: of this one, from 0.
    """

    def __init__(self, rows: int, batch_rows: int, processes: int, index: int) -> None:
        self.batch_size, self.drop_last = batch_rows, False
        count = -(-rows // (processes * batch_rows))
        self._batches = list(cut(list(range(index, rows, processes)), batch_rows, count))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def deal(lengths: np.ndarray, processes: int) -> list[list[int]]:
    """Share rows out so that each process has about as many tokens, and none more rows than need be.

    The longest row first, each to whoever has the fewest tokens so far (Graham 1969).

    Args:
        lengths: tokens of each of n rows.
        processes: how many shares to make.

    Returns:
        For each share the places of its rows, ascending; at most n / processes of them, rounded up.
    """
    most = -(-len(lengths) // processes)
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for place in np.argsort(-lengths, kind="stable").tolist():
        share = min((share for share in range(processes) if len(shares[share]) < most), key=lambda one: tokens[one])
        shares[share].append(place)
        tokens[share] += int(lengths[place])
    return [sorted(share) for share in shares]


def cut(share: list[int], most: int, count: int) -> Iterator[list[int]]:
    """Cut into `count` batches of at most `most`; what is left of them is empty."""
    for batch in range(count):
        yield share[batch * most : (batch + 1) * most]
