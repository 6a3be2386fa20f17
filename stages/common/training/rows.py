"""Training rows: token columns mapped from disk, one row for each question that is trained, rare labels balanced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables

from stages.common.branches import Branches, label_branches
from stages.common.errors import UserError, listing
from stages.common.labels import split_labels
from stages.common.tables import iter_batches, read_table, table_metadata
from stages.common.training.mapped import (
    CountedRows,
    Totals,
    read_rows_of,
    read_totals,
    totals,
    write_mapped,
    write_rows,
    write_totals,
)

# Multi-label rows that are Python's at a time: times the labels they are many.
ROWS_AT_A_TIME = 1_000
TOKENS = pa.list_(pa.int32())
QUESTIONS = pa.schema([("prompt_ids", TOKENS), ("completion_ids", TOKENS)])
CONVERSATIONS = QUESTIONS.insert(1, pa.field("prompt_answer_mask", pa.list_(pa.bool_())))
WEIGHTS = pa.schema([("weight", pa.float64())])
PLACES = pa.schema([("indices", pa.uint64())])  # as datasets names and types them


def read_rows(
    paths: dict[str, Path],
    class_balance: Literal["none", "weighted_loss", "oversample"],
    seed: int,
    folder: Path,
    tokens: Path | None = None,
) -> dict[str, Dataset]:
    """The rows to train on and to choose the best step by, mapped from disk rather than read into memory.

    Args:
        paths: the split files "train" and "validation".
        class_balance: "weighted_loss" gives each row of both parts the weight of its label in train; "oversample"
            repeats rows of train.
        seed: chooses the rows that are repeated once more than others of their label.
        folder: of these parameters; what `class_balance` adds is written there, eight bytes a row, unless it is there.
        tokens: where `write_tokens` has written these files; None to have them written into `folder`.

    Returns:
        "train" and "validation", each with the columns `prompt_ids`, `completion_ids`, for conversations
        `prompt_answer_mask`, and with weighted loss `weight`.

    Raises:
        UserError: a label of validation has no weight, because train lacks it.
    """
    if tokens is None:
        write_tokens(paths, tokens := folder)
    files = {name: tokens / f"{name}.arrow" for name in paths}
    rows: dict[str, Dataset] = {name: read_rows_of(file) for name, file in files.items()}
    if class_balance == "oversample":
        return rows | {"train": _oversampled_rows(paths["train"], rows["train"], seed, folder / "places.arrow")}
    if class_balance == "weighted_loss":
        weights = {name: folder / f"{name}-weights.arrow" for name in paths}
        if not all(path.exists() for path in weights.values()):
            _write_weights(paths, weights)
        return {name: _weighted_rows(files[name], weights[name]) for name in paths}
    return rows


def write_tokens(paths: dict[str, Path], folder: Path) -> None:
    """Write the token columns of split files as FOLDER/NAME.arrow, to be mapped.

    They are as large as these columns and, for multi-label rows, as large as the prompts times the labels.
    """
    for name, path in paths.items():
        prompt_format = table_metadata(path, "prompt_format")
        file = folder / f"{name}.arrow"
        if prompt_format["kind"] == "multi_label":
            branches = label_branches(prompt_format)
            write_rows(file, QUESTIONS, _questions(iter_batches(path, ["label", "prompt_ids"]), branches))
        else:
            schema = CONVERSATIONS if prompt_format["kind"] == "chat" else QUESTIONS
            write_rows(file, schema, (batch.select(schema.names) for batch in iter_batches(path, schema.names)))


def _questions(batches: Iterable[pa.RecordBatch], branches: dict[str, Branches]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            rows = batch.slice(start, ROWS_AT_A_TIME).to_pydict()
            yield pa.RecordBatch.from_pydict(one_row_for_each_label(rows, branches), schema=QUESTIONS)


def _write_weights(paths: dict[str, Path], files: dict[str, Path]) -> None:
    labels = {name: read_table(path, ["label"])["label"].to_pylist() for name, path in paths.items()}
    weights = balanced_weights(labels["train"])
    absent = sorted(set(labels["validation"]) - set(weights))
    if absent:
        raise UserError(
            f"{paths['validation']}: has the labels {listing(absent)}, which {paths['train']} lacks, so that they "
            "have no weight in the loss. Add rows of them to train, or set finetune.class_balance to none."
        )
    for name, file in files.items():
        column = pa.array([weights[label] for label in labels[name]], pa.float64())
        write_mapped(file, WEIGHTS, [pa.record_batch([column], schema=WEIGHTS)])


def _weighted_rows(tokens: Path, weights: Path) -> CountedRows:
    mapped = [MemoryMappedTable.from_file(str(file)) for file in (tokens, weights)]
    rows = CountedRows(concat_tables(mapped, axis=1))
    rows.totals = read_totals(tokens)
    return rows


def _oversampled_rows(path: Path, rows: Dataset, seed: int, file: Path) -> CountedRows:
    """Rows of the split file `path`, some of them repeated; `file` has the places of those that are trained on."""
    if not file.exists():
        chosen = oversampled(read_table(path, ["label"])["label"].to_pylist(), seed)
        write_totals(file, _totals_of(rows, chosen))
        write_mapped(file, PLACES, [pa.record_batch([pa.array(chosen, pa.uint64())], schema=PLACES)])
    found = CountedRows(rows.data, rows.info.copy(), indices_table=MemoryMappedTable.from_file(str(file)))
    found.totals = read_totals(file)
    return found


def _totals_of(rows: Dataset, chosen: np.ndarray) -> Totals:
    """What these rows come to, without reading their tokens."""
    table = rows.data.table
    prompts, answers = (pc.list_value_length(table[name]).to_numpy() for name in QUESTIONS.names)
    lengths = prompts[chosen].astype(np.int64) + answers[chosen]
    return Totals(int(lengths.max()), int(lengths.sum()), int(answers[chosen].sum(dtype=np.int64)))


def one_row_for_each_label(batch: dict[str, list[Any]], branches: dict[str, Branches]) -> dict[str, list[list[int]]]:
    """Multi-label rows as questions: the prompt and the label are given, "yes" or "no" is to be learned.

    The label's tokens belong to the prompt because they cancel in P(yes) / (P(yes) + P(no)): learning them would only
    teach the model to list labels.

    Args:
        batch: `prompt_ids` and `label` (a JSON list of those that apply) of n rows.
        branches: token ids of both answers, for each of k labels.

    Returns:
        `prompt_ids` and `completion_ids` of n * k rows: all labels of the first row, all of the second, and so on.
    """
    questions: dict[str, list[list[int]]] = {"prompt_ids": [], "completion_ids": []}
    for prompt, cell in zip(batch["prompt_ids"], batch["label"], strict=True):
        applying = split_labels(cell)
        for label, branch in branches.items():
            answer = branch.yes if label in applying else branch.no
            questions["prompt_ids"].append([*prompt, *answer[: branch.shared_tokens]])
            questions["completion_ids"].append(answer[branch.shared_tokens :])
    return questions


def balanced_weights(labels: list[str]) -> dict[str, float]:
    """A weight for each label so that all labels together weigh the same: n / (k * n_label).

    That is scikit-learn's class_weight="balanced" (King & Zeng 2001); over the rows, the mean weight is 1.

    Args:
        labels: of all n rows; k of them are distinct.
    """
    counts = Counter(labels)
    return {label: len(labels) / (len(counts) * count) for label, count in counts.items()}


def oversampled(labels: list[str], seed: int) -> np.ndarray:
    """Which rows to train on so that every label has as many as the most frequent one.

    Args:
        labels: of all rows.
        seed: chooses the rows that fill up a label after as many whole copies as fit.

    Returns:
        Indices of rows, ascending, int64; each row occurs at least once.
    """
    randomness = np.random.default_rng(seed)
    # NumPy would compare the labels of all rows as objects, to sort them.
    encoded = pa.array(labels, pa.string()).dictionary_encode()
    names, of_row = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    counts = np.bincount(of_row)
    chosen = []
    for code in sorted(range(len(names)), key=lambda code: names[code]):
        rows = np.flatnonzero(of_row == code)
        copies, rest = divmod(int(counts.max()), len(rows))
        chosen += [np.repeat(rows, copies), randomness.choice(rows, rest, replace=False)]
    return np.sort(np.concatenate(chosen))


def longest_row(parts: Iterable[Dataset]) -> int:
    """Tokens of the longest row, prompt and completion together."""
    return max(totals(part).longest for part in parts)


def total_tokens(rows: Dataset) -> int:
    """Tokens of all rows, prompts and completions together."""
    return totals(rows).tokens


def answer_tokens(rows: Dataset) -> int:
    """How many tokens of all rows have a loss: completions, and earlier answers of a conversation."""
    return totals(rows).answers


def row_lengths(rows: Dataset, places: list[int]) -> np.ndarray:
    """Tokens of the rows at these places, prompt and completion together; int64, in the order of `places`."""
    table = rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")[places]
    lengths = pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["completion_ids"]))
    return lengths.to_numpy().astype(np.int64)
