"""The training loss: equal to the plain one, on answers alone, whatever the micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stages.common.training.answer_loss import IGNORED, answer_logits, collate

ROWS = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 2]},
    {"prompt_ids": [9], "completion_ids": [10, 11, 2]},
    {"prompt_ids": [12, 13, 14, 15, 16, 17], "completion_ids": [18, 2]},
]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_labels_are_the_completions_tokens_and_nothing_else() -> None:
    batch = collate(ROWS, pad_id=0)
    assert batch["input_ids"].tolist()[1] == [9, 10, 11, 2, 0, 0, 0, 0]
    assert batch["labels"].tolist()[1] == [IGNORED, 10, 11, 2, *[IGNORED] * 4]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 1, 0, 0, 0, 0]
    for row, labels in zip(ROWS, batch["labels"].tolist(), strict=True):
        assert [label for label in labels if label != IGNORED] == row["completion_ids"]


def check_against_full_logits(model: PreTrainedModel) -> None:
    batch = collate(ROWS, pad_id=0)
    labels = batch.pop("labels")
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    positions = targets != IGNORED
    full = model(**batch).logits[positions]
    some = answer_logits(model, model.get_output_embeddings(), batch, positions)
    torch.testing.assert_close(some, full, rtol=1e-6, atol=1e-6)
    assert len(some) == sum(len(row["completion_ids"]) for row in ROWS)
    assert model(**batch).logits.shape == (*labels.shape, 64), "the hook is gone afterwards"


def test_logits_at_answer_positions_equal_those_of_a_full_forward_pass() -> None:
    torch.manual_seed(0)
    check_against_full_logits(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())


def test_a_model_that_caps_its_logits_keeps_doing_so() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05)
    model = Gemma2ForCausalLM(config).eval()
    check_against_full_logits(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.abs().max() <= 0.05
