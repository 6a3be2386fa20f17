"""Texts in answer to texts: a predictor's block of metrics.json. Nothing is decided, and there are no curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.measuring import curves
from stages.common.measuring.answers import Texts, read_texts
from stages.common.measuring.slices import Slices
from stages.common.measuring.text_scores import per_row_scores, text_scores
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import GenerationTask

HEADLINE = ("token_f1", "token F1")


def read(path: Path, task: GenerationTask) -> Texts:
    """A predictor's answers to a part."""
    return read_texts(path)


def truth(path: Path, cells: Sequence[str], task: GenerationTask) -> list[str]:
    """A split's references, comparable with `Texts.actual`: any text can be one."""
    return list(cells)


def decision_rule(validation: Texts, task: GenerationTask, params: Evaluate) -> dict[str, Any]:
    """An answer is what was generated."""
    return {"rule": "text"}


def decide(answers: Texts, rule: dict[str, Any], task: GenerationTask) -> Texts:
    """The answers as they are."""
    return answers


def score(
    answers: Texts, rule: dict[str, Any], task: GenerationTask, params: Evaluate, slices: Slices
) -> dict[str, Any]:
    """A predictor's block of metrics.json; without perplexity where no model gave log-likelihoods.

    Args:
        answers: of at least one row.
        rule: as `decision_rule` made it.
        task: question answering or chat.
        params: the evaluate block.
        slices: the rows of each slice; empty where the data has none.
    """
    block: dict[str, Any] = {"n": len(answers.ids)} | text_scores(
        answers.actual,
        answers.predicted,
        answers.log_likelihoods,
        answers.tokens,
        params.bootstrap_samples,
        params.seed,
    )
    if slices:
        columns = zip(("token_f1", "rouge_l"), per_row_scores(answers.actual, answers.predicted), strict=True)
        rows_of = dict(columns)
        block["per_slice"] = {
            name: {"n": len(rows), **{key: float(values[rows].mean()) for key, values in rows_of.items()}}
            for name, rows in slices.items()
        }
    return block


def example_rows(answers: Texts, most: int, params: Evaluate) -> np.ndarray:
    """Rows to look at, chosen by the seed, in the table's order."""
    rows = len(answers.ids)
    return np.sort(np.random.default_rng(params.seed).choice(rows, min(most, rows), replace=False))


def predictions(answers: Texts, rows: np.ndarray, task: GenerationTask) -> list[str]:
    """The answers to some rows."""
    return [answers.predicted[row] for row in rows]


def plot_tables(
    answers: Mapping[str, Texts], blocks: Mapping[str, Any], task: GenerationTask, params: Evaluate
) -> curves.Tables:
    """None: every plot but the losses is about labels."""
    return {}
