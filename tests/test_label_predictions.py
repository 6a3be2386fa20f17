"""Labels and their probabilities; `test_label_scores` holds the log-likelihoods that they are made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.common.branches import label_branches
from stages.common.errors import UserError
from stages.common.labels import split_labels
from stages.common.schema.measuring import Infer
from stages.common.scoring.label_predictions import posterior, predict_label, predict_label_sets
from tests.sharp import log_likelihood, sharp_model
from tests.split_files import TERMINATOR, multi_label_format

SCORES = Infer(method="label_scores", max_new_tokens=None)
LABELS = {"x": [30, 40, TERMINATOR], "y": [31, TERMINATOR], "z": [30, TERMINATOR]}
# The second begins like the first, and the answers' tokens come after each.
MULTI_LABEL = multi_label_format({"x": [20], "xy": [20, 21], "z": [22, 23, 24], "w": [25]}, yes=30, no=31)
PROMPTS = [[5, 40, 41, 6 + row] for row in range(40)]


@pytest.fixture
def model(base_folder: Path) -> Any:
    return sharp_model(base_folder)


def done(count: int) -> None:
    """Nobody looks at the progress."""


def test_probabilities_are_the_likelihoods_divided_by_their_sum() -> None:
    # Likelihoods 1 : 3 : 4, far below the smallest float64 (e^-745) unless scaled first.
    found = posterior(np.log([[1.0, 3.0, 4.0]]) - 2000)
    np.testing.assert_allclose(found, [[0.125, 0.375, 0.5]], rtol=1e-9)
    assert posterior(np.empty((0, 3))).shape == (0, 3)


def test_of_equally_likely_labels_the_first_of_the_task_is_predicted(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.array([[-3.0, -3.0, -4.0]])
    monkeypatch.setattr("stages.common.scoring.label_predictions.score_labels", lambda *_: scores)
    assert predict_label(model, [[5]], LABELS, SCORES, done)[0] == ["x"]


def test_a_model_with_broken_weights_is_reported(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        predict_label(model, [[5, 6]], LABELS, SCORES, done)
    with pytest.raises(UserError, match="not finite"):
        predict_label_sets(model, [[5, 6]], label_branches(MULTI_LABEL), done)


def test_a_labels_probability_is_that_of_yes_against_no_each_alone_behind_the_prompt(model: Any) -> None:
    branches = label_branches(MULTI_LABEL)
    assert branches["xy"] == ([20, 21, 30, TERMINATOR], [20, 21, 31, TERMINATOR])
    cells, probabilities = predict_label_sets(model, PROMPTS, branches, done)
    assert probabilities.shape == (len(PROMPTS), 4)
    for prompt, cell, row in zip(PROMPTS, cells, probabilities, strict=True):
        for (yes, no), found in zip(branches.values(), row, strict=True):
            difference = log_likelihood(model, prompt, yes) - log_likelihood(model, prompt, no)
            assert found == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-4)
        assert split_labels(cell) == [label for label, found in zip(branches, row, strict=True) if found >= 0.5]
    assert len(set(cells)) > 3, "the prompts must matter, or this shows nothing"


def test_all_labels_are_scored_in_one_pass_and_no_probability_is_lost_at_the_ends(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    predict_label_sets(model, PROMPTS[:3], label_branches(MULTI_LABEL), done)
    assert len(calls) == 2, "one for what the prompts begin with, one for everything else"
    # 2^-1000 against 1: a difference of probabilities would have become 0.
    scores = np.log(2) * np.array([[-1000.0, 0.0, -5.0, -5.0, 0.0, -2000.0, -1.0, -2.0]])
    monkeypatch.setattr("stages.common.scoring.label_predictions.score_labels", lambda *_: scores)
    cells, probabilities = predict_label_sets(model, [[5]], label_branches(MULTI_LABEL), done)
    np.testing.assert_allclose(probabilities, [[2.0**-1000, 0.5, 1, 2 / 3]], rtol=1e-12)
    assert cells == ['["xy", "z", "w"]'], "a half is enough"


def test_no_prompts_give_no_predictions(model: Any) -> None:
    assert predict_label(model, [], LABELS, SCORES, done)[0] == []
    cells, probabilities = predict_label_sets(model, [], label_branches(MULTI_LABEL), done)
    assert (cells, probabilities.shape) == ([], (0, 4))
