"""Labels scored over rows without padding: as exact as each label by itself, whatever the batches."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from stages.common.acceleration.choice import FastPaths
from stages.common.acceleration.preparing import prepare_layers
from stages.common.errors import UserError
from stages.common.scoring.label_predictions import posterior
from stages.common.scoring.label_scores import plain_path_reason, score_labels
from stages.common.scoring.label_tree import build_tree
from stages.common.scoring.packed_scores import Shape, _runner, common_shape, deal, packed_inputs
from tests.test_label_scores import LABEL_SETS, brute_force, random_prompts, tiny_model, with_adapter

ON_CPU = FastPaths(packed=None, dense="no", compiled="no", recorded="no")


def packed(model: Any) -> Any:
    """A copy of a model that takes rows without padding."""
    copied = copy.deepcopy(model)
    prepare_layers(copied, ON_CPU)
    return copied


def assert_exact(model: Any, prompts: list[list[int]], label_ids: list[list[int]], tokens_per_batch: int = 150) -> None:
    expected = brute_force(model, prompts, label_ids)
    scores = score_labels(packed(model), prompts, label_ids, tokens_per_batch)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(posterior(scores), posterior(expected), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 0.01, "the prompts must matter, or this shows nothing"


@pytest.mark.parametrize("label_ids", LABEL_SETS.values(), ids=LABEL_SETS.keys())
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_probabilities_are_those_of_a_full_forward_pass_for_each_label(
    model_type: str, label_ids: list[list[int]]
) -> None:
    settings = {"sliding_window": None} if model_type == "mistral" else {}
    model = tiny_model(model_type, **settings)
    assert plain_path_reason(packed(model), 100) is None
    assert_exact(model, random_prompts(), label_ids)


@pytest.mark.parametrize("shared", [0, 1, 40], ids=lambda count: f"{count} shared tokens")
def test_they_are_exact_whatever_prompts_share(shared: int) -> None:
    assert_exact(tiny_model("llama"), random_prompts(shared=shared), LABEL_SETS["shared first tokens"])


def test_labels_of_one_token_need_no_tree() -> None:
    assert_exact(tiny_model("llama"), random_prompts(), [[5], [6], [9]])


def test_one_token_prompts_and_equal_ones_are_scored() -> None:
    label_ids = LABEL_SETS["one token and many"][:2]
    assert_exact(tiny_model("llama"), [[7, 8, 9], [7, 8, 9, 10, 11], [7, 8, 9, 12], [7, 8, 9], [20] * 40], label_ids)
    assert_exact(tiny_model("llama"), [[7], [8]], label_ids)


def test_predictions_do_not_depend_on_batch_size_or_order() -> None:
    model, prompts, label_ids = packed(tiny_model("llama")), random_prompts(count=12), LABEL_SETS["77 labels"]
    scores = score_labels(model, prompts, label_ids, tokens_per_batch=10_000)
    for tokens_per_batch in (1, 300, 900):
        others = score_labels(model, prompts, label_ids, tokens_per_batch)
        np.testing.assert_allclose(others, scores, rtol=0, atol=1e-5)
        assert (others.argmax(axis=1) == scores.argmax(axis=1)).all()
    reverse = score_labels(model, prompts[::-1], label_ids[::-1], tokens_per_batch=500)
    np.testing.assert_allclose(reverse[::-1, ::-1], scores, rtol=0, atol=1e-5)


def test_an_adapter_counts_merged_or_not() -> None:
    prompts, label_ids = random_prompts(), LABEL_SETS["shared first tokens"]
    adapted = with_adapter(tiny_model("llama"))
    assert_exact(adapted.get_base_model(), prompts, label_ids)
    expected = brute_force(adapted, prompts, label_ids)
    merged = packed(adapted.merge_and_unload())
    np.testing.assert_allclose(score_labels(merged, prompts, label_ids, 150), expected, rtol=0, atol=1e-4)


def test_batches_that_can_be_recorded_have_one_shape_and_little_filling() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 103)
    batches = deal(lengths, 1000)
    shape = common_shape(batches, lengths, [1, 2])
    assert shape is not None
    assert shape.rows == max(map(len, batches)) and shape.longest == 2 + lengths.max()
    assert shape.rest_tokens >= max(lengths[batch].sum() for batch in batches)
    assert shape.rest_tokens * len(batches) < 1.13 * lengths.sum()
    assert common_shape(deal(np.array([5000, 3, 4]), 1000), np.array([5000, 3, 4]), []) is None


def test_filled_up_batches_score_as_others_do() -> None:
    model, label_ids = packed(tiny_model("llama")), LABEL_SETS["shared first tokens"]
    prompts = random_prompts(count=5, shared=20)
    tree = build_tree(label_ids)
    expected = score_labels(model, prompts, label_ids, 10_000)
    run = _runner(model, tree, len(label_ids))
    shape = Shape(prompts[0][:20], rows=7, rest_tokens=sum(map(len, prompts)) - 100 + 12, longest=60)
    with torch.inference_mode():
        found = run(shape, packed_inputs(prompts, shape, tree, model.device))
    np.testing.assert_allclose(found[:5].numpy(), expected, rtol=0, atol=1e-5)


def test_rows_are_dealt_into_batches_of_about_as_many_tokens() -> None:
    costs = np.random.default_rng(0).integers(10, 100, 103)
    batches = deal(costs, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    totals = [costs[batch].sum() for batch in batches]
    assert max(totals) <= 1.1 * 1000 and max(totals) - min(totals) < 200


def test_memory_that_runs_out_makes_batches_smaller_and_costs_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny_model("llama"))
    rows: list[int] = []

    def run_out(_module: torch.nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        rows.append(len(named["layout"].node_boundaries) - 1)
        if rows[-1] > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # One is much longer than the others.
    prompts, label_ids = [*random_prompts(count=19), [7] * 300], LABEL_SETS["shared first tokens"]
    expected = score_labels(model, prompts, label_ids, 10_000)
    model.register_forward_pre_hook(run_out, with_kwargs=True)
    np.testing.assert_allclose(score_labels(model, prompts, label_ids, 10_000), expected, rtol=0, atol=1e-5)
    assert rows[:3] == [20, 10, 5] and sum(count for count in rows if count <= 3) == 20
    model.register_forward_pre_hook(_never_enough)
    with pytest.raises(UserError, match="memory is too small for one sequence of about"):
        score_labels(model, prompts, label_ids, 10_000)


def _never_enough(_module: torch.nn.Module, _arguments: Any) -> None:
    raise torch.OutOfMemoryError


def test_one_long_prompt_makes_no_other_batch_long() -> None:
    model, tokens = packed(tiny_model("llama")), []
    model.register_forward_pre_hook(lambda _, __, inputs: tokens.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    prompts, label_ids = [*random_prompts(count=60), [7] * 300], LABEL_SETS["shared first tokens"]
    score_labels(model, prompts, label_ids, 200)
    assert sorted(tokens)[-2] <= 200 < max(tokens)


def test_threads_share_a_model() -> None:
    model, label_ids = packed(tiny_model("llama")), LABEL_SETS["shared first tokens"]
    jobs = [random_prompts(count=count, seed=count) for count in range(2, 12)] * 4
    expected = [score_labels(model, prompts, label_ids, 200) for prompts in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompts: score_labels(model, prompts, label_ids, 200), jobs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
