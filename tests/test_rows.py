"""Training rows out of split files: which tokens, how often, with which weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight

from stages.common.branches import Branches
from stages.common.errors import UserError
from stages.common.training.mapped import CountedRows, totals
from stages.common.training.rows import (
    answer_tokens,
    balanced_weights,
    longest_row,
    oversampled,
    read_rows,
    write_tokens,
)
from tests.split_files import multi_label_format, prompt_format, write_split

COMPLETIONS = {"a": [7, 2], "b": [8, 9, 2], "c": [8, 10, 2]}
LABELS = ["a", "a", "b", "a", "c", "a", "b"]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """Where this test's parts are to be written."""
    return {name: tmp_path / f"{name}.parquet" for name in ("train", "validation")}


def classified(labels: list[str]) -> list[dict[str, Any]]:
    return [
        {"label": label, "prompt_ids": [5] * (index + 1), "completion_ids": COMPLETIONS[label]}
        for index, label in enumerate(labels)
    ]


def write_classified(paths: dict[str, Path], train: list[str], validation: list[str]) -> None:
    for name, labels in (("train", train), ("validation", validation)):
        write_split(paths[name], prompt_format("classification", COMPLETIONS, list("abc")), classified(labels))


def test_rows_of_one_label_are_the_files_tokens_mapped_from_disk(paths: dict[str, Path], tmp_path: Path) -> None:
    write_classified(paths, LABELS, ["b"])
    rows = read_rows(paths, "none", 0, tmp_path / "cache")
    assert rows["train"].to_list() == [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"]} for row in classified(LABELS)
    ]
    assert rows["validation"].to_list() == [{"prompt_ids": [5], "completion_ids": [8, 9, 2]}]
    assert all(Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in rows["train"].cache_files)
    assert rows["train"].cache_files, "in memory there are no files"


def test_a_multi_label_row_becomes_one_question_for_each_label(paths: dict[str, Path], tmp_path: Path) -> None:
    # The second label begins like the first.
    footer = multi_label_format({"x": [20], "xy": [20, 21], "z": [22, 23, 24]}, yes=30, no=31)
    cells = ['["x", "z"]', "[]", '["xy"]']
    for path in paths.values():
        write_split(path, footer, [{"label": cell, "prompt_ids": [5, 6, index]} for index, cell in enumerate(cells)])
    rows = read_rows(paths, "none", 0, tmp_path / "cache")
    yes, no = [30, 2], [31, 2]
    expected = [
        ([5, 6, 0, 20], yes), ([5, 6, 0, 20, 21], no), ([5, 6, 0, 22, 23, 24], yes),
        ([5, 6, 1, 20], no), ([5, 6, 1, 20, 21], no), ([5, 6, 1, 22, 23, 24], no),
        ([5, 6, 2, 20], no), ([5, 6, 2, 20, 21], yes), ([5, 6, 2, 22, 23, 24], no),
    ]  # fmt: skip
    assert [(row["prompt_ids"], row["completion_ids"]) for row in rows["train"]] == expected
    assert rows["validation"].column_names == ["prompt_ids", "completion_ids"]
    assert rows["train"].cache_files, "in memory there are no files"
    assert rows["train"].features["prompt_ids"].feature.dtype == "int32"


def test_an_answer_shares_what_both_begin_with_even_when_the_tokenizer_splits_them_unevenly() -> None:
    assert Branches(yes=[20, 40, 2], no=[20, 41, 42, 2]).shared_tokens == 1
    assert Branches(yes=[20, 40, 2], no=[20, 40, 42, 2]).shared_tokens == 2


def test_a_conversations_mask_comes_along(paths: dict[str, Path], tmp_path: Path) -> None:
    row = {"prompt_ids": [4, 5, 6, 7], "prompt_answer_mask": [False, True, True, False], "completion_ids": [8, 2]}
    for path in paths.values():
        write_split(path, prompt_format("chat"), [row])
    assert read_rows(paths, "none", 0, tmp_path / "cache")["train"].to_list() == [row]


def test_weights_are_scikit_learns_balanced_ones_and_are_1_on_average() -> None:
    weights = balanced_weights(LABELS)
    expected = compute_class_weight("balanced", classes=np.array(list("abc")), y=np.array(LABELS))
    assert [weights[label] for label in "abc"] == pytest.approx(expected)
    assert np.mean([weights[label] for label in LABELS]) == pytest.approx(1)


