"""Log-likelihoods of reference answers against a full forward pass over each row alone, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from stages.common.errors import UserError
from stages.common.scoring.references import score_references
from tests.sharp import log_likelihood, sharp_model


@pytest.fixture
def model(base_folder: Path) -> Any:
    return sharp_model(base_folder)


def rows(count: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 29 and answers of 1 to 14 random tokens, each length independent of the other."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 400, length).tolist() for length in rng.integers(1, 30, count)]
    return prompts, [rng.integers(3, 400, length).tolist() for length in rng.integers(1, 15, count)]


@pytest.mark.parametrize("tokens_per_batch", [1, 120, 100_000])
def test_each_reference_is_scored_as_if_it_were_alone(model: Any, tokens_per_batch: int) -> None:
    prompts, references = rows()
    expected = [log_likelihood(model, *row) for row in zip(prompts, references, strict=True)]
    told: list[int] = []
    found = score_references(model, prompts, references, tokens_per_batch, told.append)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert sum(told) == len(prompts)
    # In another order each row keeps its number.
    backwards = score_references(model, prompts[::-1], references[::-1], tokens_per_batch)
    np.testing.assert_allclose(backwards[::-1], expected, rtol=0, atol=1e-4)


def test_an_adapter_counts(model: Any) -> None:
    prompts, references = rows(4)
    before = score_references(model, prompts, references, 500)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    expected = [log_likelihood(adapted, *row) for row in zip(prompts, references, strict=True)]
    found = score_references(adapted, prompts, references, 500)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found - before).min() > 0.01


def test_a_model_that_caps_its_logits_keeps_doing_so() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    prompts, references = rows(3)
    expected = [log_likelihood(model, *row) for row in zip(prompts, references, strict=True)]
    np.testing.assert_allclose(score_references(model, prompts, references, 500), expected, rtol=0, atol=1e-4)


def test_the_head_sees_answer_positions_alone(model: Any) -> None:
    prompts, references = rows(5)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, arguments, _output: seen.append(arguments[0].shape[0]))
    score_references(model, prompts, references, 100_000)
    assert seen == [sum(map(len, references))]


def test_long_answers_make_smaller_batches_where_the_vocabulary_is_large(model: Any) -> None:
    rows_of_a_batch: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _arguments, named: rows_of_a_batch.append(len(named["input_ids"])), with_kwargs=True
    )
    # 8 rows of 2 + 8 tokens fit into 80; with 16,384 words, each answer's logits count as 8 tokens more.
    score_references(model, [[5, 6]] * 8, [[7] * 8] * 8, 80)
    model.config.vocab_size = 16_384
    score_references(model, [[5, 6]] * 8, [[7] * 8] * 8, 80)
    assert rows_of_a_batch == [8, 4, 4]


def test_no_rows_give_no_numbers(model: Any) -> None:
    assert score_references(model, [], [], 100).shape == (0,)


def test_a_model_with_broken_weights_is_reported(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="scores are not finite"):
        score_references(model, [[5]], [[6]], 100)
