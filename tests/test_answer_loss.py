"""The training loss: equal to one written by hand, on answers alone, whatever the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stages.common.params import load_params
from stages.common.scoring.answer_logits import answer_logits
from stages.common.training.answer_loss import AnswerLossTrainer
from stages.common.training.callbacks import DVCLiveLog
from stages.common.training.collating import IGNORED, collate, collate_packed
from stages.common.training.trainer import MicroBatch, make_trainer
from tests.workplace import Workplace, make_workplace

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
    collated = collate(ROWS, pad_id=0)
    batch, labels = {name: collated[name] for name in ("input_ids", "attention_mask")}, collated["labels"]
    positions = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    full = model(**batch).logits[positions]
    some = answer_logits(model, model.get_output_embeddings(), batch, positions.flatten().nonzero()[:, 0])
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


# --- conversations and weights ----------------------------------------------------------------------------------------

CONVERSATIONS: list[dict[str, Any]] = [
    # user, answer (its terminator learned too), user, answer
    {
        "prompt_ids": [4, 10, 11, 20, 21, 2, 4, 12],
        "prompt_answer_mask": [False, False, False, True, True, True, False, False],
        "completion_ids": [22, 23, 2],
    },
    {"prompt_ids": [4, 13], "prompt_answer_mask": [False, False], "completion_ids": [24, 2]},
    # two earlier answers
    {
        "prompt_ids": [4, 14, 25, 2, 4, 15, 16, 26, 27, 28, 2, 4, 17],
        "prompt_answer_mask": [False, False, True, True, False, False, False, True, True, True, True, False, False],
        "completion_ids": [29],
    },
    {
        "prompt_ids": [4, 18, 30, 2, 4],
        "prompt_answer_mask": [False, False, True, True, False],
        "completion_ids": [31, 32, 33, 34, 2],
    },
]
WEIGHTS = [0.25, 2.0, 0.5, 1.25]  # 1 on average
WEIGHTED = [
    {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"], "weight": weight}
    for row, weight in zip(CONVERSATIONS, WEIGHTS, strict=True)
]


def test_earlier_answers_of_a_conversation_have_labels_too_and_nothing_else_has() -> None:
    batch = collate(CONVERSATIONS, pad_id=0)
    assert batch["labels"].tolist()[0][:11] == [IGNORED] * 3 + [20, 21, 2] + [IGNORED] * 2 + [22, 23, 2]
    for row, ids, labels in zip(CONVERSATIONS, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        learned = [*row["prompt_answer_mask"], *[True] * len(row["completion_ids"])]
        learned += [False] * (len(labels) - len(learned))
        expected = [token if here else IGNORED for token, here in zip(ids, learned, strict=True)]
        assert labels == expected


def test_a_row_without_earlier_answers_may_have_no_mask_at_all() -> None:
    row = {"prompt_ids": [4, 5], "prompt_answer_mask": None, "completion_ids": [6, 2]}
    assert collate([row], pad_id=0)["labels"].tolist() == [[IGNORED, IGNORED, 6, 2]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A project with its base model, entered."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    project = make_workplace(tmp_path_factory.mktemp("loss") / "project")
    assert project.main("stages.base_model") == 0
    with project.entered():
        yield project
    torch.set_num_threads(threads)


def trainer_for(rows: list[dict[str, Any]], folder: Path, micro_rows: int = 1) -> AnswerLossTrainer:
    """A trainer on these rows whose adapter is no longer the identity, so that both of its matrices have gradients."""
    dataset = Dataset.from_list(rows)
    micro = MicroBatch(micro_rows, 16 // micro_rows, recompute_activations=False)
    trainer = make_trainer(load_params("finetune").finetune, micro, folder, {"train": dataset, "validation": dataset})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in trainer.adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return trainer


def loss_by_hand(model: torch.nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The mean over all answer tokens of weight * -ln p(token | all before), each row alone and unpadded."""
    terms = []
    for row in rows:
        ids = [*row["prompt_ids"], *row["completion_ids"]]
        mask = row.get("prompt_answer_mask") or [False] * len(row["prompt_ids"])
        learned = [*mask, *[True] * len(row["completion_ids"])]
        probabilities = model(input_ids=torch.tensor([ids])).logits[0].float().softmax(dim=-1)
        for position in range(1, len(ids)):
            if learned[position]:
                terms.append(-row.get("weight", 1.0) * probabilities[position - 1, ids[position]].log())
    return torch.stack(terms).sum() / len(terms)


