"""The training loss on answers alone, with the LM head run on no other position."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTTrainer

from stages.common.scoring.answer_logits import answer_logits
from stages.common.training.rows import answer_tokens

IGNORED = -100  # PyTorch's and TRL's label for positions without a loss


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Join prompts and completions, padded on the right, with labels on answers only.

    Answers are the completions, and in a conversation those earlier answers that `prompt_answer_mask` marks.
    Padding is on the right because a left-padded row gave NaN losses with SDPA in bfloat16.

    Args:
        rows: token ids under "prompt_ids" and "completion_ids"; for conversations booleans, one for each token of the
            prompt, under "prompt_answer_mask"; with weighted loss a number under "weight".
        pad_id: a token id for padding; the attention mask hides it.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (rows, longest row); `weights` (rows,) where rows have one.
    """
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = len(row["prompt_ids"])
        batch["input_ids"][index, :length] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, start:length] = torch.tensor(row["completion_ids"])
        if row.get("prompt_answer_mask") is not None:
            learned = torch.tensor(row["prompt_answer_mask"], dtype=torch.bool)
            assert len(learned) == start and not learned[0], "nothing comes before the first token to predict it from"
            batch["labels"][index, :start][learned] = batch["input_ids"][index, :start][learned]
    if "weight" in rows[0]:
        batch["weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
    return batch


class AnswerLossTrainer(SFTTrainer):
    """TRL's trainer with a loss that scores answer positions only, on every kind of device.

    TRL does that on CUDA; on a CPU it projects every position onto the vocabulary, which takes half of the time of a
    small model. It also reads per-step statistics back from the device, which this leaves out.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # The answer tokens of a step are counted, and divide its loss, whatever the model's forward pass accepts.
        self.model_accepts_loss_kwargs = True

    @property
    def adapter(self) -> PeftModel:
        """The model that is trained, without what may wrap it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        return model

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood of an answer token, in nats, over the whole optimizer step.

        With `weights` in the batch, each token's is multiplied by the weight of its row. The divisor stays the number
        of tokens: weights are 1 on average, so that the loss keeps its scale.
        In evaluation, batches are weighted so that the mean over all of them is the mean over all answer tokens,
        whatever the batch size.
        """
        assert not return_outputs, "only losses are asked for"
        labels = inputs["labels"]
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        positions = targets != IGNORED
        head = self.adapter.get_output_embeddings()
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = answer_logits(model, head, arguments, positions)
        if "weights" in inputs:
            of_token = inputs["weights"][:, None].expand_as(positions)[positions]
            losses = torch.nn.functional.cross_entropy(logits, targets[positions], reduction="none")
            loss = (losses * of_token).sum()
        else:
            loss = torch.nn.functional.cross_entropy(logits, targets[positions], reduction="sum")
        if num_items_in_batch is None:
            assert not model.training, "a training step knows how many answer tokens it has"
            return loss / (len(labels) * self._evaluation_tokens_per_row)
        # num_items_in_batch counts the answer tokens of all processes, and DDP averages their gradients.
        return loss / num_items_in_batch * self.accelerator.num_processes

    @cached_property
    def _evaluation_tokens_per_row(self) -> float:
        assert isinstance(self.eval_dataset, Dataset)
        return answer_tokens(self.eval_dataset) / len(self.eval_dataset)
