"""Which rows of the table made an optimizer step, to look at them when its loss is no number."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from datasets import Dataset

from stages.common.schema.finetune import Finetune
from stages.common.tables import read_table
from stages.common.training.rows import oversampled
from stages.common.training.shares import EpochOrder


def ids_of_step(path: Path, params: Finetune, rows: Dataset, step: int) -> list[str]:
    """The ids of the rows whose mean loss a step was, in the order in which they were drawn; several may be the same.

    Args:
        path: the table that `rows` were made of, with the columns `id` and `label`.
        params: the finetune block.
        rows: what is trained on, as `read_rows` gives it.
        step: from 1.
    """
    ids = read_table(path, ["id"])["id"]
    positions = positions_of_step(rows, params, step)
    if params.class_balance == "oversample":
        chosen = oversampled(read_table(path, ["label"])["label"].to_pylist(), params.seed)
        return [ids[int(chosen[position])].as_py() for position in positions]
    questions_per_row = len(rows) // len(ids)  # one for each label where a text may have several
    return [ids[position // questions_per_row].as_py() for position in positions]


def positions_of_step(rows: Dataset, params: Finetune, step: int) -> list[int]:
    """Which of `rows` a step draws: each epoch shuffles all of them by the seed, as training does."""
    size = params.global_batch_size
    epoch, step_of_epoch = divmod(step - 1, -(-len(rows) // size))
    order = EpochOrder(len(rows), params.seed)
    order.set_epoch(epoch)
    return list(islice(order, step_of_epoch * size, (step_of_epoch + 1) * size))