def gradients(trainer: AnswerLossTrainer) -> dict[str, torch.Tensor]:
    found = {
        name: weight.grad.clone() for name, weight in trainer.adapter.named_parameters() if weight.grad is not None
    }
    trainer.adapter.zero_grad()
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rows", [CONVERSATIONS, WEIGHTED, ROWS], ids=["conversations", "weights", "plain"])
def test_loss_and_gradients_of_a_step_are_those_written_by_hand_however_it_is_cut(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], packed: bool
) -> None:
    monkeypatch.setenv("PACK_ROWS", "0")
    by_hand = trainer_for(rows, tmp_path / "padded")
    expected_loss = loss_by_hand(by_hand.adapter.train(), rows)
    expected_loss.backward()
    expected = gradients(by_hand)
    monkeypatch.setenv("PACK_ROWS", str(int(packed)))
    trainer = trainer_for(rows, tmp_path / "trained")
    trainer.adapter.train()
    to_batch = collate_packed if packed else collate
    assert len(expected) == 28, "2 layers of 7 matrices, each with two"
    assert all(gradient.abs().max() > 1e-5 for gradient in expected.values())
    for micro_rows in (len(rows), 2, 1):
        batches = [to_batch(rows[at : at + micro_rows], pad_id=0) for at in range(0, len(rows), micro_rows)]
        count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        loss = 0.0
        for batch in batches:
            part = trainer.compute_loss(trainer.adapter, batch, num_items_in_batch=count)
            part.backward()
            loss += float(part.detach())
        assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-5)
        for name, gradient in gradients(trainer).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("packed", ["0", "1"], ids=["padded", "packed"])
@pytest.mark.parametrize("rows", [CONVERSATIONS, WEIGHTED, ROWS], ids=["conversations", "weights", "plain"])
def test_the_evaluation_loss_is_the_mean_over_all_answer_tokens_however_large_the_batches(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], packed: str
) -> None:
    monkeypatch.setenv("PACK_ROWS", "0")
    by_hand = trainer_for([*rows, rows[0]], tmp_path / "by hand").adapter.eval()
    monkeypatch.setenv("PACK_ROWS", packed)
    # 4 + 1 rows (or 3 + 1): with 2 and 4 at a time the last batch is not full.
    rows = [*rows, rows[0]]
    for micro_rows in (1, 2, 4):
        trainer = trainer_for(rows, tmp_path / str(micro_rows), micro_rows)
        trainer.remove_callback(DVCLiveLog)  # it starts with the training
        found = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            assert found == pytest.approx(float(loss_by_hand(by_hand, rows)), rel=1e-5)


def test_every_step_of_a_training_counts_the_tokens_that_have_labels(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(CONVERSATIONS, tmp_path)
    counts = []
    compute_loss = trainer.compute_loss

    def counted(model: torch.nn.Module, inputs: Any, **named: Any) -> torch.Tensor:
        if named.get("num_items_in_batch") is not None:
            counts.append(int(named["num_items_in_batch"]))
        return compute_loss(model, inputs, **named)

    monkeypatch.setattr(trainer, "compute_loss", counted)
    trainer.args.max_steps = 2
    trainer.train()
    # A step is all four rows, one at a time.
    assert set(counts) == {6 + 2 + 7 + 7}
