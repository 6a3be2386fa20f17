"""Training rows: token columns mapped from disk, one row for each question that is trained, rare labels balanced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from stages.common.branches import Branches, label_branches
from stages.common.errors import UserError, listing
from stages.common.labels import split_labels
from stages.common.tables import ROWS_PER_GROUP, read_table, table_metadata

COLUMNS = {
    "classification": ["prompt_ids", "completion_ids"],
    "multi_label": ["label", "prompt_ids"],
    "question_answering": ["prompt_ids", "completion_ids"],
    "chat": ["prompt_ids", "prompt_answer_mask", "completion_ids"],
}
TOKENS = List(Value("int32"))


def read_rows(
    paths: dict[str, Path], class_balance: Literal["none", "weighted_loss", "oversample"], seed: int, cache_folder: Path
) -> dict[str, Dataset]:
    """The rows to train on and to choose the best step by, mapped from disk rather than read into memory.

    Args:
        paths: the split files "train" and "validation".
        class_balance: "weighted_loss" gives each row of both parts the weight of its label in train; "oversample"
            repeats rows of train.
        seed: chooses the rows that are repeated once more than others of their label.
        cache_folder: where the mapped files are written: as large as the token columns and, for multi-label rows, as
            large as the prompts times the labels.

    Returns:
        "train" and "validation", each with the columns `prompt_ids`, `completion_ids`, for conversations
        `prompt_answer_mask`, and with weighted loss `weight`.

    Raises:
        UserError: a label of validation has no weight, because train lacks it.
    """
    rows = {name: token_rows(path, cache_folder) for name, path in paths.items()}
    if class_balance == "none":
        return rows
    labels = {name: read_table(path, ["label"])["label"].to_pylist() for name, path in paths.items()}
    if class_balance == "oversample":
        chosen = oversampled(labels["train"], seed)
        fingerprint = f"{rows['train']._fingerprint}-oversampled"
        return rows | {"train": rows["train"].select(chosen, new_fingerprint=fingerprint)}
    weights = balanced_weights(labels["train"])
    absent = sorted(set(labels["validation"]) - set(weights))
    if absent:
        raise UserError(
            f"{paths['validation']}: has the labels {listing(absent)}, which {paths['train']} lacks, so that they "
            "have no weight in the loss. Add rows of them to train, or set finetune.class_balance to none."
        )
    return {
        name: part.add_column(
            "weight", [weights[label] for label in labels[name]], new_fingerprint=f"{part._fingerprint}-weighted"
        )
        for name, part in rows.items()
    }


def token_rows(path: Path, cache_folder: Path) -> Dataset:
    """The token columns of a split file; of a multi-label one, a row for each of its rows and labels."""
    prompt_format = table_metadata(path, "prompt_format")
    columns = COLUMNS[prompt_format["kind"]]
    rows = Dataset.from_parquet(str(path), columns=columns, cache_dir=str(cache_folder))
    assert isinstance(rows, Dataset)
    if prompt_format["kind"] != "multi_label":
        return rows
    return rows.map(
        one_row_for_each_label,
        fn_kwargs={"branches": label_branches(prompt_format)},
        batched=True,
        remove_columns=columns,
        features=Features({"prompt_ids": TOKENS, "completion_ids": TOKENS}),
        cache_file_name=str(cache_folder / f"{path.stem}-labels.arrow"),
        # A fingerprint of its own would pickle this function, which depends on where the project lies.
        new_fingerprint=f"{rows._fingerprint}-labels",
        desc=f"{path.stem}: a row for each label",
    )


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
    return max(pc.max(lengths).as_py() for part in parts for lengths in _lengths(part))


def total_tokens(rows: Dataset) -> int:
    """Tokens of all rows, prompts and completions together."""
    return sum(pc.sum(lengths).as_py() for lengths in _lengths(rows))


def _lengths(rows: Dataset) -> Iterator[pa.ChunkedArray]:
    for table in _tables(rows):
        yield pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["completion_ids"]))


def row_lengths(rows: Dataset, places: list[int]) -> np.ndarray:
    """Tokens of the rows at these places, prompt and completion together; int64, in the order of `places`."""
    table = rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")[places]
    lengths = pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["completion_ids"]))
    return lengths.to_numpy().astype(np.int64)


def answer_tokens(rows: Dataset) -> int:
    """How many tokens of all rows have a loss: completions, and earlier answers of a conversation."""
    total = 0
    for table in _tables(rows):
        total += pc.sum(pc.list_value_length(table["completion_ids"])).as_py()
        if "prompt_answer_mask" in table.column_names:
            total += pc.sum(pc.list_flatten(table["prompt_answer_mask"])).as_py() or 0
    return total


def _tables(rows: Dataset) -> Iterator[pa.Table]:
    yield from rows.with_format("arrow").iter(ROWS_PER_GROUP)
