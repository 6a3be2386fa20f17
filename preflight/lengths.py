"""How many rows a run has and how long they are: from data/splits, or as the user says."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from preflight.check import values_of_files
from preflight.run_length import expected_train_rows, rows_in_one_pass
from stages.common.contents import Part
from stages.common.errors import UserError
from stages.common.params import Params
from stages.common.schema.task import ClassificationTask

# Where lengths are as told: their standard deviation as a share of the mean, and tokens of an answer.
USUAL_SPREAD, USUAL_ANSWER = 0.25, 4


class Lengths(NamedTuple):
    """Rows that are trained and predicted, and their lengths in tokens, prompt and answer together.

    Attributes:
        rows_a_pass: that training sees in one pass over train.
        validation: rows, in the same count.
        predicted: rows of validation and test.
        mean, spread, longest: of the lengths; the spread is their standard deviation.
        answer: mean of an answer's.
    """

    rows_a_pass: int
    validation: int
    predicted: int
    mean: float
    spread: float
    longest: int
    answer: float

    @property
    def prompt(self) -> float:
        """Mean of a row without its answer."""
        return max(1.0, self.mean - self.answer)

    def most_tokens(self, rows: int) -> int:
        """Tokens of the largest of many micro-batches: with the longest row, or three standard deviations above."""
        usual = rows * self.mean + 3 * math.sqrt(rows) * self.spread
        return round(min(rows * self.longest, max(usual, (rows - 1) * self.mean + self.longest)))


def read_lengths(params: Params, rows: int | None, tokens: int | None, root: Path = Path()) -> Lengths:
    """The lengths of the data that params.yaml describes.

    Args:
        params: all blocks.
        rows: of train, where the user says so.
        tokens: mean of a row, where the user says so.
        root: the repository's root.

    Raises:
        UserError: nothing says how many rows there are, or how long.
    """
    told = rows is not None or tokens is not None
    if not told:
        values, _ = values_of_files(params, root)
        if "rows_a_pass" in values:
            return lengths_of_parts(params, values["parts"])
    rows = rows or expected_train_rows(params.ingest, params.split)
    lacking = [name for name, value in (("--rows", rows), ("--tokens", tokens)) if value is None]
    if rows is None or tokens is None:
        if told:
            given = "--rows" if tokens is None else "--tokens"
            raise UserError(f"{given} needs {lacking[0]} as well. Without both, data/splits is read.")
        explained = {"--rows": "--rows (of train)", "--tokens": "--tokens (mean of a row)"}
        raise UserError(
            "data/splits does not hold the data of these params.yaml, so that their rows are not known. Run `dvc repro "
            f"split`, or give {' and '.join(explained[name] for name in lacking)}."
        )
    return lengths_as_told(params, rows, tokens)


def lengths_of_parts(params: Params, parts: dict[str, Part]) -> Lengths:
    """What the split files hold."""
    train = parts["train"]
    mean = train.tokens / train.rows
    answers = train.answer_tokens
    return Lengths(
        rows_a_pass=rows_in_one_pass(params.task, params.finetune.class_balance, train.rows, train.labels),
        validation=rows_in_one_pass(params.task, "none", parts["validation"].rows, Counter()),
        predicted=parts["validation"].rows + parts["test"].rows,
        mean=mean,
        spread=math.sqrt(max(0.0, train.squares / train.rows - mean**2)),
        longest=max(train.longest_tokens, parts["validation"].longest_tokens),
        answer=sum(tokens * rows for tokens, rows in answers.items()) / answers.total() if answers else USUAL_ANSWER,
    )


def lengths_as_told(params: Params, rows: int, tokens: int) -> Lengths:
    """What so many rows of such a mean length come to; labels are taken to be equally frequent."""
    named = params.task.labels if isinstance(params.task, ClassificationTask) else []
    balance, split = params.finetune.class_balance, params.split
    all_rows = rows / (1 - split.validation_share - split.test_share)
    return Lengths(
        rows_a_pass=rows_in_one_pass(params.task, balance, rows, Counter({name: rows // len(named) for name in named})),
        validation=rows_in_one_pass(params.task, "none", round(all_rows * split.validation_share), Counter()),
        predicted=max(1, round(all_rows * (split.validation_share + split.test_share))),
        mean=tokens,
        spread=USUAL_SPREAD * tokens,
        longest=max(tokens, params.format_prompts.max_length_tokens),
        answer=USUAL_ANSWER,
    )
