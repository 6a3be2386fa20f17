"""Training rows laid end to end: every token in its place, few shapes, nothing learned from what fills them up."""

from __future__ import annotations

import numpy as np

from stages.common.training.collating import IGNORED, collate_packed, round_up

ROWS = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 2], "weight": 2.0},
    {"prompt_ids": [9], "completion_ids": [10, 11, 2], "weight": 0.5},
]


def test_rows_follow_one_another_and_positions_begin_anew() -> None:
    batch = collate_packed(ROWS, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2, 9, 10, 11, 2, *[0] * 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, *range(7)]]
    assert batch["boundaries"].tolist() == [0, 5, 9, 16]
    assert batch["labels"].tolist() == [[*[IGNORED] * 3, 8, 2, IGNORED, 10, 11, 2, *[IGNORED] * 7]]


def test_logits_are_kept_before_answers_and_nowhere_else() -> None:
    batch = collate_packed(ROWS, pad_id=0)
    assert batch["kept"].tolist() == [2, 3, 5, 6, 7, *[0] * 27]
    assert batch["targets"].tolist() == [8, 2, 10, 11, 2, *[IGNORED] * 27]
    assert batch["weights"].tolist() == [2.0, 2.0, 0.5, 0.5, 0.5, *[0] * 27]


def test_rounding_adds_little_and_leaves_few_lengths() -> None:
    for count in range(1, 20_000, 7):
        for least in (8, 32):
            assert count <= round_up(count, least) <= max(count + least - 1, count * 33 / 32)
    lengths = np.random.default_rng(0).integers(290, 485, (500, 32)).sum(axis=1)
    assert len({round_up(int(length), 8) for length in lengths}) <= 12