def test_weighted_rows_of_both_parts_carry_the_weight_that_their_label_has_in_train(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    write_classified(paths, LABELS, ["c", "a"])
    rows = read_rows(paths, "weighted_loss", 0, tmp_path / "cache")
    # 7 rows, 3 labels: 4 a, 2 b, 1 c.
    expected = {"a": 7 / 12, "b": 7 / 6, "c": 7 / 3}
    assert rows["train"]["weight"][:] == [expected[label] for label in LABELS]
    assert rows["validation"]["weight"][:] == [expected["c"], expected["a"]]
    assert rows["train"][2]["completion_ids"] == COMPLETIONS["b"]


def test_a_label_that_train_lacks_has_no_weight_and_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    write_classified(paths, ["a", "b"], ["a", "c"])
    with pytest.raises(UserError, match=r"validation.parquet: has the labels c, which .*train.parquet lacks"):
        read_rows(paths, "weighted_loss", 0, tmp_path / "cache")
    read_rows(paths, "oversample", 0, tmp_path / "cache")


def test_oversampling_gives_every_label_as_many_rows_as_the_most_frequent(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    write_classified(paths, LABELS, LABELS)
    rows = read_rows(paths, "oversample", 0, tmp_path / "cache")
    found = Counter(tuple(row["completion_ids"]) for row in rows["train"])
    assert found == {tuple(ids): 4 for ids in COMPLETIONS.values()}
    assert len(rows["validation"]) == len(LABELS), "only what is trained on is repeated"


@pytest.mark.parametrize("seed", range(5))
def test_oversampled_rows_occur_in_whole_copies_and_a_seeded_remainder(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(list("abcd"), 200, p=[0.6, 0.25, 0.1, 0.05]).tolist()
    chosen = oversampled(labels, seed)
    counts = Counter(labels)
    most = max(counts.values())
    assert Counter(labels[row] for row in chosen) == dict.fromkeys(counts, most)
    for row, times in Counter(chosen.tolist()).items():
        assert times - most // counts[labels[row]] in (0, 1)
    assert set(chosen.tolist()) == set(range(200))
    assert oversampled(labels, seed).tolist() == chosen.tolist()
    assert oversampled(labels, seed + 1).tolist() != chosen.tolist()


def test_the_longest_row_and_the_answer_tokens_are_counted(paths: dict[str, Path], tmp_path: Path) -> None:
    write_classified(paths, LABELS, ["c"])
    rows = read_rows(paths, "oversample", 0, tmp_path / "cache")
    assert longest_row(rows.values()) == 7 + 3
    assert answer_tokens(rows["train"]) == 4 * (2 + 3 + 3)
    masks = [[False, True, True, False], [False] * 4]
    conversations = [{"prompt_ids": [4] * 4, "prompt_answer_mask": mask, "completion_ids": [8, 2]} for mask in masks]
    for path in paths.values():
        write_split(path, prompt_format("chat"), conversations)
    assert answer_tokens(read_rows(paths, "none", 0, tmp_path / "other")["train"]) == 2 + 2 + 2


@pytest.mark.parametrize("name", ["train.arrow", "train.json"])
def test_damaged_mapped_rows_are_refused_with_what_to_remove(paths: dict[str, Path], tmp_path: Path, name: str) -> None:
    write_classified(paths, LABELS, LABELS)
    write_tokens(paths, tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"train\.arrow: .* are damaged .* Remove the folder {tmp_path} and run again"):
        read_rows(paths, "none", 1, tmp_path, tmp_path)


@pytest.mark.parametrize("class_balance", ["none", "weighted_loss", "oversample"])
def test_a_later_start_counts_and_finds_the_same_without_the_split_files(
    paths: dict[str, Path], tmp_path: Path, class_balance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.common.tables.ROWS_PER_GROUP", 4)
    write_classified(paths, LABELS * 3, LABELS)
    write_tokens(paths, tmp_path / "tokens")
    first = read_rows(paths, class_balance, 3, tmp_path / "run", tmp_path / "tokens")
    counted = {name: Dataset.from_list(part.to_list()) for name, part in first.items()}
    for path in paths.values():
        path.unlink()
    later = read_rows(paths, class_balance, 3, tmp_path / "run", tmp_path / "tokens")
    for name, part in later.items():
        assert part.to_list() == counted[name].to_list()
        assert totals(part) == totals(counted[name])
        assert isinstance(part, CountedRows), "counted by an earlier start"
    assert longest_row([later["train"].select([0, 1])]) == 4, "a selection has totals of its own"
