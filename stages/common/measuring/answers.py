"""Prediction files read back, and checked: labels as codes, sets of labels as a matrix, texts as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stages.common.errors import UserError
from stages.common.labels import INVALID, split_labels
from stages.common.predictions import probability_column
from stages.common.tables import open_parquet

# A row of probabilities may miss 1 by rounding, never by more.
SUM_TOLERANCE = 1e-6


class Answers(NamedTuple):
    """A predictor's answers to n rows, as codes in the order of the k labels.

    Attributes:
        ids: the rows' ids.
        actual: true labels, shape (n,).
        predicted: predicted labels, shape (n,); k stands for `<invalid>`.
        probabilities: shape (n, k), or None where answers were generated.
    """

    ids: list[str]
    actual: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None


class LabelSets(NamedTuple):
    """A predictor's answers to n rows that can have any number of the k labels.

    Attributes:
        ids: the rows' ids.
        actual: whether each label applies, bool of shape (n, k).
        predicted: whether it was predicted, bool of shape (n, k).
        probabilities: that it applies, shape (n, k), each label by itself.
    """

    ids: list[str]
    actual: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray


class Texts(NamedTuple):
    """A predictor's answers to n questions or conversations.

    Attributes:
        ids: the rows' ids.
        actual: the references.
        predicted: the answers.
        log_likelihoods: of each reference, natural logarithm, shape (n,); None where no model gives any.
        tokens: of each reference, shape (n,), at least 1; None together with `log_likelihoods`.
    """

    ids: list[str]
    actual: list[str]
    predicted: list[str]
    log_likelihoods: np.ndarray | None
    tokens: np.ndarray | None


def read_answers(path: Path, labels: Sequence[str]) -> Answers:
    """Read a prediction file and check that its numbers are probabilities of these labels.

    Args:
        path: a file that `write_predictions` wrote; its folder names the predictor.
        labels: the k labels, in order.

    Raises:
        UserError: the file is for other labels, or a row's probabilities are not finite, not within 0 and 1, or do
            not sum to 1 within 1e-6.
    """
    table = _read(path, list(map(probability_column, labels)))
    return Answers(
        table["id"].to_pylist(),
        encode(path, table["label"].to_pylist(), labels),
        encode(path, table["prediction"].to_pylist(), [*labels, INVALID]),
        None if _all_null(table) else _probabilities(path, table, one_label=True),
    )


def read_label_sets(path: Path, labels: Sequence[str]) -> LabelSets:
    """Read a prediction file of a task with any number of labels for each text.

    Args:
        path: a file that `write_predictions` wrote; its folder names the predictor.
        labels: the k labels, in order.

    Raises:
        UserError: the file is for other labels, or has numbers that are no probabilities.
    """
    table = _read(path, list(map(probability_column, labels)))
    return LabelSets(
        table["id"].to_pylist(),
        label_matrix(path, table["label"].to_pylist(), labels),
        label_matrix(path, table["prediction"].to_pylist(), labels),
        _probabilities(path, table, one_label=False),
    )


def read_texts(path: Path) -> Texts:
    """Read a prediction file of texts.

    Args:
        path: a file that `write_answers` wrote; its folder names the predictor.

    Raises:
        UserError: the file is for another task, or a log-likelihood is not finite, above 0, or of no tokens.
    """
    table = _read(path, ["reference_log_likelihood", "reference_tokens"])
    ids, references, answers = (table[name].to_pylist() for name in ("id", "label", "prediction"))
    if _all_null(table):
        return Texts(ids, references, answers, None, None)
    likelihoods = table["reference_log_likelihood"].to_numpy().astype(np.float64)
    tokens = table["reference_tokens"].to_numpy().astype(np.float64)
    # Nulls become NaN, and NaN fails every comparison.
    _refuse_row(path, (likelihoods <= 0) & np.isfinite(likelihoods) & (tokens >= 1), "the reference's log-likelihood "
                "and tokens are not a finite number of at most 0 and a count of at least 1")  # fmt: skip
    return Texts(ids, references, answers, likelihoods, tokens.astype(np.int64))


def encode(path: Path, values: Sequence[str], allowed: Sequence[str]) -> np.ndarray:
    """Each value's place in `allowed`, shape (n,).

    Raises:
        UserError: a value has none; `path` and row are named.
    """
    codes = {label: code for code, label in enumerate(allowed)}
    for row, value in enumerate(values, start=1):
        if value not in codes:
            raise _other_labels(path, row, value, allowed)
    return np.array([codes[value] for value in values], np.int64)


def label_matrix(path: Path, cells: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Which labels each cell lists, bool of shape (n, k).

    Args:
        path: the file, for messages.
        cells: as `join_labels` writes them.
        labels: the k labels, in order.

    Raises:
        UserError: a cell is no list of them; `path` and row are named.
    """
    columns = {label: column for column, label in enumerate(labels)}
    matrix = np.zeros((len(cells), len(labels)), dtype=bool)
    # Few lists are different ones, and reading JSON is what takes time.
    read: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        if cell not in read:
            applying = _columns_of(cell, columns)
            if applying is None:
                raise _other_labels(path, row + 1, cell, labels)
            read[cell] = applying
        matrix[row, read[cell]] = True
    return matrix


def remedy(path: Path) -> str:
    """Which stage makes a split or prediction file, as an instruction."""
    stages = {"splits": "split", "adapter": "infer", "base": "infer_base", "tfidf": "baseline", "majority": "baseline"}
    return f"Run `dvc repro --force --single-item {stages[path.parent.name]}`, then `dvc repro`."


def _read(path: Path, numbers: list[str]) -> pa.Table:
    with open_parquet(path) as file:
        table = file.read()
    expected = ["id", "label", "prediction", *numbers]
    if table.column_names != expected:
        raise UserError(
            f"{path}: has the columns {table.column_names}, but the block task of params.yaml asks for {expected}. "
            f"{remedy(path)}"
        )
    return table


def _columns_of(cell: str, columns: dict[str, int]) -> list[int] | None:
    try:
        listed = split_labels(cell)
        return [columns[label] for label in listed] if isinstance(listed, list) else None
    except (ValueError, KeyError, TypeError):
        return None


def _other_labels(path: Path, row: int, value: str, allowed: Sequence[str]) -> UserError:
    return UserError(
        f"{path}: row {row:,} has {value!r}, which is none of {', '.join(allowed)}. Was it made for another "
        f"task.labels? {remedy(path)}"
    )


def _all_null(table: pa.Table) -> bool:
    return bool(table.num_rows) and all(column.null_count == table.num_rows for column in table.columns[3:])


def _probabilities(path: Path, table: pa.Table, one_label: bool) -> np.ndarray:
    values = np.stack([column.to_numpy() for column in table.columns[3:]], axis=1).astype(np.float64)
    # Nulls become NaN, and NaN fails every comparison.
    good: np.ndarray = np.all((values >= 0) & (values <= 1 + SUM_TOLERANCE), axis=1)
    if one_label:
        good &= np.abs(values.sum(axis=1) - 1) <= SUM_TOLERANCE
    shown = values[int(np.argmin(good))].tolist() if len(good) else []
    _refuse_row(path, good, f"the probabilities {shown} are not finite numbers from 0 to 1"
                f"{' with sum 1' if one_label else ''}")  # fmt: skip
    return values


def _refuse_row(path: Path, good: np.ndarray, problem: str) -> None:
    if not good.all():
        raise UserError(f"{path}: row {int(np.argmin(good)) + 1:,}: {problem}. {remedy(path)}")
